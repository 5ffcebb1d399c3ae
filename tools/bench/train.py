"""Speed and memory of training steps on one GPU at published shapes, beside transformers (PyTorch) in the same call.

    python -m tools.bench.train --size=3b --peer --out=train.json

Rows: one C-GRPO update (forward, backward, clip, AdamW; vision frozen; one prompt shared by its group) on a compressed
and on a 64-frame prompt, the same with float32 master weights and moments, and a whole C-GRPO step with the share of
each phase. Random weights. Times are medians after a warm-up, host dispatch included. A floor is FLOPs over --tflops
plus the optimizer's bytes over --tbps (the update waits for the norm of the whole gradient, so they cannot overlap);
MFU is 6 N tokens over time and --tflops, a shared prompt counted once. `program` is the memory that the compiler
reserved (state, batch, temporaries), `peak` the allocator's peak_bytes_in_use up to the end of the row: rows run in
the order of their size, all compiled before the first state exists. `--peer` runs transformers on the same shapes in a
process of its own, before ours.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax import hardware, optim, state
from marc_jax.models import qwen25_vl
from marc_jax.rl import loss, rollout, step
from marc_jax.rl.types import Completions
from tools.bench import model as shapes
from tools.bench import profile, reference

GROUP = 8
TRAINABLE = ("text/.*",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      key: for --rows.
      goal: milliseconds to reach on one H200.
      view: the prompt, of `tools.bench.model`; its batch is the number of questions.
      masters: dtype of the trained parameters and of their moments; activations are bfloat16.
      remat: of `qwen25_vl.bind`.
      chunk: positions of all completions whose logits exist at once.
      peer: the row of transformers it is compared with, if any.
      new: tokens per completion.
    """

    key: str
    title: str
    goal: float
    view: shapes.Case
    masters: str = "bfloat16"
    remat: bool | str = "attention"
    chunk: int = 256
    peer: str = ""
    new: int = 256

    @property
    def prompt_tokens(self) -> int:
        return self.view.visual_tokens + shapes.TEXT_TOKENS


SHORT = shapes.Case("", "", "", 0, **shapes.SHORT)
LONG = shapes.Case("", "", "", 0, **shapes.LONG)
CASES = (
    Case("student", "student step, 8 x (243 + 256)", 120, SHORT, peer="student"),
    Case("student_kept", "student step, products kept", 120, SHORT, remat="products", peer="student"),
    Case("frames", "64-frame step, 8 x (2,714 + 256)", 300, LONG, peer="frames"),
    Case("student_fp32", "student step, fp32 masters", 120, SHORT, "float32"),
    Case("frames_fp32", "64-frame step, fp32 masters", 300, LONG, "float32"),
)
ROWS = (*(case.key for case in CASES), "whole")


def optimizer():
    """What both sides run: AdamW behind a clip of the global norm."""
    return optim.make(optim.Config(learning_rate=1e-6, schedule="constant", weight_decay=0.01), 1000)


def given(model, visual, prompt):
    """The `encode` of a step whose visual tokens are already there."""
    return visual, prompt


def sampling(cfg, new: int) -> rollout.Sampling:
    """Temperature 1; never stops, as random weights would stop anywhere."""
    banned = (cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id, cfg.vision_end_token_id)
    return rollout.Sampling(new, (-1,), cfg.pad_token_id, banned_ids=banned)


def batch_of(cfg, case: Case) -> step.GRPOBatch:
    """Random completions and advantages over the case's prompts; every completion token is real."""
    b, rng = case.view.batch, np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(7, 300, (b, GROUP, case.new)), jnp.int32)
    done = Completions(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.float32))
    visual = jnp.asarray(rng.normal(size=(b, case.view.visual_tokens, cfg.text.hidden_size)), jnp.bfloat16)
    gain_bg = jnp.asarray(rng.normal(size=(b, GROUP)), jnp.float32)
    return step.GRPOBatch(shapes.prompt_of(cfg, case.view), visual, done, gain_bg)


def state_of(cfg, tx, masters: str) -> state.TrainState:
    """The state before the first step: the decoder in `masters`, the frozen vision tower in bfloat16."""
    trainable, frozen = optim.partition(qwen25_vl.init(cfg, jax.random.key(0), jnp.dtype(masters)), TRAINABLE)
    return state.create(tx, trainable, jax.tree.map(_half, frozen), key=jax.random.key(0))


