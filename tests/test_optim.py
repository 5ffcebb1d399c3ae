import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax import optim, state


def make_params():
    return {
        "text": {
            "embed": {"embedding": jnp.ones((8, 4))},
            "layers": {"attn": {"q": {"kernel": jnp.full((2, 4, 4), 2.0), "bias": jnp.ones((2, 4))}}},
            "norm": {"scale": jnp.ones(4)},
        },
        "vision": {"patch_embed": {"kernel": jnp.ones((6, 4))}},
    }


names = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(st.integers(), lambda t: st.dictionaries(names, t, min_size=1, max_size=3), max_leaves=12)


@given(st.dictionaries(names, trees, min_size=1, max_size=3))
def test_flatten_and_unflatten_are_inverse(tree):
    assert optim.unflatten(optim.flatten(tree)) == tree
    assert optim.flatten(optim.flatten(tree)) == optim.flatten(tree)


def test_partition_and_join_are_inverse():
    params = make_params()
    trainable, frozen = optim.partition(params, ("text/.*",))
    assert "text/layers/attn/q/kernel" in trainable
    assert set(frozen) == {"vision/patch_embed/kernel"}
    joined = optim.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)


def test_patterns_match_whole_names():
    trainable, _ = optim.partition(make_params(), (r".*/kernel", r".*/norm/scale"))
    assert set(trainable) == {"text/layers/attn/q/kernel", "text/norm/scale", "vision/patch_embed/kernel"}


def test_a_pattern_that_matches_nothing_is_an_error_with_examples():
    with pytest.raises(ValueError, match=r"'text/' matches no parameter.*text/embed/embedding"):
        optim.partition(make_params(), (".*", "text/"))


def test_join_refuses_a_parameter_on_both_sides_and_a_leaf_that_is_a_branch():
    with pytest.raises(ValueError, match="both trainable and frozen: a"):
        optim.join({"a": 1}, {"a": 2})
    for flat in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(ValueError, match="'a"):
            optim.unflatten(flat)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_against_its_formula(kind):
    peak, warm, total, end = 0.3, 5, 25, 0.1
    schedule = optim.schedule(optim.Config(learning_rate=peak, schedule=kind, warmup_steps=warm, end_factor=end), total)
    for step in range(total + 5):
        if step < warm:
            want = peak * (step + 1) / warm
        else:
            done = min((step - warm) / (total - warm), 1.0)
            fall = {"constant": 0.0, "linear": done, "cosine": (1 - np.cos(np.pi * done)) / 2}[kind]
            want = peak * (1 - (1 - end) * fall)
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5)


def test_one_warmup_step_and_unknown_settings():
    schedule = optim.schedule({"learning_rate": 1.0, "warmup_steps": 1, "schedule": "constant"}, 10)
    np.testing.assert_allclose([schedule(0), schedule(5)], [1.0, 1.0])
    with pytest.raises(ValueError, match="'quadratic'"):
        optim.schedule({"schedule": "quadratic"}, 10)
    with pytest.raises(ValueError, match="'lr' is unknown; known:.*learning_rate"):
        optim.make({"lr": 1.0}, 10)


