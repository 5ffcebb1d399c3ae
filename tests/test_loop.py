"""The training loop with a state of a few numbers: where it begins, what it refuses, what it leaves on the disk."""

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marc_jax import checkpoint, config, interrupt, locks, loop, manifest, metrics, optim, stage_parts, state

TX = optim.make({"learning_rate": 0.1, "schedule": "constant"}, 10)
PACE = loop.Pace(steps=6, log_every=2, save_every=2)


def fresh():
    return state.create(TX, {"w": jnp.arange(4.0)}, {"fixed": jnp.ones(2)}, key=jax.random.key(0))


@jax.jit
def step_fn(now, batch):
    gradient = now.params["w"] - batch
    return now.apply(TX, {"w": gradient}), {"loss": ((gradient**2).sum(), jnp.float32(4))}


def draw(step):
    return jnp.full(4, step, jnp.float32)


def fit(folder, pace=PACE, step_fn=step_fn, **more):
    return loop.fit("toy", folder, fresh(), draw, step_fn, pace, **more)[0]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "toy" / "metrics.jsonl").read_text().splitlines()]


def injure(folder, step):
    files = (p for p in (folder / "toy/checkpoints" / f"step_{step:08d}").rglob("*") if p.is_file())
    path = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[random.Random(step).randrange(len(data))] ^= 4
    path.write_bytes(bytes(data))


def test_a_stopped_stage_ends_like_one_that_ran_through(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", dataclasses.replace(PACE, steps=4))
    again = fit(tmp_path / "parts")
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and int(again.step) == 6
    assert fit(tmp_path / "parts").params["w"].tolist() == whole.params["w"].tolist()  # nothing left to do


def test_a_step_saved_between_two_lines_of_the_log_loses_none_of_its_metrics(tmp_path):
    pace = loop.Pace(steps=6, log_every=6, save_every=2)
    fit(tmp_path / "whole", pace)
    fit(tmp_path / "parts", pace)
    shutil.rmtree(tmp_path / "parts/toy/checkpoints/step_00000006")
    fit(tmp_path / "parts", pace)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_damaged_newest_step_costs_only_the_steps_after_the_one_before(tmp_path):
    whole = fit(tmp_path)
    before = losses(tmp_path)
    injure(tmp_path, 6)
    np.testing.assert_array_equal(fit(tmp_path).params["w"], whole.params["w"])
    assert losses(tmp_path) == before and checkpoint.latest(tmp_path / "toy/checkpoints") == 6


def test_a_stage_whose_checkpoints_are_all_damaged_is_not_silently_begun_again(tmp_path):
    fit(tmp_path)
    before = losses(tmp_path)
    for step in (4, 6):
        injure(tmp_path, step)
    folder = tmp_path / "toy/checkpoints"
    with pytest.raises(checkpoint.CheckpointError, match=f"step 6: .*step 4: .*; delete {folder} to start") as e:
        fit(tmp_path)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)
    assert losses(tmp_path) == before and checkpoint.steps(folder) == [4, 6]


def test_resuming_hashes_a_checkpoint_once(tmp_path, monkeypatch):
    fit(tmp_path, dataclasses.replace(PACE, steps=4))
    hashed, real = [], manifest._hashes

    def counted(folder, names, flush=False):
        hashed.append(flush)
        return real(folder, names, flush)

    monkeypatch.setattr(manifest, "_hashes", counted)
    fit(tmp_path, dataclasses.replace(PACE, steps=4))
    assert hashed == [False]


def test_a_stage_is_run_by_one_process_at_a_time_and_others_beside_it(tmp_path):
    def step_inside(now, batch):
        with pytest.raises(locks.LockedError, match=rf"stage 'toy' in {tmp_path} .* process {os.getpid()} on"):
            fit(tmp_path)
        return step_fn(now, batch)

    loop.fit("other", tmp_path, fresh(), draw, lambda now, batch: (fit(tmp_path), step_fn(now, batch))[1], PACE)
    shutil.rmtree(tmp_path / "toy")
    fit(tmp_path, dataclasses.replace(PACE, steps=1), step_fn=step_inside)
    assert checkpoint.steps(tmp_path / "toy/checkpoints") == [1]


