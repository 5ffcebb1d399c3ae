"""The quick start, shrunken, through every stage and every entry: train, resume, eval, index, ask."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from marc_jax.memory import events, store
from tools.bench import published

SHRINK = '''
import runpy

from ml_collections import ConfigDict

ARMS = ("teacher", "blind", "untrained", "sft", "cgrpo")


def get_config():
    c = runpy.run_path({quickstart!r})["get_config"]()
    c.data.train_videos, c.data.test_videos, c.data.workers = 24, 12, 0
    c.model = {{
        "vision": {{"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}},
        "text": {{"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16}},
    }}
    c.stages = ("clips", "teacher", "retriever", "sft", "distill", "cgrpo", "taught")
    c.taught = {{"kind": "distill", "init": "teacher", "view": "whole", "types": ("total",), "on_policy": False}}
    c.taught.update(divergence="text", ladder=("per_event",))
    for key in c.taught.view, *c.taught.ladder:
        c.views[key].tell = "{{patches}} "
    c.cgrpo.rewards = ("accuracy", "tests.rewards:letters", "tests.rewards:broken")
    c.cgrpo.reward_weights, c.cgrpo.bonus = (1.0, 0.5, 1.0), {{"length": 0.2, "length_range": (1, 14)}}
    c.watch = {{"samples": 1, "rows": 2, "evaluate": 3, "questions": 4}}
    c.clips = {{"kind": "sft", "visual": "pixels", "events": (1, 1), "types": ("colour", "count"), "videos": 4}}
    c.clips.update(questions=2, steps=3, trainable=(".*",))
    c.teacher.init = "clips"
    for name in c.stages[1:]:
        c[name].videos, c[name].steps = 4, 3
    c.cgrpo.group, c.distill.lora = 2, {{"rank": 2}}
    c.cgrpo.update(parity="trl", iterations=2, scale="batch", weight="lost", credit=0.1, refill=1, skip_dead=True)
    c.cgrpo.micro_batches, c.cgrpo.optimizer.ema = 2, 0.9
    c.eval.arms = {{key: c.eval.arms[key] for key in ARMS}}
    c.eval.claims = {{}}
    c.eval.batch, c.eval.pictures, c.log_every, c.save_every = 6, 2, 1, 2
    return c
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.py").write_text(SHRINK.format(quickstart=str(repo / "experiments" / "quickstart.py")))
    run = start(repo, folder, "train", f"--workdir={folder / 'run'}")
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def start(repo, folder: pathlib.Path, entry: str, *arguments: str, config: bool = True):
    """One entry as a user calls it, on two simulated devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    command = [sys.executable, "-m", f"marc_jax.{entry}", *([f"--config={folder / 'tiny.py'}"] if config else [])]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(
        [*command, *arguments], cwd=repo, env=environment, capture_output=True, text=True, timeout=900
    )


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_leaves_metrics_and_a_checkpoint(place):
    for stage in ("clips", "teacher", "retriever", "sft", "distill", "cgrpo", "taught"):
        rows = lines(place / "run" / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert all(row["loss"] is not None for row in rows), stage
        assert list((place / "run" / stage / "checkpoints").glob("step_*/manifest.json"))


def test_a_stage_can_be_watched(place):
    run = place / "run"
    told, speed = (lines(run / "cgrpo" / name)[-1] for name in ("metrics.jsonl", "speed.jsonl"))
    assert told["rewards/failed"] == pytest.approx(1 / 3) and told["rewards/letters/mean"] > 0
    assert {"eval/marc/accuracy", "eval/full/accuracy", "retention/eta_1.0", "completions/max_length"} <= set(told)
    assert told["eval/full/tokens"] > told["eval/marc/tokens"] == 4
    phases = ("step", "decode", "retrieve", "rollout", "teacher", "reward", "update")
    assert all(speed[f"speed/{phase}_seconds"] > 0 for phase in phases) and speed["speed/tokens_per_second"] > 0
    failed = lines(run / "cgrpo" / "reward_failures.jsonl")
    assert failed[0]["reason"] == "raised RuntimeError: no judge today" and failed[0]["step"] == 1
    sampled = lines(run / "cgrpo" / "samples" / "samples.jsonl")
    assert [row["step"] for row in sampled] == [1, 1, 2, 2, 3, 3, 3, 3] and "a_full" in sampled[0]
    assert "<table>" in (run / "cgrpo" / "samples" / "samples.html").read_text()
    ladder = lines(run / "taught" / "metrics.jsonl")
    assert ["ladder/whole/loss" in row for row in ladder] == [True, False, True]
    assert ladder[2]["eval/per_event/tokens"] == 12.0
    assert lines(run / "taught" / "samples" / "samples.jsonl")[0]["prompt"]


def test_the_report_is_whole(place):
    folder = place / "run" / "report"
    results = json.loads((folder / "results.json").read_text())
    assert {arm["key"] for arm in results["arms"]} == {"teacher", "blind", "untrained", "sft", "cgrpo"}
    tokens = {arm["key"]: arm["visual_tokens"] for arm in results["arms"]}
    assert tokens["blind"] == 0 and tokens["untrained"] == 4 and tokens["teacher"] > 4 * tokens["sft"] - 1
    assert all(arm["n"] == 12 for arm in results["arms"])
    assert results["retriever"]["n"] == 12 and results["segmentation"]["videos"] == 12
    pictures = [folder / sample["path"] for sample in results["samples"]]
    assert len(pictures) == 2 and all(path.stat().st_size > 10_000 for path in pictures)
    assert "<html" in (folder / "report.html").read_text() and (folder / "report.md").stat().st_size > 1000


def test_the_memory_keeps_blended_patches_but_no_event_has_them(place):
    memory = store.MemoryReader(place / "run" / "memory", None)
    with pytest.raises(store.StaleMemory, match=f"segmenter: {events.FINGERPRINT} in the memory, events 2 wanted"):
        store.MemoryReader(place / "run" / "memory", store.fingerprint(segmenter="events 2"))
    records = {record["path"]: record for record in json.loads((place / "run" / "data" / "test.json").read_text())}
    blended = left_out = 0
    for name, record in records.items():
        entry, drawn = memory[name], record["events"]
        inside = {p for start, stop in entry.event_spans.tolist() for p in range(start, stop)}
        truth = {event["start_patch"] for event in drawn if event["dissolve"]}
        assert len(entry.tokens) == drawn[-1]["end_patch"]
        blended, left_out = blended + len(truth), left_out + len(truth - inside)
    assert blended and left_out > 0.8 * blended


def test_a_finished_run_does_nothing_again_and_another_config_is_refused(place, repo):
    before = (place / "run" / "sft" / "metrics.jsonl").read_bytes()
    again = start(repo, place, "train", f"--workdir={place / 'run'}", "--config.only=('sft',)")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (place / "run" / "sft" / "metrics.jsonl").read_bytes() == before
    other = start(repo, place, "train", f"--workdir={place / 'run'}", "--config.sft.optimizer.learning_rate=0.5")
    assert other.returncode == 2 and "started with another config (different: sft)" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_second_run_and_a_resumed_run_give_the_same_losses(place, repo):
    """Deleting the last checkpoint of a stage makes the run go on from the one before."""
    folder = place / "run" / "clips"
    first = lines(folder / "metrics.jsonl")
    second = place / "second"
    shared = f"--config.data.path={place / 'run' / 'data'}"
    run = start(repo, place, "train", f"--workdir={second}", "--config.only=('clips',)", shared)
    assert run.returncode == 0, run.stderr[-2000:]
    assert lines(second / "clips" / "metrics.jsonl") == first
    shutil.rmtree(second / "clips" / "checkpoints" / "step_00000003")
    run = start(repo, place, "train", f"--workdir={second}", "--config.only=('clips',)", shared)
    assert run.returncode == 0, run.stderr[-2000:]
    assert lines(second / "clips" / "metrics.jsonl") == first


def test_two_processes_train_what_one_trains(place, repo):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        sys.executable, "-m", "marc_jax.train", f"--config={place / 'tiny.py'}", f"--workdir={place / 'pair'}",
        f"--config.data.path={place / 'run' / 'data'}", "--config.only=('clips',)",
        f"--coordinator=127.0.0.1:{port}", "--processes=2",
    ]  # fmt: skip
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    pair = [
        subprocess.Popen(
            [*command, f"--process={i}"], cwd=repo, env={**os.environ, "XLA_FLAGS": flags}, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]  # fmt: skip
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in pair]
    assert all(code == 0 for _, code in ends), [err[-2000:] for err, _ in ends]
    assert lines(place / "pair" / "clips" / "metrics.jsonl") == lines(place / "run" / "clips" / "metrics.jsonl")


