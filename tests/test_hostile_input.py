"""Data from strangers runs no code: nothing unpickles or evaluates, and files that would are refused unread."""

import ast
import json
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.sources import RecordError, confined_path, load_records, parse_record
from data_pipelines.video import VideoError, read_frames
from marc_jax import checkpoint, manifest, pretrained
from marc_jax.config import ConfigError, UserError
from marc_jax.memory import store
from marc_jax.models import qwen25_vl, weights
from marc_jax.models.safetensors_io import WeightsError

REPO = pathlib.Path(__file__).resolve().parent.parent
CALLS = {"eval", "exec", "__import__", "compile"}
METHODS = {"unsafe_load", "full_load", "load_module", "exec_module", "system", "popen", "getoutput"}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
# A config file is code by design, and the README says so.
ALLOWED = {("marc_jax/config.py", "exec"), ("marc_jax/config.py", "compile")}


def offences(path: pathlib.Path) -> set[tuple[str, str]]:
    name, found = str(path.relative_to(REPO)), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                found.add((name, called.id))
            if isinstance(called, ast.Attribute) and called.attr in METHODS:
                found.add((name, called.attr))
            on = {k.arg for k in node.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is False)}
            found |= {(name, keyword) for keyword in on & KEYWORDS}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {(name, root) for root in roots if root.split(".")[0] in MODULES}
    return found


def test_nothing_that_runs_evaluates_or_unpickles():
    files = [path for room in ("marc_jax", "data_pipelines") for path in (REPO / room).rglob("*.py")]
    assert len(files) > 50
    assert set().union(*map(offences, files)) == ALLOWED


def test_the_search_finds_what_it_looks_for(tmp_path, monkeypatch):
    bad = ("import yaml", "from pickle import loads", "eval('1')", "os.system('x')", "f(shell=1, allow_pickle=False)")
    (tmp_path / "a.py").write_text("\n".join(bad))
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    assert {what for _, what in offences(tmp_path / "a.py")} == {"yaml", "pickle", "eval", "system", "shell"}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return pathlib.Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def bomb(canary) -> bytes:
    data = pickle.dumps(Bomb(canary))
    pickle.loads(data)
    assert canary.exists()  # it works
    canary.unlink()
    return data


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.pkl", "model.npy"])
def test_weights_that_are_pickles_are_refused_unread(tmp_path, bomb, canary, name):
    folder = tmp_path / "weights"
    folder.mkdir()
    cfg = qwen25_vl.tiny()
    (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg)))
    if name.endswith(".npy"):
        np.save(folder / name, np.array([Bomb(canary)], object), allow_pickle=True)
    else:
        (folder / name).write_bytes(bomb)
    with pytest.raises((UserError, WeightsError), match=str(folder)):
        pretrained.load(str(folder), cfg, qwen25_vl.abstract(cfg))
    assert not canary.exists()


def test_checkpoints_memories_videos_and_questions_that_are_pickles_are_refused_unread(tmp_path, bomb, canary):
    step = tmp_path / "checkpoint" / "step_00000001"
    (step / "tree").mkdir(parents=True)
    for name in ("tree/_METADATA", "tree/manifest.ocdbt", "meta.json"):
        (step / name).write_bytes(bomb)
    with pytest.raises(checkpoint.CheckpointError, match="manifest.json is missing"):
        checkpoint.restore(tmp_path / "checkpoint", {"x": np.ones(2)})
    manifest.write(step, {"step": 1, "leaves": {"x": [[2], "float64"]}})  # as its sender would
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.restore(tmp_path / "checkpoint", {"x": np.ones(2)})
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / f"0{store.SUFFIX}").write_bytes(bomb)
    with pytest.raises(store.StoreError):
        store.MemoryReader(memory, None)
    (tmp_path / "a.mp4").write_bytes(bomb)
    with pytest.raises(VideoError):
        read_frames(tmp_path / "a.mp4")
    (tmp_path / "train.json").write_bytes(bomb)
    with pytest.raises(RecordError):
        load_records(tmp_path / "train.json")
    assert not canary.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["problem_id", "problem", "data_type", "problem_type", "options", "solution", "path", "more"])
GOOD = {"problem": "which ?", "data_type": "video", "problem_type": "free-form", "solution": "x", "path": "./a.mp4"}


@given(JSON | st.dictionaries(FIELDS, JSON, max_size=4).map(lambda changes: GOOD | changes))
def test_any_row_is_a_record_or_an_error_that_names_file_and_row(row):
    try:
        record = parse_record(row, "rows.json", 3)
    except RecordError as error:
        assert str(error).startswith("rows.json, row 3")
    else:
        assert all(isinstance(x, str) and x.strip() for x in (record.problem, record.solution, record.path))


PIECES = ["..", ".", "/", "a", "~", "\\", "://", "concat:", "subfile,,", "\0", " ", "|", "%2e", "\ud800", "é", "etc"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join))
def test_any_path_stays_under_the_root_or_is_refused(path):
    try:
        where = confined_path("/data/root", path)
    except ValueError:
        return
    assert where.startswith("/data/root/") and ".." not in where.split("/")


def test_values_of_the_command_line_are_literals_not_expressions(canary):
    from marc_jax import config, settings

    text = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    for key in ("stages", "seed", "init_from", "data.events"):
        try:
            config.load(settings.base(), None, [f"--config.{key}={text}"])
        except ConfigError:
            pass
    assert not canary.exists()
