"""The TFDS set: built and read back without TensorFlow, in worker processes too; bad rows as everywhere."""

import json
import pickle
import subprocess
import sys

import pytest

from data_pipelines import loader, sources
from data_pipelines.benchmarks.read import BadRows
from data_pipelines.video_r1 import __main__ as command
from data_pipelines.video_r1.builder import build
from data_pipelines.video_r1.read import Stored

ROWS = [
    {"problem_id": 7, "problem": "Was ist schön? Ω", "data_type": "video", "problem_type": "multiple choice",
     "options": ["A. a dog", "B. a cat"], "solution": "<answer>A</answer>", "path": "./a.mp4", "data_source": "s",
     "process": "<think>so</think>", "note": [1, None]},
    {"problem_id": "7", "problem": "How many?", "data_type": "image", "problem_type": "numerical",
     "solution": "<answer>3</answer>", "path": "./b.png"},
    {"problem_id": 9, "problem": "Where?", "data_type": "video", "problem_type": "free-form", "options": [],
     "solution": "<answer>here</answer>", "path": "./a.mp4"},
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "root" / "b.png").write_bytes(b"png")
    (tmp_path / "q.json").write_text(json.dumps(ROWS))
    return tmp_path


def load(record):
    return {"row": record.row, "length": len(record.problem)}


def test_records_come_back_as_they_were(place):
    folder, left = build(place / "q.json", root=str(place / "root"), out=place / "out")
    stored, plain = Stored(folder), sources.load_records(place / "q.json")
    assert left == [] and len(stored) == 3
    assert [vars(record) | {"line": None} for record in stored] == [vars(record) | {"line": None} for record in plain]
    assert sources.load_records(folder) == list(stored)
    with pytest.raises(sources.RecordError, match="no set"):
        sources.load_records(place)
    assert stored[-1].problem_id == 9 and stored.medium(0) is None
    with pytest.raises(IndexError):
        stored[3]
    with pytest.raises(FileExistsError, match="there already"):
        build(place / "q.json", root=str(place / "root"), out=place / "out")


def test_encoded_files_in_the_set(place):
    folder, _ = build(place / "q.json", root=str(place / "root"), out=place / "out", split="cot", media="bytes")
    stored = Stored(folder, "cot")
    assert stored.medium(2) == (place / "root" / "a.mp4").read_bytes() and stored.medium(1) == b"png"
    with pytest.raises(ValueError, match="no set with a split 'train'"):
        Stored(folder, "train")
    with pytest.raises(ValueError, match="no set"):
        Stored(place)


def test_batches_of_the_set_are_those_of_the_file(place):
    folder, _ = build(place / "q.json", root=str(place / "root"), out=place / "out")
    stored = pickle.loads(pickle.dumps(Stored(folder)))
    plain = sources.load_records(place / "q.json")
    found = [loader.dataset(records, load, batch_size=2, seed=1)[k] for records in (stored, plain) for k in (0, 5)]
    assert all((a["value"]["row"] == b["value"]["row"]).all() for a, b in zip(found[:2], found[2:], strict=True))


def test_bad_rows_stop_the_build_and_nothing_stays(place):
    rows = [*ROWS, ROWS[2] | {"problem_id": 10, "path": "../q.json"}, ROWS[2] | {"problem_type": "riddle"}]
    (place / "q.json").write_text(json.dumps(rows, indent=1))
    with pytest.raises(BadRows, match="2 of 5 rows") as caught:
        build(place / "q.json", root=str(place / "root"), out=place / "out")
    assert all(error.line for error in caught.value.errors) and not (place / "out").exists()
    arguments = [str(place / "q.json"), f"--root={place / 'root'}", f"--out={place / 'out'}"]
    assert command.main(arguments) == 2 and command.main([*arguments, "--skip_bad"]) == 0
    assert len(Stored(place / "out" / "video_r1" / "1.0.0")) == 3


def test_neither_building_nor_reading_loads_tensorflow(place, repo):
    code = (
        "import sys\nfrom data_pipelines.video_r1.builder import build\n"
        "from data_pipelines.video_r1.read import Stored\n"
        f"folder, _ = build({str(place / 'q.json')!r}, root={str(place / 'root')!r}, out={str(place / 'out')!r})\n"
        "print(len(Stored(folder)), [m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert out.stdout.strip().splitlines()[-1] == "3 []"