def abstract_state(cfg, tx, masters: str) -> state.TrainState:
    """Shapes of `state_of`."""
    trainable, frozen = optim.partition(qwen25_vl.abstract(cfg, jnp.dtype(masters)), TRAINABLE)
    return state.abstract(tx, trainable, {k: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for k, x in frozen.items()})


def _half(x):
    return x.astype(jnp.bfloat16)


def build(cfg, case: Case, tx, attention: str, config: loss.LossConfig | None = None, **jit):
    """The jitted update, by default without a reference; the new state takes the old one's memory."""
    config = config or loss.LossConfig(kl_coef=0.0)
    how = dict(chunk=case.chunk, dtype=jnp.bfloat16, attention=attention, remat=case.remat)
    return jax.jit(step.make_grpo_step(cfg, given, tx, sampling(cfg, case.new), config, **how), donate_argnums=0, **jit)


def cost(cfg, case: Case) -> tuple[float, float, float]:
    """(FLOPs of forward and backward, bytes of the optimizer's update, 6 N tokens), a shared prompt counted once."""
    t, b, p, r = cfg.text, case.view.batch, case.prompt_tokens, case.new
    layer = t.hidden_size * (t.head_dim * 2 * (t.num_heads + t.num_kv_heads) + 3 * t.intermediate_size)
    decoder, head = t.num_layers * layer, t.hidden_size * t.vocab_size
    tokens = b * (p + GROUP * r)
    pairs = b * (p * p / 2 + GROUP * r * p + GROUP * r * r / 2)
    attention = 4.0 * pairs * t.num_heads * t.head_dim * t.num_layers
    flops = 3 * (2.0 * tokens * decoder + 2.0 * b * GROUP * r * head + attention)
    size = jnp.dtype(case.masters).itemsize * 7.0 * (decoder + head)  # read p, g, m, v; write p, m, v
    return flops, size, 6.0 * (decoder + head) * tokens


def program_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh


def compile_case(cfg, case: Case, tx, args):
    """(compiled step, seconds); writes the compiled program where asked."""
    start = time.perf_counter()
    shape = jax.eval_shape(functools.partial(batch_of, cfg, case))
    lowered = build(cfg, case, tx, args.attention).lower(abstract_state(cfg, tx, case.masters), shape)
    out = lowered.compile(compiler_options=json.loads(args.options))
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
        (args.hlo / f"{case.key}.txt").write_text(out.as_text())
    return out, time.perf_counter() - start


def measure(cfg, case: Case, compiled, now: state.TrainState, args) -> tuple[state.TrainState, dict]:
    """Times the step, each on the state of the last; (state, row)."""
    batch, times = jax.block_until_ready(batch_of(cfg, case)), []
    for i in range(args.repeats + 2):
        start = time.perf_counter()
        now, metrics = jax.block_until_ready(compiled(now, batch))
        times += [(time.perf_counter() - start) * 1e3] if i >= 2 else []
    row = {"ms": statistics.median(times), "spread": max(times) - min(times), "program_bytes": program_bytes(compiled)}
    row |= {"loss": float(loss.mean(metrics["loss"])), "norm": float(metrics["grad_norm"])}
    row["peak_bytes"] = hardware.device_peak() or 0
    if args.profile:
        box = [now]

        def once():
            box[0], values = compiled(box[0], batch)
            return values

        print(profile.table(profile.kernels(once), args.profile), flush=True)
        now = box[0]
    return now, row


HEADER = (
    f"{'row':36} {'ms':>8} {'spread':>7} {'floor':>7} {'share':>6} {'goal':>5} {'met':>4} {'TFLOP/s':>7} {'MFU':>5}"
    f" {'peak GiB':>8} {'program':>8} {'peer ms':>8} {'peer GiB':>8} {'faster':>7} {'comp s':>6}"
)


