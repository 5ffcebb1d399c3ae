"""Numbers that are not numbers: NaN and spikes in a batch, stopped or left out; and the same data on every mesh."""

import json
import pathlib

import jax
import numpy as np

from marc_jax import checkpoint, loop, metrics, sharding
from tools.faults import drill, toy

STEPS = 40


def _mesh(*shape: int):
    return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def spoilt(folder: pathlib.Path, count: int) -> list[drill.Outcome]:
    """A batch with a NaN at another step each time: the run stops, or leaves it out."""
    stops = drill.Outcome(
        "NaN in a batch",
        "stops, names step and samples; no such state is saved; resumes when the data is right, bit-equal",
    )
    skips = drill.Outcome(
        "NaN or a spike in a batch, `skip` set", "left out bit for bit, counted, its samples written; the run ends"
    )
    truth = toy.digest(toy.train(folder / "straight", _mesh(1, 1, 1), loop.Pace(12, 1, 4)))
    for i in range(count):
        step = 1 + 5 * i % 12
        stops.count(_stop(folder / f"stop{i}", step, truth))
        skips.count(_skip(folder / f"skip{i}", 21 + (7 * i) % (STEPS - 21), "spike" if i % 2 else "nan"))
    return [stops, skips]


def _stop(workdir: pathlib.Path, step: int, truth: str) -> str | None:
    pace = loop.Pace(12, log_every=1, save_every=4)
    try:
        toy.train(workdir, _mesh(1, 1, 1), pace, spoil=f"{step}:nan")
    except metrics.NonFiniteError as error:
        told = json.loads((workdir / "toy/nonfinite.json").read_text())
        if error.step != step or list(told["batch"]) != [f"row {step - 1}"]:
            return f"step {step}: the message names step {error.step}, samples {list(told['batch'])}"
        if max(checkpoint.steps(workdir / "toy/checkpoints"), default=0) >= step:
            return "a spoilt state was saved"
        got = toy.digest(toy.train(workdir, _mesh(1, 1, 1), pace))
        return None if got == truth else "resumed, it ends otherwise"
    return f"step {step}: not noticed"


def _skip(workdir: pathlib.Path, step: int, what: str) -> str | None:
    mesh, short = _mesh(1, 1, 1), loop.Pace(step - 1, 10, 100, skip=2)
    before = toy.train(workdir, mesh, short)
    params = {name: np.asarray(x) for name, x in before.params.items()}
    here = loop.Pace(step, 10, 100, skip=2)
    after = toy.train(workdir, mesh, here, spoil=f"{step}:{what}")
    if any(np.asarray(after.params[name]).tobytes() != x.tobytes() for name, x in params.items()):
        return f"step {step}: {what}: the parameters have changed"
    (told,) = metrics.read(workdir / "toy/skipped.jsonl")
    if told["step"] != step or list(told["batch"]) != [f"row {step - 1}"]:
        return f"skipped.jsonl says {told}"
    end = toy.train(workdir, mesh, loop.Pace(STEPS, 1, 100, skip=2), spoil=f"{step}:{what}")
    finite = all(np.isfinite(np.asarray(x)).all() for x in end.params.values())
    return None if finite and int(end.step) == STEPS else f"step {step}: {what}: the run does not end well"


def too_many(folder: pathlib.Path, count: int) -> drill.Outcome:
    """More spoilt batches in a row than `skip` allows."""
    outcome = drill.Outcome("more NaN batches in a row than `skip` allows", "stops; the last step saved is sound")
    for i in range(count):
        skip, workdir = i % 3 + 1, folder / f"run{i}"
        spoil = ",".join(f"{4 + j}:nan" for j in range(skip + 1))
        problem = "not noticed"
        try:
            toy.train(workdir, _mesh(1, 1, 1), loop.Pace(12, 1, 2, skip=skip), spoil=spoil)
        except metrics.NonFiniteError as error:
            right = error.step == 4 + skip and f"the last of {skip + 1} such steps in a row" in str(error)
            problem = None if right else f"says {error}"
        outcome.count(problem or drill.damaged(workdir))
    return outcome


MESHES = ((2, 2, 2), (1, 4, 1), (1, 1, 1), (1, 2, 4), (4, 1, 1), (8, 1, 1), (1, 1, 2), (2, 1, 4), (1, 8, 1))


def resharded(folder: pathlib.Path, count: int) -> list[drill.Outcome]:
    """A run that changes its mesh at every stop: 8 -> 4 -> 1 devices and back, split in other ways."""
    restored = drill.Outcome(
        "restore onto another mesh: 8 -> 4 -> 1 -> 8 devices", "every number bit-equal right after the restore"
    )
    order = drill.Outcome(
        "a run that changes its mesh at every stop", "the same data in the same order; losses within 1e-5 of one device"
    )
    toy.train(folder / "straight", _mesh(1, 1, 1), loop.Pace(4 * (count + 1), 1, 4))
    truth = drill.log(folder / "straight")
    worst, workdir = 0.0, folder / "moved"
    for i in range(count + 1):
        pace = loop.Pace(4 * (i + 1), 1, 4)
        was = toy.digest(toy.train(workdir, _mesh(*MESHES[i % len(MESHES)]), pace))
        if i == count:
            break
        now = toy.digest(toy.train(workdir, _mesh(*MESHES[(i + 1) % len(MESHES)]), pace))
        restored.count(None if was == now else f"{MESHES[i % len(MESHES)]} -> {MESHES[(i + 1) % len(MESHES)]}: differs")
    for got, want in zip(drill.log(workdir), truth, strict=True):
        off = abs(got["loss"] - want["loss"]) / want["loss"]
        worst = max(worst, off)
        problem = f"loss off by {off:.1e}" if off > 1e-5 else None
        order.count(f"step {got['step']}: other data" if got["first"] != want["first"] else problem)
    order.note = f"largest relative difference {worst:.1e}; attempts are steps"
    return [restored, order]