def test_stages_apart_and_a_loss_that_explodes(place, repo):
    """A stage needs those it builds on; NaN stops it with step, term and samples, and leaves the last good step."""
    folder = place / "third"
    shared = (f"--workdir={folder}", f"--config.data.path={place / 'run' / 'data'}", "--config.clips.steps=6",
              "--config.clips.optimizer.learning_rate=3e38", "--config.save_every=1")  # fmt: skip
    early = start(repo, place, "train", *shared, "--config.only=('teacher',)")
    assert early.returncode == 2, early.stderr[-2000:]
    assert f"error: stage 'clips' of {folder} has not saved any of its 6 steps" in early.stderr
    lost = start(repo, place, "train", *shared, "--config.only=('clips',)")
    assert lost.returncode == 1 and "Traceback" not in lost.stderr, lost.stderr[-2000:]
    told = json.loads((folder / "clips" / "nonfinite.json").read_text())
    assert f"error: step {told['step']}: {told['names'][0]}" in lost.stderr and " not finite; batch: " in lost.stderr
    assert len(told["batch"]) == 4 and all(b["videos"][0].endswith(".mp4") for b in told["batch"].values())
    kept = sorted(path.name for path in (folder / "clips" / "checkpoints").glob("step_*"))
    assert not kept or int(kept[-1][5:]) < told["step"]


