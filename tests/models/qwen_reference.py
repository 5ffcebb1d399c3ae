"""The reference: tiny random Qwen2.5-VL of transformers (torch, CPU, float32), and the same weights in our tree.

Every parameter is re-drawn: norms and biases initialised to 1 and 0 would hide mapping errors.
"""

import numpy as np

IDS = {"vision_start_token_id": 303, "vision_end_token_id": 304, "image_token_id": 305, "video_token_id": 306}


def hf_config(*, text=None, vision=None, tied=False):
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig

    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": 300,
        "eos_token_id": 301,
        "pad_token_id": 300,
        "use_sliding_window": False,
    } | (text or {})
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 44,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "in_chans": 3,
    } | (vision or {})
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **IDS)


def hf_model(seed=0, **overrides):
    """transformers' model with every parameter re-drawn from this seed, in eval mode and float32."""
    import torch
    from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    config = hf_config(**overrides)
    config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            norm = p.ndim == 1 and "bias" not in name
            p.copy_(1 + 0.2 * z if norm else 0.1 * z if "bias" in name else z * 0.9 / p[0].numel() ** 0.5)
    return model


def ours(model):
    """(Config, params) of a transformers model, through the name table."""
    from marc_jax.models import weights
    from marc_jax.models.qwen25_vl import config_from_hf

    cfg = config_from_hf(model.config.to_dict())
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    names = weights.match(cfg, {name: p.shape for name, p in state.items()})
    params = weights.assemble(cfg, lambda name: state[names[name]], lambda path, shape, piece: piece(()))
    return cfg, params


def patches(rng, grids):
    """Random pixel rows for grids [(t, h, w)], one [t, h*w, 1176] array each."""
    return [rng.standard_normal((t, h * w, 1176)).astype(np.float32) for t, h, w in grids]


def hf_vision(model, pixels, grids):
    """transformers' merged tokens, one [t, h*w/4, D] array per grid, and the last hidden states in window order."""
    import torch

    flat = torch.from_numpy(np.concatenate([p.reshape(-1, p.shape[-1]) for p in pixels]))
    with torch.no_grad():
        out = model.model.visual(flat, grid_thw=torch.tensor(grids))
    merged = out.pooler_output.numpy() if hasattr(out, "pooler_output") else out.numpy()
    sizes = np.cumsum([t * h * w // 4 for t, h, w in grids])[:-1]
    return [m.reshape(g[0], -1, m.shape[-1]) for m, g in zip(np.split(merged, sizes), grids, strict=True)]
