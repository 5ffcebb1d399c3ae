"""Train, save, restore, evaluate, index and ask in one process for a long time: what grows?"""

import os
import pathlib
import shutil
import sys
import time

import jax
import numpy as np

from marc_jax import archive, checkpoint, optim, run, settings, stages, synthetic
from marc_jax.evaluation import run as evaluation
from marc_jax.memory import embed, store
from marc_jax.models import qwen25_vl
from tools.faults import drill

COMPILED = "/jax/core/compile/backend_compile_duration"
SMALL = (
    "vision.depth=1", "vision.hidden_size=16", "vision.num_heads=2", "vision.intermediate_size=16",
    "text.hidden_size=16", "text.num_layers=1", "text.num_heads=2", "text.num_kv_heads=1", "text.intermediate_size=16",
)  # fmt: skip
SMALL_MODEL = [f"--config.model.{change}" for change in SMALL]
STEPS = 20  # of training in a round
WARM_UP = 3  # rounds
NAMES = ("MB", "open files", "threads", "processes", "compilations")
# MB that stay of a round's save and restore: TensorStore never frees all of what it returns as JSON (0.1.76 to 0.1.86),
# and Orbax asks it for the spec of each array and, twice a save, for its metrics.
KEPT = 0.1
POOLS = 4  # threads that pools of libraries may still add: they fill as they are needed, a leak is one a round


def soak(folder: pathlib.Path, rounds: int, minutes: float = 0.0, saves: bool = True) -> drill.Outcome:
    """At least `rounds` rounds after the warm-up, and at least so many minutes; without `saves` nothing is allowed."""
    kept = KEPT if saves else 0.0
    outcome = drill.Outcome(
        f"a long time: train,{' save, restore,' if saves else ''} evaluate, index, ask in a loop",
        "no compilation after warm-up; open files, threads (but 4) and processes flat; memory < 1 MB per 1,000 steps"
        + (f", beside {KEPT} MB of each save and restore that TensorStore never frees" if saves else ""),
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: name == COMPILED and compiled.append(1))
    turn = _prepare(folder, saves)
    seen, began, told = [], time.monotonic(), 0.0
    while len(seen) < WARM_UP + rounds or time.monotonic() - began < 60 * minutes:
        turn(len(seen))
        files, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        seen.append((_megabytes(), files, threads, _children(), len(compiled)))
        passed = (time.monotonic() - began) / 60
        if passed >= told + 1:  # a soak that dies should leave behind what it has seen
            told = passed
            values = ", ".join(f"{value:g} {name}" for value, name in zip(seen[-1], NAMES, strict=True))
            print(f"soak: {passed:.0f} min, {len(seen)} rounds: {values}", file=sys.stderr, flush=True)
    first, last = seen[WARM_UP - 1], seen[-1]
    outcome.attempts = len(seen) - WARM_UP
    grown = [f"{NAMES[i]}: {first[i]} -> {last[i]}" for i in (1, 2, 3, 4) if last[i] > first[i] + POOLS * (i == 2)]
    late = np.array([row[0] for row in seen[len(seen) // 4 :]])
    slope = float(np.polyfit(np.arange(len(late)) * STEPS / 1000, late, 1)[0]) if len(late) > 2 else 0.0
    enough = outcome.attempts >= 50  # fewer rounds say nothing about a slope
    if enough and slope > 1.0 + kept * 1000 / STEPS:
        grown.append(f"memory grows by {slope:.2f} MB per 1,000 steps")
    outcome.survived = 0 if grown else outcome.attempts
    outcome.problems = grown
    minutes = (time.monotonic() - began) / 60
    outcome.note = f"{outcome.attempts * STEPS} steps in {minutes:.1f} min, {last[4] - first[4]} compilations, "
    outcome.note += f"{last[0]:.0f} MB"
    if enough:
        hourly = slope * len(seen) * STEPS / 1000 * 60 / minutes
        outcome.note += f", {slope:+.2f} MB per 1,000 steps, {hourly:+.1f} MB an hour"
    return outcome


def _prepare(folder: pathlib.Path, saves: bool):
    """A round, as a function of its number."""
    changes = SMALL_MODEL + [
        "--config.data.train_videos=8", "--config.data.test_videos=6", "--config.data.workers=0",
        "--config.eval.batch=8", "--config.teacher.init=", "--config.teacher.videos=8", "--config.teacher.questions=1",
    ]  # fmt: skip
    config = settings.experiment(str(drill.REPO / "experiments" / "quickstart.py"), changes)
    workdir = folder / "run"
    workdir.mkdir()
    settings.keep(config, workdir / "config.json")
    here = run.prepare(config, workdir)
    synthetic.load_training(here)
    for i, stage in enumerate(("teacher", "sft")):
        _finished(workdir / stage, config[stage].steps, qwen25_vl.init(here.cfg, jax.random.key(i)))
    _finished(workdir / "retriever", config.retriever.steps, embed.init(jax.random.key(0), here.embed_sizes()))
    here.load_retriever()
    first, draw, step_fn, _ = stages.build(here, "teacher")
    asking = archive.Archive(None, str(workdir))
    test = evaluation.index_test(here, here.parameters("teacher"), pixels=False)
    videos = sorted((synthetic.data_folder(config, workdir) / "videos" / "test").iterdir())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first)
    held = [first]
    del first

    def turn(number: int) -> None:
        state = held.pop()
        for i in range(STEPS):
            state, values = step_fn(state, draw(number * STEPS + i))
        jax.block_until_ready(values)
        if saves:
            checkpoint.save(folder / "saved", number, state, {}, keep=2)
            state, _ = checkpoint.restore(folder / "saved", shapes)
        evaluation.answer_all(here, state.model, "full", "features", test, "")
        memory = folder / "memory"
        shutil.rmtree(memory, ignore_errors=True)
        with store.MemoryWriter(memory, asking.indexer.fingerprint) as writer:
            for path in videos[:2]:
                writer.add(str(path), asking.indexer.file(path))
        store.MemoryReader(memory, asking.indexer.fingerprint)[str(videos[0])]
        asking.ask("how many in blue stripes ?", str(videos[number % 2]))
        held.append(state)

    return turn


def _finished(folder: pathlib.Path, step: int, params: dict) -> None:
    flat = optim.flatten(params)
    checkpoint.save(folder / "checkpoints", step, {"params": flat}, {"trainable": sorted(flat)})


def _megabytes() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _children() -> int:
    """Processes begun by any thread of this one and not yet gone."""
    return sum(len(path.read_text().split()) for path in pathlib.Path("/proc/self/task").glob("*/children"))
