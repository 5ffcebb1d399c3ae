"""Index once, ask many, in Python and as commands: on a run with random weights and rendered videos."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import sandbox
from data_pipelines.synthetic import build
from data_pipelines.video import VideoError, read_frames
from marc_jax import archive, checkpoint, optim, run, settings, synthetic
from marc_jax.archive import Archive
from marc_jax.config import ConfigError
from marc_jax.memory import embed, store
from marc_jax.memory.entry import ARRAYS
from marc_jax.models import qwen25_vl, transnetv2

QUESTION = "how many in blue stripes ?"
SMALL = {
    "vision": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
    "text": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16},
}


def save(folder: pathlib.Path, step: int, params: dict) -> None:
    flat = optim.flatten(params)
    checkpoint.save(folder / "checkpoints", step, {"params": flat}, {"trainable": sorted(flat)})


def write_run(workdir: pathlib.Path, repo: pathlib.Path, seed: int = 0, *changes: str) -> pathlib.Path:
    """A run as training leaves it: config, tokenizer, teacher, retriever and student."""
    changes = [*changes, *(f"--config.model.{p}.{key}={n}" for p, sizes in SMALL.items() for key, n in sizes.items())]
    config = settings.experiment(str(repo / "experiments" / "quickstart.py"), changes)
    workdir.mkdir()
    settings.keep(config, workdir / "config.json")
    build.vocabulary.write_tokenizer(workdir / "tokenizer.json")
    here = run.surroundings(config, workdir)
    for i, stage in enumerate(("teacher", "sft")):
        save(workdir / stage, config[stage].steps, qwen25_vl.init(here.cfg, jax.random.key(seed + i)))
    save(workdir / "retriever", config.retriever.steps, embed.init(jax.random.key(seed), here.embed_sizes()))
    return workdir


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("archive")
    write_run(folder / "run", repo)
    difficulty = synthetic.difficulty(settings.experiment(str(repo / "experiments" / "quickstart.py")).data)
    build.build(
        folder / "data", seed=1, sizes={"train": 1, "test": 4}, difficulty=difficulty, questions_per_video=1, workers=0
    )
    shutil.copytree(folder / "data" / "videos" / "test", folder / "videos" / "inside")
    (folder / "videos" / "text.mp4").write_text("no video\n")
    (folder / "videos" / "notes.txt").write_text("not looked at\n")
    (folder / "videos" / "empty.MKV").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def memory(place):
    """All videos of the folder, indexed once."""
    done = Archive(place / "memory", place / "run").index([place / "videos"])
    assert len(done.new) == 4 and done.videos == 6 and not done.same
    assert done.frames > 0 and done.events > 4 and done.bytes > 0 and done.video_seconds > 4
    assert {pathlib.Path(name).name: reason for name, reason in done.failed.items()} == {
        "text.mp4": "a text file, not a video", "empty.MKV": "the file is empty",
    }  # fmt: skip
    return place / "memory"


def python(repo, *arguments, **variables):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=repo, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags, **variables}, timeout=300,
    )  # fmt: skip


def start(repo, entry: str, *arguments):
    return python(repo, "-m", f"marc_jax.{entry}", *arguments)


def videos(place) -> list[str]:
    return sorted(map(str, (place / "videos" / "inside").iterdir()))


def test_the_five_lines_of_the_readme(place, memory):
    archive = Archive(memory)  # which run's model made it, it knows itself
    archive.index(videos(place))
    answer = archive.ask(QUESTION)
    assert answer.text is not None and 1 <= len(answer.events) <= 3 and answer.tokens == 4 < answer.all_tokens
    assert {e.video for e in answer.events} <= set(videos(place))
    assert all(0 <= e.begin < e.end and -1 <= e.score <= 1 and 1 <= e.number <= e.count for e in answer.events)
    assert 0 < answer.first_token and {"memory", "embed question", "search", "prefill"} <= set(answer.seconds)


def test_an_archive_is_answered_from_its_nearest_events(place, memory):
    archive = Archive(memory)
    query, best = archive.answerer.embed(QUESTION)[0], []
    for name in archive.reader:
        entry = archive.reader.head(name)
        assert entry.tokens.size == 0 and entry.event_seconds.max() <= entry.extra["duration"]
        best += [(-float(e @ query), name, i + 1) for i, e in enumerate(entry.event_embeddings)]
    want = sorted((name, number) for _, name, number in sorted(best)[:3])
    assert [(e.video, e.number) for e in archive.ask(QUESTION).events] == want


def test_one_video_says_the_same_from_its_file_a_memory_and_an_archive_of_one(place, memory, tmp_path):
    name = videos(place)[0]
    fresh = Archive(None, place / "run").ask(QUESTION, name)
    kept = Archive(memory).ask(QUESTION, name)
    single = Archive(tmp_path / "one", place / "run")
    single.index([name])
    for other in (kept, single.ask(QUESTION)):
        assert (other.text, other.tokens, other.all_tokens) == (fresh.text, fresh.tokens, fresh.all_tokens)
        assert [(e.number, e.begin, e.end, e.score) for e in other.events] == [
            (e.number, e.begin, e.end, e.score) for e in fresh.events
        ]


def test_tokens_read_back_are_those_computed_fresh(place, memory):
    """Bit for bit, with another compiled function of the same shape and in another process's order of chunks."""
    fresh = Archive(None, place / "run").indexer
    for name in videos(place):
        entry, again = Archive(memory).reader[name], fresh.file(name)
        for field in ARRAYS:
            a, b = getattr(entry, field), getattr(again, field)
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), field


