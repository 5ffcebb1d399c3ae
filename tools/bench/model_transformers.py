"""The rows of tools.bench.model measured with transformers (PyTorch): a JSON line per row, case -> ms, all so far.

    python -m tools.bench.model_transformers --size=3b --mode=eager

sdpa attention, random bfloat16 weights; `--mode=compiled` decodes with a static cache under torch.compile, as
`generate(cache_implementation="static")` does. A prompt's visual tokens come from its own pixels, as a user's would.
"""

import argparse
import sys

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from marc_jax.models import qwen25_vl, weights
from tools.bench import model as bench
from tools.bench import reference, timing

NEW = 32  # tokens per decoding measurement; eager decoding takes tens of milliseconds each


def load(cfg, device):
    """The model with random weights, made on the device."""
    config = Qwen2_5_VLConfig(**weights.hf_config(cfg, "bfloat16"))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        net = Qwen2_5_VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = 0
    return net.eval()


def inputs_of(cfg, case, device):
    """Prompt tokens, their kinds, pixels and grid of `case`, one row per completion."""
    prompt = bench.prompt_of(cfg, case)
    length = int(np.asarray(prompt.mask_bp)[0].sum())
    rows = case.batch * case.group
    tokens = torch.from_numpy(np.asarray(prompt.tokens_bp)[:1, :length].copy()).long().repeat(rows, 1).to(device)
    kinds = torch.from_numpy(np.where(np.asarray(prompt.vis_index_bp)[:1, :length] >= 0, 2, 0)).repeat(rows, 1)
    n = case.grid[0] * case.grid[1]
    pixels = torch.randn(rows * case.s * n, cfg.vision.patch_dim, device=device, dtype=torch.bfloat16)
    grid = torch.tensor([[case.s, *case.grid]] * rows, device=device)
    return {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": kinds.int().to(device),
        "pixel_values_videos": pixels, "video_grid_thw": grid,
        "second_per_grid_ts": torch.ones(rows, device=device),
    }


def timed(run, repeats: int, device, warmup: int = 2) -> float:
    """Median milliseconds after so many calls to warm up."""
    wait = lambda _: torch.cuda.synchronize() if device == "cuda" else None  # noqa: E731
    return timing.median_ms(run, repeats, warmup=warmup, wait=wait)


@torch.inference_mode()
def measure(cfg, net, case, mode: str, repeats: int, device: str) -> float:
    full = inputs_of(cfg, case, device)
    static = {"cache_implementation": "static"} if mode == "compiled" else {}
    if case.kind == "vision":
        pixels, grid = full["pixel_values_videos"], full["video_grid_thw"]
        return timed(lambda: net.model.visual(pixels, grid_thw=grid), repeats, device)
    if case.kind == "prefill":
        rows = torch.randn(*full["input_ids"].shape, cfg.text.hidden_size, device=device, dtype=torch.bfloat16)
        decoder = net.model.language_model
        return timed(lambda: decoder(inputs_embeds=rows, use_cache=True), repeats, device)

    def generate(count):
        return net.generate(**full, max_new_tokens=count, min_new_tokens=count, do_sample=False, **static)

    if case.kind == "first":
        return timed(lambda: generate(1), repeats, device)
    few = timed(lambda: generate(2), 3, device)
    many = timed(lambda: generate(2 + NEW), 3, device)
    return (many - few) / NEW


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--rows", default="")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    net = load(cfg, device)
    kinds = ("decode", "first") if args.mode == "compiled" else ("vision", "prefill", "decode", "first")
    ours = [c for c in bench.CASES if c.kind in kinds and c.bits == 16 and c.layout != "plain"]
    chosen = [c for c in ours if not args.rows or c.key in args.rows.split(",")]
    reference.report(
        (c.key, f"{args.mode}, {c.title}", lambda c=c: [measure(cfg, net, c, args.mode, args.repeats, device)])
        for c in sorted(chosen, key=lambda c: c.visual_tokens * c.batch)
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
