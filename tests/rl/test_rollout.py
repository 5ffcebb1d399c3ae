"""Rollouts share a prompt's prefix, agree with a plain forward, and depend on nothing but their own keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax.models import qwen25_vl
from marc_jax.rl import rollout
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.types import Completions
from tests.rl import tiny_model as tiny

G, R = 4, 6
HOW = {"max_new": R, "stop_ids": tiny.STOPS, "banned_ids": tiny.BANNED, "pad_id": tiny.PAD}


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@functools.partial(jax.jit, static_argnames=("temperature", "chunk"))
def score(params, vis, prompt, out, temperature=1.0, chunk=None):
    model = qwen25_vl.bind(tiny.CONFIG, params)
    return rollout.score(model, vis, prompt, out, temperature=temperature, banned_ids=tiny.BANNED, chunk=chunk)


@functools.cache
def sampler(**overrides):
    settings = HOW | overrides

    @jax.jit
    def run(params, vis, prompt, keys):
        return rollout.sample(qwen25_vl.bind(tiny.CONFIG, params), vis, prompt, keys, **settings)

    return run


def keys(ids=(11, 12, 13), step=0, g=G):
    return rollout.rollout_keys(7, step, jnp.asarray(ids), g)


@pytest.fixture(scope="module")
def drawn(params):
    prompt, vis = tiny.prompts()
    return prompt, vis, sampler(temperature=0.8)(params, vis, prompt, keys())


def reference_logp(params, vis, prompt, out, temperature):
    z = tiny.replicated_logits(params, vis, prompt, out.tokens_bgr, out.mask_bgr) / temperature
    z[..., list(tiny.BANNED)] = -np.inf
    z = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    return np.where(out.mask_bgr, np.take_along_axis(z, np.asarray(out.tokens_bgr)[..., None], -1)[..., 0], 0.0)


def test_sampler_logprobs_equal_a_replicated_forward(params, drawn):
    prompt, vis, out = drawn
    np.testing.assert_allclose(out.logp_bgr, reference_logp(params, vis, prompt, out, 0.8), atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
def test_scored_logprobs_equal_the_samplers(params, drawn, chunk):
    prompt, vis, out = drawn
    got = score(params, vis, prompt, out, 0.8, chunk)
    np.testing.assert_allclose(got, out.logp_bgr, atol=1e-5)


def test_completions_end_with_the_first_stop_token(drawn):
    _, _, out = drawn
    tokens, mask, logp = (np.asarray(x) for x in (out.tokens_bgr, out.mask_bgr, out.logp_bgr))
    lengths = set()
    for row, keep, value in zip(tokens.reshape(-1, R), mask.reshape(-1, R), logp.reshape(-1, R), strict=True):
        stops = np.flatnonzero(np.isin(row, tiny.STOPS) & keep)
        length = stops[0] + 1 if len(stops) else R
        np.testing.assert_array_equal(keep, np.arange(R) < length)
        assert (row[length:] == tiny.PAD).all() and not value[length:].any() and (value[:length] < 0).all()
        lengths.add(length)
    assert len(lengths) > 1  # the case is not trivial


def test_banned_tokens_are_never_sampled(params):
    prompt, vis = tiny.prompts(b=3)
    out = sampler(temperature=50.0, stop_ids=())(params, vis, prompt, keys(g=16))
    assert np.asarray(out.mask_bgr).all()
    assert not np.isin(out.tokens_bgr, tiny.BANNED).any()
    assert len(np.unique(out.tokens_bgr)) > 20


def test_stop_at_the_first_token_never_and_on_the_last_slot(params):
    prompt, vis = tiny.prompts()
    free = sampler(temperature=0.0, stop_ids=(), max_new=4)(params, vis, prompt, keys(g=1))
    greedy = np.asarray(free.tokens_bgr)[:, 0]
    assert np.asarray(free.mask_bgr).all()
    everything = tuple(i for i in range(tiny.VOCAB) if i not in tiny.BANNED)
    first = sampler(temperature=0.0, stop_ids=everything)(params, vis, prompt, keys(g=1))
    np.testing.assert_array_equal(np.asarray(first.mask_bgr).sum(-1), 1)
    np.testing.assert_array_equal(first.tokens_bgr[:, 0, 0], greedy[:, 0])
    row = next((i for i in range(3) if greedy[i, 3] not in greedy[i, :3]), None)
    if row is not None:
        last = sampler(temperature=0.0, stop_ids=(int(greedy[row, 3]),), max_new=4)(params, vis, prompt, keys(g=1))
        assert np.asarray(last.mask_bgr)[row].all()
        np.testing.assert_array_equal(last.tokens_bgr[row, 0], greedy[row])
    for out in (first, free):
        got = score(params, vis, prompt, out)
        np.testing.assert_allclose(got, out.logp_bgr, atol=1e-5)


def test_greedy_is_the_argmax_and_ignores_keys(params):
    prompt, vis = tiny.prompts()
    run = sampler(temperature=0.0)
    out, again = run(params, vis, prompt, keys(g=2)), run(params, vis, prompt, keys(step=5, g=2))
    np.testing.assert_array_equal(out.tokens_bgr, again.tokens_bgr)
    np.testing.assert_array_equal(out.tokens_bgr[:, 0], out.tokens_bgr[:, 1])
    z = tiny.replicated_logits(params, vis, prompt, out.tokens_bgr, out.mask_bgr)
    z[..., list(tiny.BANNED)] = -np.inf
    keep = np.asarray(out.mask_bgr)
    np.testing.assert_array_equal(z.argmax(-1)[keep], np.asarray(out.tokens_bgr)[keep])


def test_one_new_token_needs_no_decoding(params):
    prompt, vis = tiny.prompts()
    out = sampler(max_new=1)(params, vis, prompt, keys())
    assert out.tokens_bgr.shape == (3, G, 1)
    np.testing.assert_allclose(score(params, vis, prompt, out), out.logp_bgr, atol=1e-5)


def test_rollouts_do_not_depend_on_the_rest_of_the_batch(params):
    prompt, vis = tiny.prompts()
    whole = sampler()(params, vis, prompt, keys())
    order = jnp.array([2, 0])
    some = dataclasses.replace(jax.tree.map(lambda x: x[order], prompt), pos_3bp=prompt.pos_3bp[:, order])
    part = sampler()(params, vis[order], some, keys(ids=(13, 11)))
    np.testing.assert_array_equal(part.tokens_bgr, whole.tokens_bgr[order])
    np.testing.assert_allclose(part.logp_bgr, whole.logp_bgr[order], atol=1e-5)
    fewer = sampler()(params, vis, prompt, keys(g=2))
    np.testing.assert_array_equal(fewer.tokens_bgr, whole.tokens_bgr[:, :2])


def test_keys_differ_by_step_sample_and_rollout():
    data = [jax.random.key_data(keys(step=s)).reshape(-1, 2) for s in (0, 1)]
    assert len({tuple(row) for row in np.concatenate(data)}) == 2 * 3 * G
    typed = rollout.rollout_keys(jax.random.key(7), 0, jnp.asarray((11, 12, 13)), G)
    np.testing.assert_array_equal(jax.random.key_data(typed), jax.random.key_data(keys()))


def test_sampling_follows_the_distribution(params):
    prompt, vis = tiny.prompts(b=1)
    out = sampler(max_new=1)(params, vis, prompt, keys(ids=(1,), g=4000))
    tokens, logp = np.asarray(out.tokens_bgr)[0, :, 0], np.asarray(out.logp_bgr)[0, :, 0]
    for token in np.unique(tokens):
        p, share = np.exp(logp[tokens == token][0]), (tokens == token).mean()
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-3


def test_top_k_and_top_p_keep_the_right_tokens():
    z = jnp.log(jnp.array([0.4, 0.05, 0.3, 0.05, 0.2]))
    kept = lambda **how: np.isfinite(rollout.filter_logits(z, **how)).tolist()  # noqa: E731
    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, False, True, False, False]
    assert kept(top_p=0.4) == [True, False, False, False, False]
    assert kept(top_p=0.41) == [True, False, True, False, False]
    assert kept(top_p=0.75, top_k=3) == [True, False, True, False, False]  # 0.4 + 0.3 is 78 % of the three
    assert kept(top_p=1e-6) == [True, False, False, False, False]


def test_filters_narrow_sampling_but_logprobs_stay_those_of_the_full_distribution(params):
    prompt, vis = tiny.prompts()
    out = sampler(top_k=1)(params, vis, prompt, keys())
    np.testing.assert_array_equal(out.tokens_bgr[:, 0], out.tokens_bgr[:, 1])
    np.testing.assert_allclose(score(params, vis, prompt, out), out.logp_bgr, atol=1e-5)


def test_padding_of_prompt_and_completion_changes_nothing(params, drawn):
    prompt, vis, out = drawn

    def pad(x, value=0):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)], constant_values=value)

    wide = dataclasses.replace(
        prompt, tokens_bp=pad(prompt.tokens_bp, 9), mask_bp=pad(prompt.mask_bp), pos_3bp=pad(prompt.pos_3bp),
        vis_index_bp=pad(prompt.vis_index_bp, -1),
    )
    long = Completions(pad(out.tokens_bgr, 9), pad(out.mask_bgr), pad(out.logp_bgr))
    got = score(params, vis, wide, long, 0.8)
    np.testing.assert_allclose(got[..., :R], out.logp_bgr, atol=1e-5)
    assert not np.asarray(got[..., R:]).any()


def test_gradients_reach_the_visual_tokens_through_the_shared_prefix(params, drawn):
    """And they equal those of a plain forward in which every rollout has its own copy of the prompt."""
    prompt, vis, out = drawn
    weights = jnp.asarray(np.random.default_rng(1).normal(size=out.logp_bgr.shape), jnp.float32)

    def shared(vis, params):
        model = qwen25_vl.bind(tiny.CONFIG, params)
        return (weights * rollout.score(model, vis, prompt, out, banned_ids=tiny.BANNED)).sum()

    def copies(vis, params):
        b, g, r = out.tokens_bgr.shape
        model = qwen25_vl.bind(tiny.CONFIG, params)
        rep = lambda x: jnp.repeat(x, g, axis=0)  # noqa: E731
        flat = dataclasses.replace(jax.tree.map(rep, prompt), pos_3bp=jnp.repeat(prompt.pos_3bp, g, axis=1))
        single = Completions(*(x.reshape(b * g, 1, r) for x in (out.tokens_bgr, out.mask_bgr, out.logp_bgr)))
        logp = rollout.score(model, rep(vis), flat, single, banned_ids=tiny.BANNED)
        return (weights.reshape(b * g, 1, r) * logp).sum()

    one, two = (jax.jit(jax.grad(f, (0, 1)))(vis, params) for f in (shared, copies))
    assert np.abs(one[0]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3), one, two)


def without(prompt, hole_bp):
    """The prompts whose masked holes never were there: kept columns moved up row by row, in numpy."""
    fields = {f.name: np.array(getattr(prompt, f.name)) for f in dataclasses.fields(prompt)}
    out = {name: x.copy() for name, x in fields.items()}
    for b, hole_p in enumerate(np.asarray(hole_bp)):
        keep = np.flatnonzero(fields["mask_bp"][b] & ~hole_p)
        for name in ("tokens_bp", "vis_index_bp"):
            out[name][b, : len(keep)] = fields[name][b, keep]
        out["pos_3bp"][:, b, : len(keep)] = fields["pos_3bp"][:, b, keep]
        out["mask_bp"][b] = np.arange(len(hole_p)) < len(keep)
    return type(prompt)(**{name: jnp.asarray(x) for name, x in out.items()})


HOLES = {
    "some": lambda p, is_vis: is_vis & ((p == 2) | (p == 4)),  # amid others, and the last of all
    "first": lambda p, is_vis: is_vis & (p == 1),
    "all": lambda p, is_vis: is_vis,  # a blind prompt
}


@pytest.mark.parametrize("kind", HOLES)
def test_empty_visual_slots_are_as_if_they_were_not_there(params, kind):
    """Same tokens, log-probabilities and gradients; what lies in an empty slot does not matter."""
    prompt, vis = tiny.prompts()
    hole_bp = HOLES[kind](np.arange(prompt.mask_bp.shape[1]), np.asarray(prompt.vis_index_bp) >= 0)
    holed = dataclasses.replace(prompt, mask_bp=prompt.mask_bp & ~hole_bp)
    closed, plain = rollout.closed_up(holed), without(prompt, hole_bp)
    for f in dataclasses.fields(prompt):
        got, want = np.asarray(getattr(closed, f.name)), np.asarray(getattr(plain, f.name))
        real = np.asarray(plain.mask_bp) if got.ndim > 1 and f.name != "mask_bp" else True
        np.testing.assert_array_equal(np.where(real, got, 0), np.where(real, want, 0))
    out, want = (sampler()(params, vis, p, keys()) for p in (holed, plain))
    np.testing.assert_array_equal(out.tokens_bgr, want.tokens_bgr)
    np.testing.assert_allclose(out.logp_bgr, want.logp_bgr, atol=1e-5)
    np.testing.assert_allclose(score(params, vis, holed, out), out.logp_bgr, atol=1e-5)
    loss = lambda v, p: score(params, v, p, out).sum()  # noqa: E731
    gradient, expected = (jax.grad(loss)(vis, p) for p in (holed, plain))
    np.testing.assert_allclose(gradient, expected, atol=2e-4, rtol=1e-3)
    assert (np.abs(gradient).max() > 1e-4) == (kind != "all")


def test_prompts_without_holes_stay_as_they_are():
    prompt, _ = tiny.prompts()
    jax.tree.map(np.testing.assert_array_equal, rollout.closed_up(prompt), prompt)


@pytest.mark.parametrize("bad", [{"max_new": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**({"max_new": 2, "stop_ids": (), "pad_id": 0} | bad))


def test_a_stop_token_cannot_be_banned():
    with pytest.raises(ValueError, match="stop"):
        Sampling(max_new=2, stop_ids=(1, 2), pad_id=0, banned_ids=(2,))
