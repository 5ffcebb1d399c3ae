"""What a compiled TPU program costs: FLOPs from the traced program, collectives from XLA's text, memory per chip.

XLA's own cost analysis counts a loop's body once and a Pallas kernel not at all, so both are counted here: loops times
their trip count, kernels times their grid. A loop that ends on data (decoding) counts once, that is per token.
"""

import dataclasses
import math
import re
from collections import defaultdict

import jax
import jax.extend.core
import numpy as np

HBM_GIB = {  # per device that JAX sees
    "TPU v2": 8, "TPU v3": 16, "TPU v4": 32, "TPU v4 lite": 8, "TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95,
    "TPU v6 lite": 32, "TPU7x": 96,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_BODY = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_OP = re.compile(r" = (.+?) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([^\s,}]+)")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one compiled program: bytes per chip, FLOPs of all chips, seconds; collectives {kind: (calls, bytes)}.

    `bytes` of a collective are those of its results on one chip.
    """

    arguments: int
    outputs: int
    temporary: int
    flops: int
    collectives: dict[str, tuple[int, int]]
    seconds: float

    @property
    def memory(self) -> int:
        return self.arguments + self.outputs + self.temporary


def memory(compiled) -> tuple[int, int, int]:
    """(arguments, outputs that are no donated argument, temporaries with code), bytes per chip."""
    m = compiled.memory_analysis()
    fresh = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes, fresh, m.temp_size_in_bytes + m.generated_code_size_in_bytes


def flops(jaxpr, shards: int = 1) -> int:
    """Multiply-adds x 2 of all matmuls of a jaxpr, over all devices; recomputation of remat included."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape) * shards
            continue
        times, inner = 1, shards
        if name == "scan":
            times = params["length"]
        elif name == "pallas_call":
            times = math.prod(int(n) for n in params["grid_mapping"].grid)
        elif name == "shard_map":
            inner = shards * params["mesh"].size
        bodies = [flops(body, inner) for body in jax.extend.core.jaxprs_in_params(params)]
        total += times * (max(bodies, default=0) if name == "cond" else sum(bodies))
    return total


def _bytes(shape: str) -> int:
    """Of the largest array in an HLO type."""
    sizes = [0]
    for kind, dims in re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", shape):
        sizes.append(_SIZES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d))
    return max(sizes)


def _bodies(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        if found := _BODY.match(line):
            lines = bodies.setdefault(found[1].lstrip("%"), [])
            entry = found[1].lstrip("%") if line.startswith("ENTRY") else entry
        elif line.startswith("  "):
            lines.append(line)
    return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Of a counted loop, from its condition `counter < constant`; 1 for a loop that ends on data."""
    if known := re.search(r'known_trip_count\D*?"?n"?\D*(\d+)', line):
        return int(known[1])
    condition = bodies.get(re.search(r"condition=%?([^\s,]+)", line)[1], [])
    root = next((x for x in condition if x.lstrip().startswith("ROOT")), "")
    limits = [int(c) for x in condition for c in re.findall(r" [su](?:32|64)\[\]\S* constant\((\d+)\)", x)]
    if len(limits) != 1 or "direction=LT" not in root or " compare(" not in root:
        return 1
    return -(-limits[0] // _step(root, condition, bodies.get(re.search(r"body=%?([^\s,]+)", line)[1], [])))


def _step(root: str, condition: list[str], body: list[str]) -> int:
    """What one turn of a loop adds to its counter: 2 where XLA unrolled it, as it does a matmul over passing slices."""

    def line_of(name: str, lines: list[str]) -> str:
        return next((x for x in lines if re.match(rf"\s*(?:ROOT )?%?{re.escape(name)} = ", x)), "")

    def operands(line: str, op: str) -> list[str]:
        found = re.search(rf" {op}\(([^)]*)\)", re.sub(r"/\*[^*]*\*/", "", line))
        return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []

    index = re.search(r" get-tuple-element\(.*index=(\d+)", line_of(operands(root, "compare")[0], condition))
    after = operands(next((x for x in body if x.lstrip().startswith("ROOT")), ""), "tuple")
    if not index or int(index[1]) >= len(after):
        return 1
    added = [line_of(name, body) for name in operands(line_of(after[int(index[1])], body), "add")]
    steps = [int(found[1]) for line in added if (found := re.search(r" constant\((\d+)\)", line))]
    return steps[0] if len(steps) == 1 and steps[0] > 0 else 1


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (calls, bytes of results on one chip)} of a compiled module's text; loops times their trip counts."""
    bodies, entry = _bodies(text)
    found: dict[str, tuple[str, int, int]] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if not (op := _OP.search(line)):
                continue
            kind = op[2].removesuffix("-start")
            if kind in KINDS:
                # The parts of an asynchronous collective carry its channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line.split(" = ")[0]
                found[key] = max(found.get(key, (kind, 0, 0)), (kind, times, _bytes(op[1])))
            inner = times * _trips(line, bodies) if op[2] == "while" else times
            for called in _CALLED.findall(line):
                walk(called.lstrip("%"), inner)

    walk(entry, 1)
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, times, size in found.values():
        totals[kind][0] += times
        totals[kind][1] += times * size
    return {kind: tuple(totals[kind]) for kind in KINDS if kind in totals}


def largest(tree) -> list[tuple[str, int]]:
    """(path, bytes on one chip) of every array of a tree, the largest first."""
    rows = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            rows.append((jax.tree_util.keystr(path), math.prod(shape) * np.dtype(x.dtype).itemsize))
    return sorted(rows, key=lambda row: -row[1])


def refusal(message: str, count: int = 5) -> list[str] | None:
    """XLA's refusal of a program that does not fit: its first line and its largest buffers; None if it is another."""
    if "Ran out of memory" not in message and "RESOURCE_EXHAUSTED" not in message:
        return None
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    out = [line for line in lines if "Ran out of memory" in line][:1] or lines[:1]
    sizes = [i for i, line in enumerate(lines) if line.lstrip("0123456789. ").startswith("Size:")]
    for i in sizes[:count]:
        shape = next((x for x in lines[i : i + 6] if x.startswith("Shape:")), "")
        name = next((x for x in lines[i : i + 6] if x.startswith("Operator:")), "")
        out.append("  ".join(part for part in (lines[i], shape, name) if part))
    return out
