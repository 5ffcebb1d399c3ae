"""A corpus through Apache Beam: the direct runner, in this process and with several worker processes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from test_archive import write_run

from data_pipelines.synthetic import build
from marc_jax import index_with_beam, settings, synthetic
from marc_jax.archive import Archive
from marc_jax.memory import store
from marc_jax.memory.entry import ARRAYS


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo):
    pytest.importorskip("apache_beam", reason="Beam is the [beam] extra, in an environment of its own")
    folder = tmp_path_factory.mktemp("beam")
    write_run(folder / "run", repo)
    difficulty = synthetic.difficulty(settings.experiment(str(repo / "experiments" / "quickstart.py")).data)
    build.build(
        folder / "data", seed=1, sizes={"train": 1, "test": 4}, difficulty=difficulty, questions_per_video=1, workers=0
    )
    shutil.copytree(folder / "data" / "videos" / "test", folder / "videos")
    (folder / "videos" / "text.mp4").write_text("no video\n")
    return folder


def entries(memory: pathlib.Path) -> list:
    """[video id, hash] of every entry of every shard, repeated ones too."""
    shards = memory.glob("*.arrayrecord")
    return sorted(entry for shard in shards for entry in store._index(shard, store._open(shard))["videos"])


def failures(path: pathlib.Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_several_workers_write_what_one_does(place, repo):
    """Two processes on one memory; then the same again, which finds everything there."""
    memory, alone = place / "memory", Archive(place / "alone", place / "run")
    alone.index([place / "videos"])
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    command = [
        sys.executable, "-m", "marc_jax.index_with_beam", place / "videos", place / "nowhere.mp4",
        f"--memory={memory}", "--checkpoint", place / "run", "--batch=1", "--runner=FnApiRunner",
        "--direct_running_mode=multi_processing", "--direct_num_workers=2",
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], cwd=repo, capture_output=True, text=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert "4 of 6 videos in" in done.stdout and "4 new, 0 there before" in done.stdout and "2 failed" in done.stdout
    wrong = {str(place / "videos" / "text.mp4"): "a text file, not a video", str(place / "nowhere.mp4"): "no such file"}
    assert failures(memory / "failed.jsonl") == wrong
    assert entries(memory) == sorted(map(list, alone.reader.contents().items()))  # each of them once
    there = Archive(memory)
    for name in alone.reader:
        mine, theirs = alone.reader[name], there.reader[name]
        for field in ARRAYS:
            assert getattr(mine, field).tobytes() == getattr(theirs, field).tobytes(), field
    assert there.ask("how many in blue stripes ?").tokens == 4


def test_what_is_there_is_not_done_again(place, capsys, tmp_path):
    flags = [f"--memory={tmp_path / 'm'}", f"--failed={tmp_path / 'failed.txt'}", "--batch=3"]
    arguments = [str(place / "videos"), *flags]
    assert index_with_beam.main([*arguments, f"--checkpoint={place / 'run'}"]) == 1
    shards = set((tmp_path / "m").glob("*.arrayrecord"))
    assert len(shards) == 2 and "4 of 5 videos" in capsys.readouterr().out
    (place / "videos" / "text.mp4").rename(place / "text.mp4")
    try:
        assert index_with_beam.main(arguments) == 0  # which run made it, the memory knows
    finally:
        (place / "text.mp4").rename(place / "videos" / "text.mp4")
    assert "4 of 4 videos" in (said := capsys.readouterr().out) and "0 new, 4 there before" in said
    assert failures(tmp_path / "failed.txt") == {} and shards == set((tmp_path / "m").glob("*.arrayrecord"))


def test_what_the_user_must_mend_is_every_files_reason(place, repo, capsys, tmp_path):
    name = next(str(path) for path in (place / "videos").iterdir() if path.name != "text.mp4")
    Archive(tmp_path / "m", place / "run").index([name])
    other = write_run(tmp_path / "other", repo, seed=7)
    assert index_with_beam.main([name, f"--memory={tmp_path / 'm'}", f"--checkpoint={other}"]) == 2
    assert "0 of 1 videos" in capsys.readouterr().out
    assert "made by another model or other settings" in failures(tmp_path / "m" / "failed.jsonl")[name]


def test_lists_hold_every_file_and_places_without_any(tmp_path):
    (tmp_path / "empty").mkdir()
    for i in range(5):
        (tmp_path / f"{i}.mp4").touch()
    found = list(index_with_beam.lists([str(tmp_path), str(tmp_path / "empty")], 2))
    assert [len(names) for names in found] == [2, 2, 2] and found[-1][-1] == str(tmp_path / "empty")


def test_flags_that_are_not_ours_are_beams(capsys):
    known, places, beams = index_with_beam.arguments(["a.mp4", "--memory", "m", "--runner=FlinkRunner", "b.mp4"])
    assert places == ["a.mp4", "b.mp4"] and known.memory == "m" and beams == ["--runner=FlinkRunner"]
    for wrong in (["a.mp4"], ["--memory=m"], ["a.mp4", "--memory=m", "--batch=0"]):
        with pytest.raises(SystemExit, match="2"):
            index_with_beam.arguments(wrong)
    assert "--batch=0 must be at least 1" in capsys.readouterr().err