def broken_at(step, **what):
    """step_fn whose metrics (or, with params=, the state) are broken once `step` steps are done."""

    def run(now, batch):
        now, values = step_fn(now, batch)
        if int(now.step) == step:
            params = what.get("params")
            now = now if params is None else dataclasses.replace(now, params={"w": params})
            values |= what.get("values", {})
        return now, values

    return run


BROKEN = [
    ({"values": {"loss": (jnp.float32(np.nan), jnp.float32(4))}}, "loss"),
    ({"values": {"loss": (1.0, 1.0), "grad_norm": jnp.float32(np.inf)}}, "grad_norm"),
    ({"params": jnp.array([1.0, np.inf, 0, 0]), "values": {"loss": (1.0, 1.0)}}, "parameter/w"),
]


@pytest.mark.parametrize(("what", "name"), BROKEN)
def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, what, name):
    """Found before the save that comes next, though the log is far away; the step, the term and the samples named."""
    pace = loop.Pace(steps=6, log_every=6, save_every=2)
    samples = lambda step: {f"sample {step}.{i}": {"videos": ["a.mp4"]} for i in range(10)}  # noqa: E731
    with pytest.raises(metrics.NonFiniteError) as e:
        fit(tmp_path, pace, broken_at(4 if "params" in what else 3, **what), samples=samples)
    step = 4 if "params" in what else 3
    text = str(e.value)
    assert text.startswith(f"step {step}: {name} not finite; batch: sample {step - 1}.0, ") and "and 2 more" in text
    assert f"step 2 in {tmp_path / 'toy' / 'checkpoints'} is intact" in text and e.value.exit_code == 1
    told = json.loads((tmp_path / "toy" / "nonfinite.json").read_text())
    assert told["step"] == step and told["names"] == [name] and len(told["batch"]) == 10
    assert checkpoint.latest(tmp_path / "toy/checkpoints") == 2
    assert np.isfinite(fit(tmp_path, pace).params["w"]).all()  # goes on from there


def test_steps_left_out_are_written_once_however_often_the_run_goes_over_them(tmp_path):
    tx = optim.make({"learning_rate": 0.1, "schedule": "constant", "skip": 2}, 10)

    @jax.jit
    def guarded(now, batch):
        gradient = now.params["w"] - batch
        total = (gradient**2).sum()
        return now.apply(tx, {"w": gradient}, total / 4), {"loss": (total, jnp.float32(4))}

    def spoilt(step):
        return jnp.full(4, jnp.nan if step in (2, 3) else step, jnp.float32)

    def run(folder, steps):
        begin = state.create(tx, {"w": jnp.arange(4.0)}, {"fixed": jnp.ones(2)}, key=jax.random.key(0))
        pace = loop.Pace(steps, log_every=6, save_every=2, skip=2)
        return loop.fit("toy", folder, begin, spoilt, guarded, pace, samples=lambda step: {f"batch {step}": {}})[0]

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 4)
    shutil.rmtree(tmp_path / "parts/toy/checkpoints/step_00000004")
    again = run(tmp_path / "parts", 6)
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        left_out = metrics.read(folder / "toy/skipped.jsonl")
        assert [(row["step"], row["names"], [*row["batch"]]) for row in left_out] == [
            (3, ["loss"], ["batch 2"]), (4, ["loss"], ["batch 3"])
        ]  # fmt: skip
        (row,) = metrics.read(folder / "toy/metrics.jsonl")
        assert row["skipped"] == 2 / 6 and np.isfinite(row["loss"])


def test_the_old_state_gives_its_memory_to_the_new_one(tmp_path):
    whole, begin = fit(tmp_path / "kept"), fresh()
    donating = stage_parts.jit(step_fn, begin)
    got = loop.fit("toy", tmp_path / "given", begin, draw, donating, PACE)[0]
    assert all(x.is_deleted() for x in jax.tree.leaves(begin))
    np.testing.assert_array_equal(got.params["w"], whole.params["w"])
    begin = fresh()
    more = dataclasses.replace(PACE, steps=8)
    again = loop.fit("toy", tmp_path / "given", begin, draw, donating, more)[0]  # from step 6
    assert all(x.is_deleted() for x in jax.tree.leaves(begin)) and int(again.step) == 8
    np.testing.assert_array_equal(again.params["w"], fit(tmp_path / "kept", more).params["w"])


