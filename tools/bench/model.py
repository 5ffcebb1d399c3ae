"""Speed of the model on one GPU: vision tower, prefill, first token, decode; each beside its floor and its peer.

    python -m tools.bench.model --size=3b --peer=eager --out=model.json

Random weights, bfloat16. A floor is the larger of FLOPs over --tflops and bytes over --tbps, both measured on the chip
(defaults: an H200's). Times are medians after a warm-up, host dispatch included. `--peer` runs transformers (PyTorch)
on the same shapes in a process of its own, before ours, so that neither holds the other's memory.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.models import qwen25_vl
from marc_jax.models.prompts import Prompt, Visual, pad_prompts, visual_positions
from marc_jax.rl import rollout
from tools.bench import profile, reference, timing

TEXT_TOKENS = 122  # of every prompt, around its visual tokens
NEW = 128  # tokens decoded per measurement


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: S temporal patches of grid (h, w) patches, or a prompt over so many visual tokens.

    Attributes:
      key: for --rows.
      kind: "vision", "prefill", "first" or "decode".
      goal: milliseconds to reach on one H200.
      s, grid: temporal patches, patches per side.
      batch, group: prompts, and completions of each.
      layout: "plain" (stacked layers) or "packed".
      bits: of the decoder's weights.
    """

    key: str
    title: str
    kind: str
    goal: float
    s: int
    grid: tuple[int, int]
    batch: int = 1
    group: int = 1
    layout: str = "packed"
    bits: int = 16

    @property
    def visual_tokens(self) -> int:
        return self.s * self.grid[0] * self.grid[1] // 4


LONG, SHORT, CAP = dict(s=32, grid=(18, 18)), dict(s=1, grid=(22, 22)), dict(s=32, grid=(54, 56))
CASES = (
    Case("vision", "vision tower, 64 frames", "vision", 35, **LONG),
    Case("prefill_long", "prefill, 2,714 tokens", "prefill", 28, **LONG),
    Case("prefill_long_plain", "prefill, 2,714 tokens, stacked layers", "prefill", 28, **LONG, layout="plain"),
    Case("prefill_short", "prefill, 243 tokens", "prefill", 7, **SHORT),
    Case("prefill_short_plain", "prefill, 243 tokens, stacked layers", "prefill", 7, **SHORT, layout="plain"),
    Case("prefill_batch", "prefill, 2,714 tokens, batch 8", "prefill", 180, **LONG, batch=8),
    Case("first_long", "first token, 64 frames", "first", 75, **LONG),
    Case("first_short", "first token, one patch", "first", 12, **SHORT),
    Case("first_cap", "first token, 24,192 visual tokens", "first", 800, **CAP),
    Case("decode_1", "decode per token, batch 1", "decode", 2.0, **SHORT),
    Case("decode_8", "decode per token, G = 8, one patch", "decode", 2.2, **SHORT, group=8),
    Case("decode_8_long", "decode per token, G = 8, 64 frames", "decode", 2.3, **LONG, group=8),
    Case("decode_1_int8", "decode per token, batch 1, int8 weights", "decode", 2.0, **SHORT, bits=8),
    Case("decode_8_int8", "decode per token, G = 8, int8 weights", "decode", 2.2, **SHORT, group=8, bits=8),
)


