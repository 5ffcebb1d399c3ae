"""The rows of tools.bench.efficiency with transformers (PyTorch): a JSON line per row, all so far.

    python -m tools.bench.efficiency_transformers --size=3b --video=FILE --rows=128x1,768x1

The same frames, read and cut into patches by our reader: what differs is the model. sdpa attention, eager, random
bfloat16 weights. Per row, in milliseconds: "vision" (the tower alone), "first" (`generate` of one token, upload of the
pixels included), "per_token"; "peak_bytes" of the allocator. The cheapest rows come first; a row is told once it has
each figure once, and again when they are medians, so that a run that is stopped leaves what it has.
"""

import argparse
import functools
import sys
import time

import jax
import torch

from data_pipelines.patches import PATCH_MEAN, PATCH_STD
from marc_jax.models import qwen25_vl
from tools.bench import model as shapes
from tools.bench import reference
from tools.bench.efficiency_stages import Host, Row
from tools.bench.model_transformers import NEW, inputs_of, load, timed

LONG = 1000.0  # milliseconds of a first token from which one measurement after a warm-up has to do
FEW = 8  # tokens of the first measurement of decoding


@torch.inference_mode()
def measure(cfg, net, video: str, row: Row, device: str):
    """Yields the row: quickly, then with medians."""
    host = Host(video, Row(row.cap, 1, row.frames))
    (pixels,), grid = host.patchify(host.read_resized())
    case = shapes.Case(row.key, "", "first", 0, s=len(pixels), grid=grid, batch=row.batch)
    inputs = inputs_of(cfg, case, device)
    pixels = torch.from_numpy(pixels.reshape(-1, pixels.shape[-1])).repeat(row.batch, 1)
    mean, std = (torch.from_numpy(x).to(device) for x in (PATCH_MEAN, PATCH_STD))

    def seen():
        return ((pixels.to(device).float() / 255 - mean) / std).to(torch.bfloat16)

    def generate(count):
        given = inputs | {"pixel_values_videos": seen()}
        return net.generate(**given, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def figures(new: int, repeats: int, warmup: int) -> dict:
        first = timed(lambda: generate(1), repeats, device, warmup=warmup)
        many = timed(lambda: generate(1 + new), repeats, device, warmup=0)
        vision = timed(lambda: net.model.visual(seen(), grid_thw=inputs["video_grid_thw"]), repeats, device, warmup=0)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        per_token = max(0.0, many - first) / new
        return {"vision": vision, "first": first, "per_token": per_token, "peak_bytes": peak, "repeats": repeats}

    quick = figures(FEW, 1, 1)
    yield quick
    if quick["first"] < LONG:
        yield figures(NEW, 3, 0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--video", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--frames", type=int, default=64)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # lays out prompts, and must not take the GPU's memory
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    rows = [Row(*map(int, row.split("x")), args.frames) for row in args.rows.split(",")]
    begun = time.perf_counter()
    print("transformers: imported; loading", file=sys.stderr, flush=True)
    net = load(cfg, device)
    print(f"transformers: loaded in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.cap * row.batch)
    reference.report(
        (row.key, row.key, functools.partial(measure, cfg, net, args.video, row, device)) for row in rows
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