def test_who_is_asked_to_stop_before_the_first_step_does_not_begin_it(tmp_path):
    stop = interrupt.Interrupt()
    stop.received = signal.SIGTERM
    with pytest.raises(config.Stopped, match="^stopped before the first step of a stage$"):
        fit(tmp_path, step_fn=None, stop=stop)
    fit(tmp_path, dataclasses.replace(PACE, steps=4))
    with pytest.raises(config.Stopped, match="^stopped after step 4, which is saved$"):
        fit(tmp_path, step_fn=None, stop=stop)


def test_training_goes_on_while_a_step_is_written(tmp_path, monkeypatch):
    """The manifest of step 2 waits for step 4 to be trained; a loop that waited for the disk would never get there.

    The steps take the memory of what is being written, and what is written is of step 2 all the same.
    """
    trained, waited, write, begin = threading.Event(), [], manifest.write, fresh()
    donating = stage_parts.jit(step_fn, begin)

    def slow(folder, contents):
        if contents["step"] == 2:
            waited.append(trained.wait(60))
        return write(folder, contents)

    def step(now, batch):
        now, values = donating(now, batch)
        if int(now.step) == 4:
            trained.set()
        return now, values

    monkeypatch.setattr(manifest, "write", slow)
    pace = dataclasses.replace(PACE, keep=3)
    last = loop.fit("toy", tmp_path, begin, draw, step, pace)[0]
    assert waited == [True] and checkpoint.steps(tmp_path / "toy/checkpoints") == [2, 4, 6]
    monkeypatch.undo()
    for path in ("step_00000004", "step_00000006"):
        shutil.rmtree(tmp_path / "toy/checkpoints" / path)
    np.testing.assert_array_equal(fit(tmp_path).params["w"], last.params["w"])


def broken_disk(folder, contents):
    raise OSError(28, "No space left on device", str(folder))


def test_a_save_that_fails_in_the_background_ends_the_stage_at_the_next_step(tmp_path, monkeypatch):
    steps = []

    def step(now, batch):
        steps.append(int(now.step) + 1)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        return step_fn(now, batch)

    monkeypatch.setattr(manifest, "write", broken_disk)
    with pytest.raises(checkpoint.CheckpointError, match="step 2, was not saved: no space left on the disk") as e:
        fit(tmp_path, loop.Pace(steps=20, save_every=2), step_fn=step)
    assert e.value.exit_code == 1 and steps[-1] in (2, 3)
    assert os.listdir(tmp_path / "toy/checkpoints") == []


def test_beside_another_error_a_save_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    died = threading.Event()

    def step(now, batch):
        if int(now.step) == 2:
            died.set()
            raise RuntimeError("the decoder died")
        return step_fn(now, batch)

    monkeypatch.setattr(manifest, "write", lambda *told: (died.wait(60), broken_disk(*told)))
    with pytest.raises(RuntimeError, match="the decoder died"):
        fit(tmp_path, step_fn=step)
    assert "warning: checkpoint" in (said := capsys.readouterr().err)
    assert "step 2, was not saved: no space left on the disk" in said


def test_what_is_being_written_when_a_number_breaks_is_written_whole_and_told(tmp_path, monkeypatch):
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda *told: (time.sleep(0.5), write(*told)))
    pace, what = loop.Pace(steps=6, log_every=1, save_every=2), {"loss": (jnp.float32(np.nan), 4.0)}
    with pytest.raises(metrics.NonFiniteError, match="^step 3: .*; step 2 in .* is intact"):
        fit(tmp_path, pace, broken_at(3, values=what))
    assert checkpoint.latest(tmp_path / "toy/checkpoints") == 2
