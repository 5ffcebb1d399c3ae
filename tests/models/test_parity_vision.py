"""The vision tower against transformers: windows of every kind, block patterns, locality, merge order."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is the [parity] extra")
pytest.importorskip("transformers", reason="transformers is the [parity] extra")

import qwen_reference as reference  # noqa: E402

from marc_jax.models import qwen25_vl  # noqa: E402

# Both axes not dividing; one short, one long; smaller than a window; dividing exactly (transformers' empty windows).
GRIDS = [(3, 10, 14), (2, 18, 6), (1, 4, 4), (2, 16, 16)]


def tower(cfg):
    return jax.jit(lambda p, x, grid_hw: qwen25_vl.bind(cfg, p).vision(x, grid_hw), static_argnums=2)


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"depth": 3, "fullatt_block_indexes": [0, 2]},
        {"depth": 3, "fullatt_block_indexes": [1]},
        {"depth": 2, "fullatt_block_indexes": []},
        {"depth": 2, "fullatt_block_indexes": [0, 1]},
        {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]},
    ],
    ids=["alternate", "first-and-last", "middle", "none-full", "all-full", "window-56"],
)
def test_tower_equals_transformers(vision):
    model = reference.hf_model(seed=1, vision=vision)
    cfg, params = reference.ours(model)
    grids = GRIDS[:2] if vision else GRIDS
    pixels = reference.patches(np.random.default_rng(0), grids)
    expected = reference.hf_vision(model, pixels, grids)
    run = tower(cfg)
    with jax.default_matmul_precision("highest"):
        for x, grid, want in zip(pixels, grids, expected, strict=True):
            got = run(params, x, grid[1:])
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=0, err_msg=str(grid))


def test_features_are_the_last_blocks_output_in_merge_block_order():
    model = reference.hf_model(seed=2)
    cfg, params = reference.ours(model)
    (x,) = reference.patches(np.random.default_rng(1), [(2, 6, 10)])
    captured = []
    model.model.visual.merger.register_forward_pre_hook(lambda _, args: captured.append(args[0].detach().numpy()))
    reference.hf_vision(model, [x], [(2, 6, 10)])
    import torch

    window_index, _ = _window_index(model, torch.tensor([[2, 6, 10]]))
    blocks = captured[0].reshape(-1, 4, captured[0].shape[-1])
    expected = blocks[np.argsort(window_index)].reshape(2, 60, -1)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda p: qwen25_vl.bind(cfg, p).vision_features(x, (6, 10)))(params)
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
        merged = jax.jit(lambda p: qwen25_vl.bind(cfg, p).merge_features(got))(params)
        np.testing.assert_allclose(merged, tower(cfg)(params, x, (6, 10)), atol=1e-6)


def _window_index(model, grid_thw):
    import torch

    visual = model.model.visual
    if hasattr(visual, "get_window_index"):
        index, cu = visual.get_window_index(grid_thw)
    else:
        import inspect

        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as module

        find = getattr(module, "get_vision_window_index", None)
        if find is None:
            pytest.skip("this transformers does not expose its window index")
        wanted = {"grid_thw": grid_thw, "spatial_merge_size": visual.spatial_merge_size}
        wanted |= {"window_size": visual.window_size, "patch_size": visual.patch_size}
        index, cu = find(**{k: v for k, v in wanted.items() if k in inspect.signature(find).parameters})
    return torch.as_tensor(index).numpy(), cu


def test_a_temporal_patch_does_not_see_the_others():
    cfg = qwen25_vl.tiny(vision_depth=4)
    run, params = tower(cfg), qwen25_vl.init(cfg, jax.random.key(0))
    (x,) = reference.patches(np.random.default_rng(2), [(5, 10, 14)])
    whole = np.asarray(run(params, x, (10, 14)))
    alone = np.asarray(run(params, x[2:3], (10, 14)))
    np.testing.assert_allclose(whole[2:3], alone, atol=1e-6)
