"""Compile the model's programs for a TPU that is not there, and say whether they fit.

    pip install -e ".[tpu]"
    python -m tools.compile_for_tpu --model=3b --topology=v5e:4x4 [--only=vision,sft] [--mesh=1,16,1]
    python -m tools.compile_for_tpu --config=experiments/quickstart.py --topology=v5e:2x2 [--config.KEY=VALUE]

Runs on any machine with libtpu (the extra [tpu]; no TPU needed): shapes and shardings of a real topology are lowered
and compiled, nothing is executed. Prints per program: memory per chip against the chip's HBM, FLOPs, collectives with
the bytes they move, seconds to compile. Exit code 1 when a program does not fit, with its largest buffers.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

TOPOLOGY_SETTINGS = {
    "JAX_PLATFORMS": "cpu",  # the TPU is a description here
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip to fight over: several compilations at a time
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """`run(*args)` over ShapeDtypeStructs with shardings; `donate`: arguments whose buffers the result takes."""

    run: Callable
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()


class TopologyError(Exception):
    """libtpu is absent, or the topology is not one it knows."""


def devices_of(topology: str):
    """The devices of a topology such as "v5e:4x4"."""
    for name, value in TOPOLOGY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise TopologyError("libtpu is not installed: pip install 'marc_jax[tpu]'") from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as e:
        raise TopologyError(f"--topology={topology}: {' '.join(str(e).split())[:300]}") from None


def compile_program(program: Program):
    """(Cost, seconds included) of one program. Raises what XLA raises."""
    import jax

    from tools import tpu_program

    begun = time.monotonic()
    traced = jax.jit(program.run, donate_argnums=program.donate).trace(*program.args)
    compiled = traced.lower().compile()
    seconds = time.monotonic() - begun
    return tpu_program.Cost(
        *tpu_program.memory(compiled), tpu_program.flops(traced.jaxpr.jaxpr),
        tpu_program.collectives(compiled.as_text()), seconds,
    )  # fmt: skip


def show(name: str, cost, chips: int, hbm: float) -> None:
    gib = 2**30
    print(
        f"{name}: {cost.memory / gib:.2f} GiB of {hbm:.0f} GiB per chip (arguments {cost.arguments / gib:.2f}, "
        f"temporary {cost.temporary / gib:.2f}, results {cost.outputs / gib:.2f}); "
        f"{cost.flops / 1e12:.2f} TFLOP, {cost.flops / chips / 1e12:.3f} per chip; compiled in {cost.seconds:.0f} s"
    )
    for kind, (calls, size) in cost.collectives.items():
        print(f"    {kind}: {calls} calls, {size / gib:.3f} GiB per chip")
    sys.stdout.flush()


def row(name: str, cost) -> str:
    """One line of the table in docs/tpu.md."""
    moved = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, (_, size) in cost.collectives.items()) or "none"
    return (
        f"| {name} | {cost.memory / 2**30:.2f} ({cost.arguments / 2**30:.2f} + {cost.temporary / 2**30:.2f}) "
        f"| {cost.flops / 1e12:.2f} | {moved} | {cost.seconds:.0f} |"
    )


def compile_all(programs: dict[str, Callable[[], Program]], devices, rows: list[str]) -> list[str]:
    """Compiles one after the other; returns the names of those that do not fit."""
    from tools import tpu_program

    hbm, missed = tpu_program.HBM_GIB.get(devices[0].device_kind, float("inf")), []
    for name, make in programs.items():
        program = make()
        held = tpu_program.largest(program.args)
        try:
            if sum(size for _, size in held) > hbm * 2**30:
                raise MemoryError(f"{sum(size for _, size in held) / 2**30:.1f} GiB of arguments per chip")
            cost = compile_program(program)
        except Exception as e:
            lines = [str(e)] if isinstance(e, MemoryError) else tpu_program.refusal(str(e))
            if lines is None:
                raise
        else:
            show(name, cost, len(devices), hbm)
            rows.append(row(name, cost))
            if cost.memory <= hbm * 2**30:
                continue
            lines = [f"{cost.memory / 2**30:.1f} GiB per chip"]
        missed.append(name)
        print(f"{name}: DOES NOT FIT {hbm:.0f} GiB", *lines, sep="\n    ")
        for path, size in held[:5]:
            print(f"    argument {path}: {size / 2**30:.2f} GiB per chip")
    return missed


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="3b, 7b, 32b, 72b or tiny: the usual programs at this size")
    parser.add_argument("--config", help="an experiment: its training stages as they would run")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="1,-1,1", help="data,fsdp,tensor (with --model)")
    parser.add_argument("--only", default="", help="names of programs, comma-separated")
    parser.add_argument("--batch", type=int, default=0, help="videos per step (with --model); 0: one per chip")
    parser.add_argument("--chunk", type=int, default=0, help="positions whose logits exist at once; 0: by size")
    parser.add_argument("--attention", default="splash", help="splash or xla")
    parser.add_argument("--no-remat", action="store_true", help="keep activations (with --model)")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    from marc_jax import config as configs

    given, overrides = configs.split_argv(sys.argv[1:] if argv is None else argv)
    flags = _arguments(given)
    if bool(flags.model) == bool(flags.config):
        print("error: give either --model or --config", file=sys.stderr)
        return 2
    try:
        devices = devices_of(flags.topology)
        from tools import tpu_cases

        if flags.model:
            mesh, programs, notes = tpu_cases.of_model(flags, devices)
        else:
            mesh, programs, notes = tpu_cases.of_experiment(flags.config, overrides, flags.attention, devices)
    except (TopologyError, ValueError, configs.ConfigError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    wanted = [name for name in flags.only.split(",") if name]
    if unknown := [name for name in wanted if name not in programs]:
        print(f"error: --only={unknown[0]}: there are {', '.join(programs)}", file=sys.stderr)
        return 2
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{flags.topology}: {len(devices)} x {devices[0].device_kind}; mesh {shape}", *notes, sep="\n")
    rows: list[str] = []
    missed = compile_all({k: v for k, v in programs.items() if not wanted or k in wanted}, devices, rows)
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as f:
            json.dump({"topology": flags.topology, "mesh": dict(mesh.shape), "rows": rows, "missed": missed}, f)
    if missed:
        print(f"error: does not fit: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
