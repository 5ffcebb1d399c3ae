"""One policy update over 1, 2, 4 .. devices of a host (fsdp): how much of the added speed arrives.

    python -m tools.bench.scaling --size=3b --out=scaling.json

Weights, gradients and moments are split over the devices, a question with its group of 8 answers is on one of them.
Rows: `--per_device` questions per device (weak: the efficiency is the time of one device over that of n), and as many
questions on every number of devices as the most devices have (strong: the same, over n times it). Each row is the
update of `tools.bench.train`: bfloat16 moments, random weights, medians after a warm-up, host dispatch included.
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

from marc_jax import optim, sharding, state
from marc_jax.models import qwen25_vl
from tools.bench import profile, train

HEADER = f"{'row':34} devices questions {'ms':>8} {'spread':>7} efficient GiB each comp s"


def state_on(cfg, tx, mesh) -> state.TrainState:
    """The state before the first step, every part of it made where it belongs."""
    trainable, frozen = optim.partition(qwen25_vl.init(cfg, jax.random.key(0), jnp.bfloat16, mesh), train.TRAINABLE)
    return state.settled(state.create(tx, trainable, frozen, key=jax.random.key(0)), mesh)


def placed(mesh, path, x) -> jax.Array:
    """Questions split over the devices; positions have theirs second, [3, B, P]."""
    return jax.device_put(x, sharding.batch(mesh, int(jax.tree_util.keystr(path).endswith("pos_3bp"))))


def measure(cfg, case: train.Case, devices: int, args) -> dict:
    """One row: milliseconds of an update over the first so many devices."""
    mesh, tx = sharding.make_mesh(1, devices, 1, jax.devices()[:devices]), train.optimizer()
    with jax.set_mesh(mesh):
        now = state_on(cfg, tx, mesh)
        batch = jax.tree.map_with_path(functools.partial(placed, mesh), train.batch_of(cfg, case))
        kept = jax.tree.map(lambda x: x.sharding, now)
        begun = time.perf_counter()
        step = train.build(cfg, case, tx, args.attention, out_shardings=(kept, None)).lower(now, batch).compile()
        seconds, times = time.perf_counter() - begun, []
        for i in range(args.repeats + 2):
            begun = time.perf_counter()
            now, _ = jax.block_until_ready(step(now, batch))
            times += [(time.perf_counter() - begun) * 1e3] if i >= 2 else []
        if args.profile and devices > 1:
            box = [now]

            def once():
                box[0], values = step(box[0], batch)
                return values

            print(profile.table(profile.kernels(once), args.profile), f"\n    (of {devices} devices together)")
    row = {"ms": statistics.median(times), "spread": max(times) - min(times), "compile_s": seconds}
    return row | {"program_bytes": train.program_bytes(step), "devices": devices, "questions": case.view.batch}


def rows(args, counts: list[int]):
    """(title, case by number of devices), weak and strong."""
    kinds = {"weak": lambda n: n * args.per_device, "strong": lambda n: counts[-1]}
    for case in (c for c in train.CASES if c.key in args.rows.split(",")):
        for name, questions in ((name, kinds[name]) for name in args.kinds.split(",")):
            sized = {n: dataclasses.replace(case.view, batch=questions(n)) for n in counts}
            yield f"{case.key}, {name}", {n: dataclasses.replace(case, view=view) for n, view in sized.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--rows", default="student,frames")
    parser.add_argument("--kinds", default="weak,strong")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="list the N longest kernels")
    parser.add_argument("--per_device", type=int, default=1, help="questions per device of the weak rows")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    print(f"{counts[-1]} x {jax.devices()[0].device_kind}, jax {jax.__version__}, Qwen2.5-VL {args.size}\n{HEADER}")
    table, failed = {}, 0
    for title, cases in rows(args, counts):
        first = None
        for n, case in cases.items():
            row = train.attempt(f"{title}, {n} devices", measure, cfg, case, n, args)
            failed += row is None
            if row is None:
                continue
            first = first or row
            row["efficiency"] = first["ms"] / row["ms"] * (1 if "weak" in title else first["devices"] / n)
            table[f"{title}, {n}"] = row
            numbers = f"{n:7d} {row['questions']:9d} {row['ms']:8.1f} {row['spread']:7.1f} {row['efficiency']:9.0%}"
            print(f"{title:34} {numbers} {row['program_bytes'] / 2**30:8.2f} {row['compile_s']:6.1f}", flush=True)
    if args.out:
        told = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": table}
        args.out.write_text(json.dumps(told, indent=1))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
