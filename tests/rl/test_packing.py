"""Packed rows: which sequences lie together, and that loss and gradients are those of the same rows on their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax import optim, sharding, state
from marc_jax.models import attention, qwen25_vl
from marc_jax.rl import packing, step
from marc_jax.rl.types import PromptBatch
from tests.rl import tiny_model as tiny

B, S, R = 2, 4, 5  # rows, places in each, tokens behind a prompt
TX = optax.sgd(1.0)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 64), st.integers(1, 6))
def test_every_sequence_lies_in_one_row_that_holds_it(lengths, most, segments):
    rows = packing.best_fit_decreasing(lengths, most, segments)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < len(row) <= segments and sum(lengths[i] for i in row) <= most for row in rows)
    firsts = [row[0] for row in rows]
    assert [lengths[i] for i in firsts] == sorted((lengths[i] for i in firsts), reverse=True)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4))
def test_a_row_is_opened_only_where_no_other_has_room(lengths, segments):
    """Best fit, decreasing, by its definition: all open rows looked at for every sequence."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [(30 - sum(lengths[j] for j in row), n) for n, row in enumerate(rows) if len(row) < segments]
        fits = [pair for pair in free if pair[0] >= lengths[i]]
        if fits:
            rows[min(fits)[1]].append(i)
        else:
            rows.append([i])
    assert packing.best_fit_decreasing(lengths, 30, segments) == [tuple(row) for row in rows]


def test_a_length_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"lengths 3 to 9 do not lie within 1\.\.8"):
        packing.best_fit_decreasing([3, 9], 8, 4)


def encode(model, features_bnv, prompt):
    """Four features make a visual token; of some videos one is not read, a hole in the prompt."""
    hole_bp = (prompt.vis_index_bp == 2) & (features_bnv[:, 0, :1] > 0)
    return model.merge_features(features_bnv), dataclasses.replace(prompt, mask_bp=prompt.mask_bp & ~hole_bp)


@pytest.fixture(scope="module")
def case():
    """(batch, state): B x S questions about a video each, of unlike length; the last place of all is free."""
    prompt, _ = tiny.prompts(b=B * S)
    rng, real = np.random.default_rng(3), np.arange(B * S)[:, None] < B * S - 1
    prompt = dataclasses.replace(prompt, mask_bp=prompt.mask_bp & real)
    features = rng.normal(size=(B * S, 16, tiny.CONFIG.vision.hidden_size)).astype(np.float32)
    mask = (np.arange(R) < rng.integers(2, R + 1, (B * S, 1, 1))) & real[..., None]
    train = mask & (np.arange(R) >= rng.integers(0, 3, (B * S, 1, 1)))
    tokens = rng.integers(7, tiny.VOCAB, (B * S, 1, R)).astype(np.int32)
    batch = step.SFTBatch(prompt, features, tokens, mask, train)
    trainable, frozen = optim.partition(tiny.params(), ("text/.*", "vision/merger/.*"))
    return jax.tree.map(jnp.asarray, batch), state.create(TX, trainable, frozen, key=jax.random.key(0))


def lengths(batch):
    """Tokens of each row, and its tokens that are trained on."""
    holes = np.asarray(batch.visual[:, 0, 0] > 0) & np.asarray(batch.prompt.mask_bp.any(1))
    own = np.asarray(batch.prompt.mask_bp.sum(1) + batch.mask_bgr.sum((1, 2))) - holes
    return own.reshape(B, S).sum(1), np.asarray(batch.train_bgr).reshape(B, -1).sum(1)


def packed(batch, **how):
    length, targets = (int(x.max()) for x in lengths(batch))
    make = step.make_packed_sft_step
    return make(tiny.CONFIG, encode, TX, segments=S, max_length=length, targets=targets, **how)


@pytest.fixture(scope="module")
def alone(case):
    """What the same rows give that are not packed."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(step.make_sft_step(tiny.CONFIG, encode, TX))(case[1], case[0])


def same(got, wanted):
    """Loss, metrics and the gradients of everything that trains (the step is 1.0 of plain descent)."""
    for name, value in wanted[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, err_msg=name)
    for path, value in wanted[0].params.items():
        np.testing.assert_allclose(got[0].params[path], value, atol=1e-5, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("how", [{}, {"micro_batches": 2, "chunk": 3}], ids=str)
def test_packed_rows_give_the_loss_and_gradients_of_rows_on_their_own(case, alone, how):
    batch, first = case
    with jax.default_matmul_precision("highest"):
        got = jax.jit(packed(batch, **how))(first, batch)
    same(got, alone)
    real, places = got[1]["packed_fill"]
    rows, _ = lengths(batch)
    assert real == rows.sum() and places == B * rows.max() < B * S * (batch.prompt.tokens_bp.shape[1] + R)


def test_the_cudnn_kernels_arguments_give_the_same(case, alone, plain_cudnn):
    with jax.default_matmul_precision("highest"):
        same(jax.jit(packed(case[0], attention="cudnn"))(case[1], case[0]), alone)
    assert plain_cudnn and all(q[1] % 64 == k[1] % 64 == 0 for q, k in plain_cudnn)


def test_the_mesh_changes_nothing(case, alone):
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    batch, first = case
    over = lambda x, axis=0: jax.device_put(x, sharding.batch(mesh, axis))  # noqa: E731
    fields = {f.name: getattr(batch.prompt, f.name) for f in dataclasses.fields(batch.prompt)}
    prompt = PromptBatch(**{name: over(x, int(name == "pos_3bp")) for name, x in fields.items()})
    rest = jax.tree.map(over, dataclasses.replace(batch, prompt=None))
    first = jax.device_put(first, sharding.replicated(mesh))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(packed(batch, attention="splash"))(first, dataclasses.replace(rest, prompt=prompt))
    same(got, alone)


def test_for_a_gpu_the_kernel_takes_segments_and_causality(lowered_cudnn):
    """Forward and backward pass are lowered: one mask [b, 1, l, l] for all heads beside the kernel's own causal one."""
    q, k, v = (jax.ShapeDtypeStruct((2, 128, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    segment = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def total(q, k, v, segment):
        return attention.causal(q, k, v, segment > 0, "cudnn", segment).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v, segment)
    calls = [
        line for line in traced.lower(lowering_platforms=("cuda",)).as_text().splitlines() if "@__cudnn$fmha" in line
    ]
    assert len(calls) == 2 and all("tensor<2x1x128x128xbf16>" in line for line in calls)
    assert all("CAUSAL" in line for line in calls)


def test_a_segment_sees_itself_alone():
    """What another segment of the row holds changes nothing, to the bit; and a row of one segment is a plain row."""
    rng = np.random.default_rng(0)
    params, segment = tiny.params(), jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    model = qwen25_vl.bind(tiny.CONFIG, params)
    tokens = jnp.asarray(rng.integers(7, tiny.VOCAB, (1, 8)))
    pos = jnp.broadcast_to(jnp.asarray([0, 1, 2, 0, 1, 2, 3, 0]), (3, 1, 8))
    run = jax.jit(lambda tokens: model.prefill_packed(model.embed(tokens), pos, segment))
    other = run(tokens.at[0, 1].add(1))
    np.testing.assert_array_equal(run(tokens)[0, 3:7], other[0, 3:7])
    assert (run(tokens)[0, 1:3] != other[0, 1:3]).any()
    plain, _ = model.prefill(model.embed(tokens[:, 3:7]), pos[:, :, 3:7], jnp.ones((1, 4), bool))
    np.testing.assert_allclose(run(tokens)[0, 3:7], plain[0], atol=1e-5)
