"""What the tower's last full-attention block looks at, against plain numpy; and that looking changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from marc_jax.models import qwen25_vl, rope, vision


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("grid", [(4, 4), (10, 14)])
def test_attention_received_and_keys(grid):
    cfg = qwen25_vl.tiny(vision_depth=4, fullatt_block_indexes=(1, 3))
    params = qwen25_vl.init(cfg, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], 1176)).astype(np.float32)
    model = qwen25_vl.bind(cfg, params)
    with jax.default_matmul_precision("highest"):
        tokens, watched = jax.jit(lambda x: model.watched_vision(x, grid))(x)
        np.testing.assert_allclose(tokens, jax.jit(lambda x: model.vision(x, grid))(x), atol=1e-6)
        # The tower without its last block gives that block's input, in merge-block-major order.
        short = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, depth=3, fullatt_block_indexes=(1,)))
        blocks = params["vision"]["blocks"]
        cut = params | {"vision": params["vision"] | {"blocks": jax.tree.map(lambda w: w[:3], blocks)}}
        before = np.asarray(qwen25_vl.bind(short, cut).vision_features(x, grid), np.float64)
    last = jax.tree.map(lambda w: np.asarray(w[3], np.float64), blocks)
    normed = before / np.sqrt((before**2).mean(-1, keepdims=True) + 1e-6) * last["norm1"]["scale"]
    qkv = normed @ last["attn"]["qkv"]["kernel"] + last["attn"]["qkv"]["bias"]
    heads = cfg.vision.num_heads
    q, k, _ = np.moveaxis(qkv.reshape(2, len(x[0]), 3, heads, -1), 2, 0)
    one = vision.windows(grid, 2, 100)  # a single window: merge-block-major order
    tables = rope.vision_cos_sin(one.rows, one.cols, q.shape[-1])
    turn = lambda a: np.asarray(rope.rotate(a.astype(np.float32), *tables), np.float64)  # noqa: E731
    weights = softmax(np.einsum("sqmh,skmh->smqk", turn(q), turn(k)) * q.shape[-1] ** -0.5)
    received = weights.mean((1, 2)).reshape(2, -1, 4).mean(2)
    np.testing.assert_allclose(watched.received_sp, received, rtol=1e-4)
    np.testing.assert_allclose(watched.received_sp.mean(1), 1 / len(x[0]), rtol=1e-5)
    np.testing.assert_allclose(watched.key_sph, k.mean(2).reshape(2, -1, 4, k.shape[-1]).mean(2), atol=1e-5)


def test_a_tower_of_windows_alone_has_nothing_to_look_at():
    cfg = qwen25_vl.tiny(fullatt_block_indexes=())
    model = qwen25_vl.bind(cfg, qwen25_vl.init(cfg, jax.random.key(0)))
    with pytest.raises(ValueError, match="no block of the vision tower has full attention"):
        model.watched_vision(np.zeros((1, 140, 1176), np.float32), (10, 14))
