"""Writes golden_qwen25_vl.npz: what transformers answers for weights and inputs drawn by numpy from a seed.

    python tests/models/make_golden.py        (needs torch and transformers; made with transformers 5.17.0)

The file holds answers only; `golden_case` redraws weights and inputs, so it stays small.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden_qwen25_vl.npz"
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "vocab_size": 310}
TEXT["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
VISION = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 20, "out_hidden_size": 32}
VISION["fullatt_block_indexes"] = [1]
GRID = (2, 10, 14)
QUESTION = [11, 12, 303, 306, 304, 13, 14, 15]


def golden_config():
    """Our config of the golden model."""
    from marc_jax.models.qwen25_vl import tiny

    return tiny(
        vocab_size=310,
        hidden_size=32,
        num_layers=2,
        intermediate_size=48,
        mrope_section=(1, 1, 2),
        tie_word_embeddings=False,
        vision_depth=3,
        vision_hidden_size=16,
        vision_intermediate_size=20,
        fullatt_block_indexes=(1,),
        video_token_id=306,
    )


def golden_case():
    """(published name -> tensor, patches [t, n, 1176], prompt) from numpy alone."""
    from marc_jax.models import weights
    from marc_jax.models.prompts import Visual, expand

    rng = np.random.default_rng(2025)
    tensors = {}
    for name, shape in weights.published_shapes(golden_config()).items():
        z = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            z *= np.float32(0.9 / np.prod(shape[1:]) ** 0.5)
        else:
            z = 0.1 * z if name.endswith("bias") else 1 + 0.2 * z
        tensors[name] = z.astype(np.float32)
    patches = rng.standard_normal((GRID[0], GRID[1] * GRID[2], 1176)).astype(np.float32)
    visual = Visual("video", (GRID[0], GRID[1] // 2, GRID[2] // 2), 1.5)
    return tensors, patches, expand(QUESTION, [visual], {"video": 306})


def main():
    import qwen_reference as reference
    import torch
    from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    tensors, patches, prompt = golden_case()
    config = reference.hf_config(text=TEXT, vision=VISION)
    config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    in_memory = {
        (name if name.startswith("lm_head") else "model." + name if name.startswith("visual") else
         name.replace("model.", "model.language_model.", 1)): torch.from_numpy(t)
        for name, t in tensors.items()
    }
    model.load_state_dict(in_memory, strict=True)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(prompt.tokens)[None].long(),
            attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.long),
            position_ids=torch.from_numpy(prompt.pos)[:, None].long(),
            pixel_values_videos=torch.from_numpy(patches.reshape(-1, 1176)),
            video_grid_thw=torch.tensor([GRID]),
        ).logits[0]
    text = logits[prompt.vis_index < 0].numpy()
    np.savez_compressed(FILE, visual=reference.hf_vision(model, [patches], [GRID])[0], logits=text)


if __name__ == "__main__":
    main()