def test_eval_reproduces_the_report(place, repo):
    run = start(repo, place, "eval", f"--checkpoint={place / 'run'}", f"--out={place / 'eval'}")
    assert run.returncode == 0, run.stderr[-3000:]
    for path in sorted((place / "run" / "report" / "predictions").glob("*.jsonl")):
        assert (place / "eval" / "predictions" / path.name).read_bytes() == path.read_bytes(), path.name


def test_ask_from_a_file_and_from_a_memory_say_the_same(place, repo):
    video = place / "run" / "data" / "videos" / "test" / "000000.mp4"
    asked = (f"--checkpoint={place / 'run'}", f"--video={video}", "--question=how many in blue stripes ?")
    plain = start(repo, place, "ask", *asked, f"--picture={place / 'ask.png'}", config=False)
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert "visual tokens: 4 of" in plain.stdout and "decode per token" in plain.stdout and "event " in plain.stdout
    assert (place / "ask.png").stat().st_size > 10_000
    memory = place / "memory"
    indexed = start(
        repo, place, "index", f"--checkpoint={place / 'run'}", f"--memory={memory}",
        f"--videos={video},{place / 'tiny.py'}", config=False,
    )  # fmt: skip
    assert indexed.returncode == 1 and f"{place / 'tiny.py'}:" in indexed.stderr and "1 of 2 videos" in indexed.stdout
    recalled = start(repo, place, "ask", *asked, f"--memory={memory}", "--picture=", config=False)
    assert recalled.returncode == 0, recalled.stderr[-3000:]
    assert recalled.stdout.splitlines()[:4] == plain.stdout.splitlines()[:4]


def test_an_encoder_takes_the_place_of_the_retriever(place, repo):
    """A tiny random PE-Core, converted as a published one would be, embeds events and the question."""
    video = place / "run" / "data" / "videos" / "test" / "000000.mp4"
    published.write_encoder(place / "pe")
    run, encoder = f"--checkpoint={place / 'run'}", f"--encoder={place / 'pe'}"
    memory = f"--memory={place / 'memory_pe'}"
    indexed = start(repo, place, "index", run, encoder, "--pool=max", memory, f"--videos={video}", config=False)
    assert indexed.returncode == 0, indexed.stderr[-3000:]
    asked = (run, f"--video={video}", "--question=which", "--picture=", memory)
    answer = start(repo, place, "ask", *asked, encoder, "--pool=max", config=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "visual tokens: 4 of" in answer.stdout and "similarity" in answer.stdout
    told = start(repo, place, "ask", *asked, config=False)  # the memory knows its encoder
    assert told.returncode == 0 and told.stdout.splitlines()[:4] == answer.stdout.splitlines()[:4]
    stale = start(repo, place, "ask", *asked, "--pool=mean", config=False)
    assert stale.returncode == 2 and "pool: max in the memory, mean wanted" in stale.stderr
    absent = start(repo, place, "ask", *asked, f"--encoder={place / 'run' / 'data'}", config=False)
    assert absent.returncode == 2 and "--encoder:" in absent.stderr and absent.stderr.count("\n") == 1


def test_a_bad_file_is_one_line_and_exit_code_2(place, repo):
    (place / "empty.mp4").write_bytes(b"")
    for name in ("missing.mp4", "empty.mp4", "tiny.py"):
        run = start(
            repo, place, "ask", f"--checkpoint={place / 'run'}", f"--video={place / name}", "--question=why ?",
            f"--picture={place / 'bad.png'}", config=False,
        )  # fmt: skip
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and name in run.stderr, run.stderr
    assert not (place / "bad.png").exists()


def test_impossible_settings_stop_before_anything_compiles(place, repo):
    for argument, words in (
        ("--config.sft.view=nowhere", "config.sft.view = 'nowhere' is not one of config.views"),
        ("--config.cgrpo.group=1", "at least 2 rollouts"),
        ("--config.sft.stepz=3", "unknown key config.sft.stepz; did you mean config.sft.steps?"),
        ("--config.sft.steps=many", "config.sft.steps is of type int"),
        ("--config.data.size=50", "multiple of 28"),
    ):
        run = start(repo, place, "train", f"--workdir={place / 'never'}", argument)
        assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (place / "never").exists()