def cost(cfg: qwen25_vl.Config, case: Case) -> tuple[float, float]:
    """(FLOPs, bytes that must be read) of one measurement, from the shapes alone."""
    t, v = cfg.text, cfg.vision
    per_layer = t.hidden_size * (t.head_dim * 2 * (t.num_heads + t.num_kv_heads) + 3 * t.intermediate_size)
    decoder, head = t.num_layers * per_layer, t.hidden_size * t.vocab_size
    length = case.visual_tokens + TEXT_TOKENS
    n = case.grid[0] * case.grid[1]
    patches = case.s * n
    full = len(v.fullatt_block_indexes)
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    wide = 4 * v.hidden_size
    tower = v.depth * block + v.patch_dim * v.hidden_size + (wide * wide + wide * t.hidden_size) / 4
    attention = 2 * v.hidden_size * (full * n + (v.depth - full) * min(n, (v.window_size // v.patch_size) ** 2))
    vision = 2.0 * patches * (tower + attention), 2.0 * (tower + 0.75 * (wide * wide + wide * t.hidden_size))
    causal = 2.0 * length * length * t.num_heads * t.head_dim * t.num_layers
    prefill = case.batch * (2.0 * length * decoder + causal), 2.0 * decoder
    if case.kind == "vision":
        return vision
    if case.kind == "prefill":
        return prefill
    if case.kind == "first":
        return vision[0] + prefill[0] + 2.0 * head, vision[1] + prefill[1] + 2.0 * head
    keys = (length + case.group * NEW / 2) * t.num_layers * 2 * t.num_kv_heads * t.head_dim * 2
    return 2.0 * case.group * (decoder + head), case.bits / 8 * (decoder + head) + keys


def prompt_of(cfg, case: Case):
    """A batch of equal prompts: text, the visual tokens, text; padded to a multiple of 64."""
    before = 15
    video = Visual("video", (case.s, case.grid[0] // 2, case.grid[1] // 2))
    rel, extent = visual_positions(video, "published", 2.0)
    after = TEXT_TOKENS - before
    text = [np.tile(np.arange(count), (3, 1)) for count in (before, after)]
    pos = np.concatenate([text[0], rel + before, text[1] + before + extent], 1)
    index = np.concatenate([np.full(before, -1), np.arange(case.visual_tokens), np.full(after, -1)]).astype(np.int32)
    tokens = np.where(index >= 0, cfg.video_token_id, np.random.default_rng(0).integers(7, 300, len(index)))
    one = Prompt(tokens.astype(np.int32), pos.astype(np.int32), index, before + extent + after)
    return jax.tree.map(jnp.asarray, pad_prompts([one] * case.batch, -(-len(tokens) // 64) * 64))


def build(cfg, case: Case, attention: str) -> tuple[Callable, Callable]:
    """(function of (params, inputs) to time, maker of its inputs from (params, key))."""
    bind = functools.partial(qwen25_vl.bind, cfg, dtype=jnp.bfloat16, attention=attention)
    prompt = prompt_of(cfg, case)
    patches = (case.s, case.grid[0] * case.grid[1], cfg.vision.patch_dim)

    def visual(key):
        return jax.random.normal(key, (case.batch, case.visual_tokens, cfg.text.hidden_size), jnp.bfloat16)

    if case.kind == "vision":
        return lambda p, x: bind(p).vision(x, case.grid), lambda p, key: jax.random.normal(key, patches, jnp.bfloat16)
    if case.kind == "prefill":
        return lambda p, x: rollout.prefill(bind(p), x, prompt), lambda p, key: visual(key)
    if case.kind == "first":

        def first(p, x):
            model = bind(p)
            tokens = model.vision(x, case.grid).reshape(1, -1, cfg.text.hidden_size)
            return model.logits(rollout.prefill(model, tokens, prompt).last_bd).argmax(-1)

        return first, lambda p, key: jax.random.normal(key, patches, jnp.bfloat16)
    how = rollout.Sampling(NEW + 1, (-1,), 0, temperature=0.0)
    keys = rollout.rollout_keys(0, 0, jnp.arange(case.batch), case.group)
    prefill = jax.jit(lambda p, x: rollout.prefill(bind(p), x, prompt))
    return lambda p, prefix: rollout.decode(bind(p), prefix, keys, how), lambda p, key: prefill(p, visual(key))


def measure(cfg, case: Case, params: dict, attention: str, repeats: int, top: int = 0) -> dict:
    """Compiles and times one case; the row as a dict."""
    function, make = build(cfg, case, attention)
    inputs = jax.block_until_ready(make(params, jax.random.key(1)))
    start = time.perf_counter()
    compiled = jax.jit(function).lower(params, inputs).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    times = timing.milliseconds(lambda: compiled(params, inputs), repeats, warmup=2)
    if top:
        print(profile.table(profile.kernels(lambda: compiled(params, inputs)), top), flush=True)
    per = NEW if case.kind == "decode" else 1
    out = {"ms": statistics.median(times) / per, "spread": (max(times) - min(times)) / per, "compile_s": seconds}
    out["hlo_lines"] = compiled.as_text().count("\n")
    out["temp_gib"] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**30
    return out


def line(case: Case, row: dict, floor: tuple[float, float], args, peer: float | None) -> str:
    flops, size = floor
    least = max(flops / args.tflops / 1e9, size / args.tbps / 1e9)
    seconds = row["ms"] / 1e3
    beside = f"{peer:9.2f} {peer / row['ms']:6.1f}x" if peer else f"{'-':>9} {'-':>7}"
    met = "yes" if row["ms"] <= case.goal else "NO"
    return (
        f"{case.title:42} {row['ms']:9.3f} +-{row['spread']:6.3f} {least:8.3f} {least / row['ms']:6.0%}"
        f" {case.goal:7.1f} {met:>4} {flops / seconds / 1e12:7.0f} {size / seconds / 1e9:7.0f}"
        f" {beside} {row['compile_s']:6.1f} {row['hlo_lines']:7d} {row['temp_gib']:6.2f}"
    )


HEADER = (
    f"{'case':42} {'ms':>9} {'spread':>8} {'floor':>8} {'share':>6} {'goal':>7} {'met':>4} {'TFLOP/s':>7} {'GB/s':>7}"
    f" {'peer ms':>9} {'faster':>7} {'comp s':>6} {'HLO':>7} {'GiB':>6}"
)


def peers(args) -> dict[str, float]:
    """Milliseconds of transformers by case, measured in a process of its own."""
    if args.peer == "none":
        return {}
    flags = [f"--size={args.size}", f"--mode={args.peer}", f"--rows={args.rows}"]
    return reference.measured("tools.bench.model_transformers", flags, args.peer_seconds)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--rows", default="", help=f"comma-separated, of: {','.join(c.key for c in CASES)}")
    parser.add_argument("--peer", choices=("none", "eager", "compiled"), default="none")
    parser.add_argument("--peer_seconds", type=float, default=600.0, help="stop it then, and use the rows it has")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list each case's N longest kernels")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tflops", type=float, default=790.0, help="measured bf16 rate of the chip")
    parser.add_argument("--tbps", type=float, default=4.3, help="measured memory bandwidth of the chip, TB/s")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    chosen = [c for c in CASES if not args.rows or c.key in args.rows.split(",")]
    beside = peers(args)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, Qwen2.5-VL {args.size}, random bfloat16 weights", flush=True)
    params = {"plain": qwen25_vl.init(cfg, jax.random.key(0), jnp.bfloat16)}
    for bits in (16, 8):
        if any(c.layout == "packed" and c.bits == bits for c in chosen):
            make = jax.jit(functools.partial(qwen25_vl.pack, cfg, bits=bits))
            params[bits] = jax.block_until_ready(make(params["plain"]))
    print(HEADER, flush=True)
    table = {}
    for case in chosen:
        tree = params["plain" if case.layout == "plain" else case.bits]
        try:
            row = measure(cfg, case, tree, args.attention, args.repeats, args.profile)
        except Exception as e:  # one row that fails must not cost the others' measurements
            print(f"{case.title:42} FAILED: {type(e).__name__}: {str(e)[:300]}", flush=True)
            continue
        floor = cost(cfg, case)
        peer = {"goal": case.goal, "peer_ms": beside.get(case.key)}
        table[case.key] = row | {"flops": floor[0], "bytes": floor[1]} | peer
        print(line(case, row, floor, args, beside.get(case.key)), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"device": device.device_kind, "jax": jax.__version__, "rows": table}, indent=1))
    return 0 if len(table) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
