"""Writes golden_dual.npz: what the references answer for weights and inputs drawn by numpy from a seed.

    PYTHONPATH=tests python tests/models/make_golden_dual.py

Needs torch, transformers (made with 5.17.0) and facebookresearch/perception_models on the path. The file holds
answers only; `golden_case` redraws weights and inputs.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden_dual.npz"
CASES = ("pe_class", "pe_plain", "siglip2")


def golden_config(case):
    from marc_jax.models import perception_encoder, siglip2

    if case == "siglip2":
        return siglip2.tiny()
    return perception_encoder.tiny(class_token=case == "pe_class")


def golden_case(case):
    """(published name -> tensor, pixels [2, H, W, 3] in [-1, 1], tokens [2, 12])."""
    from marc_jax.models import clip_weights

    cfg = golden_config(case)
    rng = np.random.default_rng(2025)
    found = {}
    for name, shape in clip_weights.published_shapes(cfg, "siglip2" if case == "siglip2" else "meta").items():
        z = rng.standard_normal(shape)
        if name.endswith("weight") and len(shape) == 1:
            z = 1 + 0.2 * z
        else:
            z = 0.1 * z if len(shape) < 2 else z * 0.9 / np.prod(shape[1:]) ** 0.5
        found[name] = np.asarray(z, np.float32)
    height = 56 if case == "siglip2" else 84  # another grid than the table's: PE-Core interpolates
    pixels = rng.uniform(-1, 1, (2, height, 56, 3)).astype(np.float32)
    tokens = rng.integers(1, 88, (2, 12))
    tokens[0, 5], tokens[0, 6:], tokens[1, -1] = 89, 0, 89
    return found, pixels, tokens.astype(np.int32)


def main():
    import cpu_torchvision
    import dual_reference as reference
    import torch

    cpu_torchvision.load()
    answers = {}
    for case in CASES:
        found, pixels, tokens = golden_case(case)
        make = reference.siglip_model if case == "siglip2" else reference.meta_model
        model = make(golden_config(case))
        model.load_state_dict({name: torch.from_numpy(t) for name, t in found.items()}, strict=True)
        x, ids = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        with torch.no_grad():
            if case == "siglip2":
                out = model(input_ids=ids, pixel_values=x)
                answers[f"{case}_image"], answers[f"{case}_text"] = out.image_embeds.numpy(), out.text_embeds.numpy()
            else:
                answers[f"{case}_image"] = model.encode_image(x, normalize=True).numpy()
                answers[f"{case}_text"] = model.encode_text(ids, normalize=True).numpy()
    np.savez_compressed(FILE, **answers)


if __name__ == "__main__":
    main()