def test_decay_spares_norms_biases_and_embeddings():
    config = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.5, "clip_norm": 0.0}
    tx = optim.make(config, 10)
    params = optim.flatten(make_params())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {path for path, u in updates.items() if np.any(u)}
    assert moved == {"text/layers/attn/q/kernel", "vision/patch_embed/kernel"}
    np.testing.assert_allclose(updates["text/layers/attn/q/kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)


def test_adamw_against_float64():
    config = optim.Config(learning_rate=0.01, schedule="constant", weight_decay=0.1, clip_norm=1.0, b2=0.95, eps=1e-6)
    tx = optim.make(config, 100)
    x = np.linspace(-1, 1, 6)
    params = {"kernel": jnp.asarray(x, jnp.float32)}
    opt_state, m, v = tx.init(params), np.zeros(6), np.zeros(6)
    for step in range(1, 6):
        grad = np.cos(np.arange(6) * step) * step
        updates, opt_state = tx.update({"kernel": jnp.asarray(grad, jnp.float32)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        grad = grad / max(np.linalg.norm(grad), 1.0)
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        x = x - 0.01 * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6) + 0.1 * x)
    np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


def test_train_state_updates_only_params():
    trainable, frozen = optim.partition(make_params(), ("text/layers/.*",))
    tx = optim.make(optim.Config(learning_rate=0.1), 10)
    before = state.create(tx, trainable, frozen, key=jax.random.key(0))
    after = jax.jit(lambda s: s.apply(tx, jax.tree.map(jnp.ones_like, s.params)))(before)
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    assert all(np.all(after.params[path] != before.params[path]) for path in before.params)
    assert jax.tree.structure(after.model) == jax.tree.structure(make_params())
    draw = [jax.random.uniform(s.step_key) for s in (before, after, before)]
    assert draw[0] == draw[2] != draw[1]


def test_abstract_state_has_the_shapes_of_create_and_moments_sharded_like_parameters():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    trainable, frozen = optim.partition(make_params(), (".*/kernel",))
    tx = optim.make({"weight_decay": 0.1}, 10)
    real = state.create(tx, trainable, frozen, key=jax.random.key(0))
    shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for p, x in trainable.items()}
    abstract = state.abstract(tx, shapes, frozen, mesh=mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert jax.tree.map(lambda a, r: (a.shape, a.dtype) == (r.shape, r.dtype), abstract, real)
    adam = next(s for s in abstract.opt_state if hasattr(s, "mu"))
    assert all(x.sharding == sharding for x in [*adam.mu.values(), *adam.nu.values()])
    assert adam.count.sharding.is_fully_replicated and abstract.key.sharding.is_fully_replicated


def test_bfloat16_moments_decay_and_grow_as_their_float32_arithmetic_says():
    """In bfloat16 itself a decay of 0.999 is 1: the second moment would only ever grow."""
    tx = optim.make(optim.Config(learning_rate=1e-3, schedule="constant", clip_norm=0.0), 100)
    params = {"kernel": jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16)}
    update = jax.jit(tx.update)
    _, first = update({"kernel": jnp.ones(64, jnp.bfloat16)}, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(first) if x.ndim} == {jnp.dtype(jnp.bfloat16)}
    updates, second = update({"kernel": jnp.full(64, 2, jnp.bfloat16)}, first, params)
    assert updates["kernel"].dtype == jnp.float32  # added to the parameter before it is rounded
    m, v = 0.9 * 0.1 + 0.1 * 2, 0.999 * 0.001 + 0.001 * 4
    want = -1e-3 * (m / (1 - 0.9**2)) / np.sqrt(v / (1 - 0.999**2))
    np.testing.assert_allclose(updates["kernel"], want, rtol=2e-2)
    nu = {x.dtype: x for x in jax.tree.leaves(second) if x.ndim and float(x[0]) < 0.1}[jnp.dtype(jnp.bfloat16)]
    np.testing.assert_allclose(np.float32(nu), v, rtol=1e-2)


def test_the_average_follows_the_parameters_and_is_handed_on(tmp_path):
    params = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    tx = optim.make({"learning_rate": 0.5, "schedule": "constant", "ema": 0.75}, 4)
    now, want = state.create(tx, params, key=jax.random.key(0)), {k: np.asarray(x) for k, x in params.items()}
    advance = jax.jit(lambda now: now.apply(tx, jax.tree.map(jnp.ones_like, now.params)), donate_argnums=0)
    for _ in range(3):
        now = advance(now)
        want = {k: 0.75 * x + 0.25 * np.asarray(now.params[k]) for k, x in want.items()}
    kept = [x for x in jax.tree.leaves(now.opt_state, is_leaf=lambda x: isinstance(x, optim.Averaged))
            if isinstance(x, optim.Averaged)]  # fmt: skip
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), kept[0].average, want)
    shapes = state.abstract(tx, params)
    assert jax.tree.structure(shapes.opt_state) == jax.tree.structure(now.opt_state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match="ema"):
        optim.make({"ema": decay}, 4)
