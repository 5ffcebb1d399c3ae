"""The whole model against transformers: decoder variants, padding, mixed rows, tied heads, positions passed through."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the [parity] extra")
pytest.importorskip("transformers", reason="transformers is the [parity] extra")

import qwen_reference as reference  # noqa: E402

from marc_jax.models import qwen25_vl  # noqa: E402
from marc_jax.models.prompts import Visual, expand, pad_prompts  # noqa: E402

PADS = {"image": reference.IDS["image_token_id"], "video": reference.IDS["video_token_id"]}
VIDEO = [303, PADS["video"], 304]
IMAGE = [303, PADS["image"], 304]

ROWS = [
    ([11, 12, 13, *VIDEO, 21, 22, 23, 24], [(3, 10, 14)]),
    ([31, 32, *VIDEO, 33, *VIDEO, 34, 35, 36], [(2, 6, 18), (2, 4, 4)]),
    ([41, *IMAGE, 42, 43, *VIDEO, 44], [(1, 8, 4), (2, 16, 16)]),
    ([51, 52, 53, 54, 55, 56, 57, 58, 59], []),
]


def _prompt(ids, grids):
    kinds = [kind for i in ids for kind, pad in PADS.items() if i == pad]
    visuals = [Visual(k, (t, h // 2, w // 2), 1.5) for k, (t, h, w) in zip(kinds, grids, strict=True)]
    return expand(ids, visuals, PADS)


def _hf_logits(model, prompts, pixels, grids, left=False):
    """transformers' logits of a padded batch with explicit position ids; a list of [length, vocab] arrays."""
    longest = max(len(p.tokens) for p in prompts)
    tokens = np.full((len(prompts), longest), 300)
    mask, pos = np.zeros_like(tokens), np.zeros((3, *tokens.shape), int)
    spans = []
    for i, p in enumerate(prompts):
        n = len(p.tokens)
        at = slice(longest - n, longest) if left else slice(0, n)
        tokens[i, at], mask[i, at], pos[:, i, at] = p.tokens, 1, p.pos
        spans.append(at)
    kwargs = {}
    kind_of = [kind for ids, _ in ROWS for t in ids for kind, pad in PADS.items() if t == pad]
    for kind, pixel_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [i for i, k in enumerate(kind_of[: len(grids)]) if k == kind]
        if chosen:
            kwargs[pixel_name] = torch.from_numpy(np.concatenate([pixels[i].reshape(-1, 1176) for i in chosen]))
            kwargs[grid_name] = torch.tensor([grids[i] for i in chosen])
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(pos),
            **kwargs,
        )
    return [out.logits[i, at].numpy() for i, at in enumerate(spans)]


def _our_logits(cfg, params, prompts, pixels, rows):
    tower = jax.jit(lambda p, x, grid_hw: qwen25_vl.bind(cfg, p).vision(x, grid_hw), static_argnums=2)
    batch = pad_prompts(prompts, max(len(p.tokens) for p in prompts) + 3, 300)
    visual, at = [], 0
    for _, grids in rows:
        tokens = [
            np.asarray(tower(params, x, g[1:])).reshape(-1, cfg.text.hidden_size)
            for x, g in zip(pixels[at : at + len(grids)], grids, strict=True)
        ]
        visual.append(np.concatenate(tokens) if tokens else np.zeros((0, cfg.text.hidden_size), np.float32))
        at += len(grids)
    most = max(len(v) for v in visual)
    vis_bnd = np.stack([np.pad(v, ((0, most - len(v)), (0, 0))) for v in visual])

    def forward(params, vis_bnd):
        bound = qwen25_vl.bind(cfg, params)
        x = bound.embed(batch.tokens_bp, vis_bnd, batch.vis_index_bp)
        return bound.logits(bound.prefill(x, batch.pos_3bp, batch.mask_bp)[0])

    logits = np.asarray(jax.jit(forward)(params, vis_bnd))
    return [logits[i, : len(p.tokens)] for i, p in enumerate(prompts)]


@pytest.mark.parametrize("kv,tied,left", [(2, False, True), (1, True, False), (4, False, False)])
def test_logits_equal_transformers_on_a_mixed_batch(kv, tied, left):
    model = reference.hf_model(seed=3, text={"num_key_value_heads": kv}, tied=tied)
    cfg, params = reference.ours(model)
    assert cfg.text.tie_word_embeddings == tied and ("head" not in params["text"]) == tied
    grids = [g for _, row in ROWS for g in row]
    pixels = reference.patches(np.random.default_rng(3), grids)
    prompts = [_prompt(ids, row) for ids, row in ROWS]
    expected = _hf_logits(model, prompts, pixels, grids, left)
    with jax.default_matmul_precision("highest"):
        got = _our_logits(cfg, params, prompts, pixels, ROWS)
    for i, (g, want) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(g, want, atol=1e-5, rtol=1e-5, err_msg=f"row {i}")


def test_bfloat16_stays_close_to_float32():
    model = reference.hf_model(seed=4)
    cfg, params = reference.ours(model)
    (x,) = reference.patches(np.random.default_rng(4), [(2, 10, 14)])
    half = jax.tree.map(lambda w: w.astype(jax.numpy.bfloat16), params)


    def tower(params, dtype):
        run = jax.jit(lambda p: qwen25_vl.bind(cfg, p, dtype=dtype).vision(x, (10, 14)))
        return np.asarray(run(params), np.float32)

    full, low = tower(params, jax.numpy.float32), tower(half, jax.numpy.bfloat16)
    assert np.linalg.norm(low - full) < 2e-2 * np.linalg.norm(full)