@pytest.mark.parametrize("tokens, bits", [("bfloat16", 16), ("int8", 8)])
def test_tokens_may_be_stored_in_fewer_bits(place, memory, tmp_path, tokens, bits):
    archive = Archive(tmp_path / "small", place / "run")
    archive.index(videos(place)[:1], tokens=tokens)
    name = videos(place)[0]
    small, whole = archive.reader[name].tokens, Archive(memory).reader[name].tokens
    if tokens == "bfloat16":
        assert small.dtype.itemsize == 2 and small.tobytes() == whole.astype(small.dtype).tobytes()
    else:
        assert np.abs(small - whole).max() <= np.abs(whole).max() / 254 * 1.001
    assert archive.ask(QUESTION).tokens == 4


def test_what_is_there_is_not_done_again(place, memory, tmp_path):
    again = Archive(memory).index([place / "videos"])
    assert not again.new and len(again.same) == 4 and len(again.failed) == 2 and again.bytes == 0
    copy = shutil.copy(videos(place)[0], tmp_path / "another name.mp4")
    archive = Archive(memory)
    copied = archive.index([copy])
    assert copied.same == {str(copy): videos(place)[0]}
    assert archive.ask(QUESTION, copy).events[0].video == videos(place)[0]


def test_a_changed_file_is_stale_until_it_is_indexed_again(place, tmp_path):
    a, b = videos(place)[:2]
    name = str(shutil.copy(a, tmp_path / "film.mp4"))
    archive = Archive(tmp_path / "memory", place / "run")
    archive.index([name])
    shutil.copy(b, name)
    for asked in (name, None):
        with pytest.raises(store.StaleMemory, match=r"the file of video '.*film.mp4' has changed .* index it again"):
            archive.ask(QUESTION, asked)
    assert archive.index([name]).new == [name]
    now = archive.ask(QUESTION)
    assert len(archive.reader) == 1 and now.all_tokens == Archive(None, place / "run").ask(QUESTION, b).all_tokens
    os.unlink(name)
    assert archive.ask(QUESTION).text == now.text  # what is gone is remembered


def test_files_may_be_read_by_somebody_else(place, tmp_path):
    def read(path, **how):
        if path == videos(place)[0]:
            raise VideoError(path, "took too long")
        return read_frames(path, **how)

    done = Archive(tmp_path / "memory", place / "run").index(videos(place)[:2], read=read)
    assert done.failed == {videos(place)[0]: "took too long"} and done.new == [videos(place)[1]]


@pytest.fixture
def faulty(place, tmp_path):
    """(good and bad files, the reason of each bad one) where decoders do what a file's name says, within 3 s."""
    reasons = {
        "hang.mp4": "decoding took longer than 3 s",
        "segfault.mp4": "its decoder died (signal SIGSEGV)",
        "exits.mp4": "its decoder died (exit code 3: the library gave up)",
    }
    bad = {str(shutil.copy(videos(place)[2], tmp_path / name)): reason for name, reason in reasons.items()}
    return [list(bad)[0], videos(place)[0], *list(bad)[1:], videos(place)[1]], bad


def test_a_decoder_that_hangs_or_dies_costs_only_its_file(place, memory, faulty, tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox.Pool.__init__.__kwdefaults__, "decoder", "fake_decoders:read_or_fail")
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "data_pipelines")
    files, bad = faulty
    told = Archive(tmp_path / "memory", place / "run", decode_seconds=3)
    done = told.index(files)
    assert done.failed == bad and sorted(done.new) == videos(place)[:2] and not done.stopped
    with pytest.raises(VideoError, match="segfault.mp4: its decoder died"):
        Archive(None, place / "run", decode_seconds=3).ask(QUESTION, list(bad)[1])
    for name in done.new:  # what the children decode is what this process does
        kept, here = told.reader[name], Archive(memory).indexer.file(name)
        assert all(getattr(kept, f).tobytes() == getattr(here, f).tobytes() for f in ARRAYS)
    stopped = Archive(tmp_path / "other", place / "run").index(files, stop=lambda: True)
    assert stopped.stopped  # without waiting the half hour that a file may take