def line(case: Case, row: dict, floor, peer: dict, args) -> str:
    flops, size, tokens6 = floor
    least, seconds = flops / args.tflops / 1e9 + size / args.tbps / 1e9, row["ms"] / 1e3
    beside = f"{'-':>8} {'-':>8} {'-':>7}"
    if peer:
        beside = f"{peer['ms']:8.1f} {peer['peak_bytes'] / 2**30:8.2f} {peer['ms'] / row['ms']:6.1f}x"
    return (
        f"{case.title:36} {row['ms']:8.1f} {row['spread']:7.1f} {least:7.1f} {least / row['ms']:6.0%} {case.goal:5.0f}"
        f" {'yes' if row['ms'] <= case.goal else 'NO':>4} {flops / seconds / 1e12:7.0f}"
        f" {tokens6 / seconds / args.tflops / 1e12:5.0%} {row['peak_bytes'] / 2**30:8.2f}"
        f" {row['program_bytes'] / 2**30:8.2f} {beside} {row['compile_s']:6.1f}"
    )


def peers(args) -> dict[str, dict]:
    """Rows of transformers by case, measured in a process of its own."""
    rows = {case.peer for case in CASES if case.peer and case.key in args.chosen}
    if not args.peer or not rows:
        return {}
    flags = [f"--size={args.size}", f"--rows={','.join(sorted(rows))}"]
    return reference.measured("tools.bench.train_transformers", flags, args.peer_seconds)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--rows", default="", help=f"comma-separated, of: {','.join(ROWS)}; all where empty")
    parser.add_argument("--peer", action="store_true", help="run transformers on the same shapes")
    parser.add_argument("--peer_seconds", type=float, default=120.0, help="stop it then, and use the rows it has")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="", help="of every row, in place of its own: one of layers.REMAT, or none")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list each row's N longest kernels")
    parser.add_argument("--options", default="null", help="compiler options of the update rows, as JSON")
    parser.add_argument("--hlo", type=pathlib.Path, help="folder for the compiled programs of the update rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tflops", type=float, default=790.0, help="measured bf16 rate of the chip")
    parser.add_argument("--tbps", type=float, default=4.3, help="measured memory bandwidth of the chip, TB/s")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    args.chosen = [key for key in ROWS if not args.rows or key in args.rows.split(",")]
    return args


def attempt(title: str, function, *args):
    """function(*args), or None and its error, shortened: a row that fails must not cost the others' numbers."""
    try:
        return function(*args)
    except Exception as e:
        print(f"{title:36} FAILED: {type(e).__name__}: {brief(str(e))}", flush=True)
        return None


def brief(error: str) -> str:
    """The first 200 and the last 600 characters, where the cause is; XLA follows it by the line of code it suspects."""
    error = error.partition("Suspected Python Code Location")[0].strip()
    return error if len(error) <= 800 else f"{error[:200]} .. {error[-600:]}"


def updates(cfg, args, beside: dict) -> dict[str, dict]:
    """Measures and prints the rows that are one update each."""
    tx, table = optimizer(), {}
    remat = {"": None, "none": False}.get(args.remat, args.remat)
    cases = [c if remat is None else dataclasses.replace(c, remat=remat) for c in CASES if c.key in args.chosen]
    programs = {case.key: attempt(case.title, compile_case, cfg, case, tx, args) for case in cases}
    print(HEADER, flush=True)
    for masters in ("bfloat16", "float32"):
        rows = [case for case in cases if case.masters == masters and programs[case.key]]
        box = [attempt(f"state in {masters}", state_of, cfg, tx, masters)] if rows else []
        for case in rows if box and box[0] else []:
            compiled, seconds = programs[case.key]
            out = attempt(case.title, measure, cfg, case, compiled, box.pop(), args)
            if out is None:  # the step used its state up
                box = [state_of(cfg, tx, masters)]
                continue
            box, row = [out[0]], out[1] | {"compile_s": seconds}
            table[case.key] = row | dict(zip(("flops", "bytes", "tokens6"), cost(cfg, case), strict=True))
            print(line(case, row, cost(cfg, case), beside.get(case.peer, {}), args), flush=True)
        del box
    return table


def main(argv=None) -> int:
    args = parse(argv)
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    beside = peers(args)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, Qwen2.5-VL {args.size}, random weights", flush=True)
    table = updates(cfg, args, beside)
    if "whole" in args.chosen:
        from tools.bench import train_phases  # which imports this module's rows

        table |= {"whole": out} if (out := attempt("whole C-GRPO step", train_phases.run, cfg, args)) else {}
    if args.out:
        told = {"device": device.device_kind, "jax": jax.__version__, "rows": table, "transformers": beside}
        args.out.write_text(json.dumps(told, indent=1))
    return 0 if len(table) == len(args.chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
