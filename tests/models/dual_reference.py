"""References of the dual encoders, torch on CPU in float32, every parameter re-drawn, and the same weights in our tree.

PE-Core: facebookresearch/perception_models on the path (`core.vision_encoder`; needs timm, einops, ftfy, regex).
SigLIP 2: transformers. Norms and biases left at 1 and 0 would hide mapping errors.
"""

import numpy as np


def redraw(model, seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            norm = p.ndim == 1 and name.endswith("weight")
            small = p.ndim < 2 or "embedding" in name or "probe" in name
            p.copy_(1 + 0.2 * z if norm else 0.1 * z if p.ndim < 2 else 0.5 * z if small else
                    z * 0.9 / np.prod(p.shape[1:]) ** 0.5)
    return model.float().eval()


def meta_model(cfg, seed=0):
    """perception_models' CLIP of this config."""
    from core.vision_encoder.config import PEConfig, PETextConfig
    from core.vision_encoder.pe import CLIP

    i, t = cfg.image, cfg.text
    image = PEConfig(
        patch_size=i.patch, width=i.width, layers=i.layers, heads=i.heads, mlp_ratio=(i.mlp_width + 1e-6) / i.width,
        output_dim=cfg.output, image_size=i.size, use_cls_token=cfg.class_token, attn_pooler_heads=cfg.pool_heads,
    )  # fmt: skip
    text = PETextConfig(t.context, t.width, t.heads, t.layers, cfg.output, vocab_size=t.vocab)
    return redraw(CLIP(image, text), seed)


def siglip_model(cfg, seed=0):
    from transformers import SiglipConfig, SiglipModel

    i, t = cfg.image, cfg.text
    image = {"hidden_size": i.width, "num_hidden_layers": i.layers, "num_attention_heads": i.heads,
             "intermediate_size": i.mlp_width, "image_size": i.size, "patch_size": i.patch}  # fmt: skip
    text = {"hidden_size": t.width, "num_hidden_layers": t.layers, "num_attention_heads": t.heads,
            "intermediate_size": t.mlp_width, "vocab_size": t.vocab, "max_position_embeddings": t.context,
            "projection_size": cfg.output, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
    return redraw(SiglipModel(SiglipConfig(text_config=text, vision_config=image)), seed)


def tensors(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items() if "position_ids" not in name}


def ours(cfg, found):
    """Our parameters from a state dict, through the name table."""
    from marc_jax.models import clip_weights

    form = clip_weights.match(cfg, {name: t.shape for name, t in found.items()})
    return clip_weights.assemble(cfg, form, found.__getitem__, lambda path, shape, piece: piece(()))