def test_index_says_what_hung_or_died_and_its_exit_code_too(repo, place, faulty, tmp_path):
    files, bad = faulty
    flags = [f"--memory={tmp_path / 'memory'}", f"--checkpoint={place / 'run'}", "--decode_seconds=3"]
    code = (
        "import data_pipelines.sandbox, marc_jax.index, marc_jax.config\n"
        "data_pipelines.sandbox.Pool.__init__.__kwdefaults__['decoder'] = 'fake_decoders:read_or_fail'\n"
        "marc_jax.config.run_main(marc_jax.index.main, arguments=True)"
    )
    folders = os.pathsep.join([*sys.path, str(repo / "tests" / "data_pipelines")])
    got = python(repo, "-c", code, *files, *flags, PYTHONPATH=folders)
    assert got.returncode == 1, got.stderr[-3000:]
    assert "2 of 5 videos" in got.stdout and "3 failed:" in got.stdout
    for name, reason in bad.items():
        assert f"error: {name}: {reason}" in got.stderr and f"  {name}: {reason}" in got.stdout


def test_stopping_leaves_what_was_done(place, tmp_path):
    archive = Archive(tmp_path / "memory", place / "run")
    calls = []
    done = archive.index(videos(place), stop=lambda: calls.append(1) or len(calls) == 2)
    assert done.stopped and len(done.new) == 2
    rest = archive.index(videos(place))
    assert not rest.stopped and len(rest.new) == 2 and len(rest.same) == 2


def test_shots_of_transnetv2_are_part_of_what_a_memory_is(place, tmp_path):
    cfg = transnetv2.Config(filters=1, width=4)
    model = {"model_type": "transnetv2", "filters": 1, "width": 4}
    checkpoint.save(tmp_path / "shots", 0, {"params": transnetv2.init(cfg, jax.random.key(0))}, {"model": model})
    name = videos(place)[0]
    Archive(tmp_path / "memory", place / "run", shots=str(tmp_path / "shots")).index([name])
    told = Archive(tmp_path / "memory")
    assert told.settings.shots == str(tmp_path / "shots")
    fresh = Archive(None, place / "run", shots=str(tmp_path / "shots"))
    assert told.ask(QUESTION, name).text == fresh.ask(QUESTION, name).text
    os.unlink(tmp_path / "memory" / archive.SETTINGS)
    with pytest.raises(store.StaleMemory, match="segmenter: transnetv2, threshold 0.5.* in the memory, events"):
        Archive(tmp_path / "memory", place / "run").ask(QUESTION)
    with pytest.raises(ConfigError, match="--shots: no checkpoint in .*nowhere"):
        Archive(None, place / "run", shots=str(tmp_path / "nowhere")).ask(QUESTION, name)


def test_another_runs_retriever_embeds(place, memory, repo, tmp_path):
    name = videos(place)[0]
    own = Archive(memory).ask(QUESTION, name)
    same = Archive(None, place / "run", encoder=str(place / "run")).ask(QUESTION, name)
    assert same.text == own.text and [e.number for e in same.events] == [e.number for e in own.events]
    np.testing.assert_allclose([e.score for e in same.events], [e.score for e in own.events], atol=1e-5)
    other = str(write_run(place / "retriever", repo, seed=3))
    Archive(tmp_path / "memory", place / "run", encoder=other).index([name])
    told = Archive(tmp_path / "memory")
    assert told.ask(QUESTION).text is not None and told.settings.encoder == other
    os.unlink(tmp_path / "memory" / archive.SETTINGS)
    with pytest.raises(store.StaleMemory, match="retriever: retriever 56px .* in the memory, [0-9a-f]{37}... wanted"):
        Archive(tmp_path / "memory", place / "run").ask(QUESTION)
    shutil.rmtree(place / "retriever" / "retriever")
    with pytest.raises(ConfigError, match="--encoder: stage 'retriever' of .*retriever has not saved any"):
        Archive(None, place / "run", encoder=other)


def test_a_memory_of_another_model_is_refused(place, memory, repo):
    other = write_run(place / "other", repo, seed=7)
    for use in (lambda a: a.ask(QUESTION), lambda a: a.index(videos(place))):
        with pytest.raises(store.StaleMemory, match="retriever: .* in the memory, .* wanted; tower: "):
            use(Archive(memory, other))
    assert Archive(memory).settings.checkpoint == str(place / "run")


