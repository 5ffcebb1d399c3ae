"""Processes side by side: order, failures, the clock, resuming. The processes here are one line of Python each."""

import json
import sys
from types import SimpleNamespace

import pytest

from marc_jax import config as configs
from marc_jax import settings
from tools import sweep

TRAIN = "import pathlib, sys; pathlib.Path(sys.argv[1], 'checkpoints', 'step_00000003').mkdir(parents=True)"
FAIL = "import sys; print('error: no such video'); sys.exit(2)"
WAIT = "import time; time.sleep(60)"


@pytest.fixture
def run(tmp_path):
    """Sweep of jobs given as {name: (program, what it needs)} with so many places."""

    def make(programs, places=2, answers=()):
        jobs = []
        for name, (program, *needs) in programs.items():
            folder = tmp_path / "seed_0" / name
            job = sweep.Job(f"seed_0/{name}", [sys.executable, "-c", program, str(folder)], folder, steps=3)
            job.log = tmp_path / "seed_0" / "logs" / f"{name}.log"
            job.needs = tuple(f"seed_0/{other}" for other in needs)
            jobs.append(job)
        return sweep.Sweep(jobs, list(answers), ["cpu"], places, tmp_path / "programs")

    return make


def states(made):
    return {name.split("/")[1]: job.state for name, job in made.jobs.items() if job.steps}


def test_a_stage_begins_when_what_it_needs_is_finished(run):
    made = run({"b": (TRAIN, "a"), "a": (TRAIN,)}, places=2)
    sweep.follow(made, 0)
    assert states(made) == {"a": "done", "b": "done"} and made.jobs["seed_0/b"].begun > made.jobs["seed_0/a"].begun
    assert sweep.outcome(made) == 0


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(run, capsys):
    made = run({"a": (FAIL,), "b": (TRAIN, "a"), "c": (TRAIN, "b"), "d": (TRAIN,)})
    sweep.follow(made, 0)
    assert states(made) == {"a": "failed", "b": "blocked", "c": "blocked", "d": "done"}
    assert sweep.outcome(made) == 1
    out = capsys.readouterr().out
    assert "seed_0/a: failed" in out and "no such video" in out and "seed_0/b: blocked, it needs seed_0/a" in out


def test_a_process_that_ends_well_without_its_last_step_has_failed(run):
    made = run({"a": ("pass",)})
    sweep.follow(made, 0)
    assert states(made) == {"a": "failed"}


def test_the_clock_ends_stages_that_run_and_begins_no_other(run):
    made = run({"a": (TRAIN,), "b": (WAIT,), "c": (TRAIN, "b")}, places=2)
    sweep.follow(made, 1.0)
    assert states(made) == {"a": "done", "b": "stopped", "c": "waiting"} and sweep.outcome(made) == 3


def config_with(**arms):
    arms = {name: SimpleNamespace(stage=stage) for name, stage in arms.items()}
    stages = {"teacher": SimpleNamespace(kind="sft"), "student": SimpleNamespace(kind="sft")}

    class Config(dict):
        stages = ("teacher", "student")
        eval = SimpleNamespace(arms=arms, teacher="teacher")

    return Config(stages)


def test_the_teacher_is_answered_first_and_arms_wait_for_their_stage(run, tmp_path, monkeypatch):
    began = []

    def answering(asked, arms, number):
        began.append(arms)
        lines = [f"(out / {arm + '.jsonl'!r}).write_text('')" for arm in arms]
        code = f"import pathlib; out = pathlib.Path({str(asked.out)!r}, 'predictions'); out.mkdir(0o777, True, True)"
        command = [sys.executable, "-c", "; ".join([code, *lines])]
        return sweep.Job(f"seed_0/{arms[0]}", command, tmp_path / "seed_0" / "logs" / f"{number}.log", arms=arms)

    monkeypatch.setattr(sweep, "_answering", answering)
    config = config_with(teacher="teacher", blind="teacher", student="student", lost="student")
    out = tmp_path / "seed_0" / "eval"
    asked = sweep.Answers("0", config, "x.py", tmp_path / "seed_0", out, ["teacher", "blind", "student", "lost"])
    made = run({"teacher": (TRAIN,), "student": (FAIL, "teacher")}, places=1, answers=[asked])
    sweep.follow(made, 0)
    assert began == [("teacher",), ("blind",)] and asked.left == ["student", "lost"]
    assert sweep.outcome(made) == 1


def test_stages_of_a_config_know_what_they_need_and_what_is_there(tmp_path):
    config = settings.experiment("experiments/regimes.py:rehearsal", [])
    (tmp_path / "seed_1" / "clips" / "checkpoints" / "step_00000002").mkdir(parents=True)
    jobs = {job.name.split("/")[1]: job for job in sweep.stage_jobs(config, "x.py", tmp_path, "1", ["--config.a=1"])}
    assert jobs["clips"].state == "done" and jobs["teacher"].state == "waiting"
    assert set(jobs["cgrpo_early"].needs) == {f"seed_1/{name}" for name in ("teacher", "retriever", "sft_early")}
    assert jobs["retriever"].needs == ("seed_1/clips",)
    assert jobs["distill"].command[-3:] == ["--config.a=1", "--config.seed=1", "--config.only=('distill',)"]


def test_what_an_earlier_call_did_is_remembered(run, tmp_path):
    made, path = run({"a": (TRAIN,)}), tmp_path / "sweep.json"
    path.write_text(json.dumps({"seconds": 5, "jobs": {"seed_0/z": {"state": "done", "seconds": 1.0}}}))
    sweep.follow(made, 0)
    sweep.remember(made, path, 2.0)
    told = json.loads(path.read_text())
    assert told["seconds"] == 7 and set(told["jobs"]) == {"seed_0/z", "seed_0/a"}


@pytest.mark.parametrize("flag", ["--seeds=a", "--seeds=1,1", "--jobs=0"])
def test_impossible_flags_are_refused_in_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        configs.run_main(sweep.main, argv=["sweep", "--config=experiments/regimes.py:rehearsal", flag])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