def test_questions_that_cannot_be_answered_say_why(place, memory, tmp_path):
    with pytest.raises(ConfigError, match=r"the memory .* is empty; index videos first"):
        (tmp_path / "empty").mkdir()
        Archive(tmp_path / "empty", place / "run").ask(QUESTION)
    with pytest.raises(ConfigError, match="there is no memory .*nothing; index videos first"):
        Archive(tmp_path / "nothing", place / "run").ask(QUESTION)
    for name, why in (("nothing", "there is no memory"), ("empty", "the memory .*empty is empty")):
        with pytest.raises(ConfigError, match=f"--checkpoint=FOLDER is required: .* \\({why}"):
            Archive(tmp_path / name)
    with pytest.raises(ConfigError, match="--memory=.*text.mp4: a file, not a folder"):
        Archive(place / "videos" / "text.mp4", place / "run")
    with pytest.raises(ConfigError, match="does not hold .*notes.txt; add it with python -m marc_jax.index"):
        Archive(memory).ask(QUESTION, str(place / "videos" / "notes.txt"))
    with pytest.raises(ConfigError, match="looks at whole videos: name one with --video"):
        Archive(memory, view="full").ask(QUESTION)
    with pytest.raises(VideoError, match="text.mp4: a text file"):
        Archive(None, place / "run").ask(QUESTION, str(place / "videos" / "text.mp4"))
    (tmp_path / "empty" / archive.SETTINGS).write_text('{"checkpoint": "/gone"}')
    with pytest.raises(ConfigError, match="/gone: no run there .*empty was made with it: give --checkpoint=FOLDER"):
        Archive(tmp_path / "empty")
    (tmp_path / "empty" / archive.SETTINGS).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read .*; remove it and give --checkpoint"):
        Archive(tmp_path / "empty")


def test_whole_videos_are_answered_about_one_at_a_time(place, memory):
    answer = Archive(memory, view="full").ask(QUESTION, videos(place)[1])
    assert answer.events == () and answer.tokens == answer.all_tokens


def test_a_student_with_its_own_vision_tower_sees_the_videos_found(place, repo, tmp_path):
    own = write_run(place / "own", repo, 0, "--config.sft.visual=pixels")
    name = str(shutil.copy(videos(place)[0], tmp_path / "film.mp4"))
    archive = Archive(tmp_path / "memory", own)
    archive.index([name, videos(place)[1]])
    kept = archive.ask(QUESTION, name)
    assert kept.text == Archive(None, own).ask(QUESTION, name).text and "decode" in kept.seconds
    assert archive.ask(QUESTION).tokens == 4
    os.unlink(name)
    with pytest.raises(VideoError, match="film.mp4: no such file"):
        archive.ask(QUESTION, name)


def test_the_pictures_of_an_archive(place, memory, tmp_path):
    asker = Archive(memory)
    answer = asker.ask(QUESTION)
    asker.draw(tmp_path / "ask.html", answer)
    text = (tmp_path / "ask.html").read_text()
    assert text.count("data:image/jpeg;base64,") == len(answer.events) and "<script" not in text
    assert "http" not in text and all(e.video in text for e in answer.events) and QUESTION in text
    asker.draw(tmp_path / "ask.png", answer)
    assert (tmp_path / "ask.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"ask.html", "ask.png"}


def test_the_commands(place, repo, tmp_path):
    memory, texts = tmp_path / "memory", place / "videos" / "text.mp4"
    one, two, *_ = videos(place)
    good = start(repo, "index", one, two, f"--memory={memory}", "--checkpoint", place / "run")
    assert good.returncode == 0, good.stderr[-3000:]
    assert "2 of 2 videos" in good.stdout and "frames/s" in good.stdout and "per hour of video" in good.stdout
    some = start(repo, "index", f"--videos={one},{texts}", f"--memory={memory}")
    assert some.returncode == 1 and f"error: {texts}: a text file" in some.stderr, some.stderr[-3000:]
    assert "1 of 2 videos" in some.stdout and f"  {texts}: a text file, not a video" in some.stdout
    none = start(repo, "index", texts, tmp_path / "nowhere.mp4", "--memory", memory)
    assert none.returncode == 2 and "nowhere.mp4: no such file" in none.stderr and "Traceback" not in none.stderr
    asked = start(repo, "ask", "--memory", memory, "--question", QUESTION, "--picture", tmp_path / "a.html")
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert ".mp4, event " in asked.stdout and "first token" in asked.stdout and (tmp_path / "a.html").exists()
    wrong = start(repo, "index", "--memory", memory)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
