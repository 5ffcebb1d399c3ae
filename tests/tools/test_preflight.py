"""The pre-flight: every kind of bad row is found with its line, good data is clean, tokens and sizes are counted."""

import json
import shutil

import cv2
import numpy as np
import pytest

from tools import preflight

ROW = {
    "problem_id": 1, "problem": "What moves?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. a dog", "B. a cat"], "solution": "<answer>A</answer>", "path": "./dog.mp4", "data_source": "s",
}  # fmt: skip
QUICK = ["--max_frames=4", "--fps=1", "--frame_tokens=16", "--workers=1", "--quiet"]


@pytest.fixture(scope="module")
def root(tmp_path_factory, test_data):
    folder = tmp_path_factory.mktemp("media")
    shutil.copyfile(test_data / "videos" / "dog.mp4", folder / "dog.mp4")
    (folder / "cut.mp4").write_bytes((test_data / "videos" / "dog.mp4").read_bytes()[:4000])
    (folder / "text.mp4").write_text("ffconcat version 1.0\nfile 'dog.mp4'\n")
    cv2.imwrite(str(folder / "photo.png"), np.zeros((90, 60, 3), np.uint8))
    return folder


def run(root, tmp_path, rows, *more):
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1))
    report = tmp_path / "r.json"
    code = preflight.main([str(tmp_path / "q.json"), f"--root={root}", f"--report={report}", *QUICK, *more])
    return code, json.loads(report.read_text())


def test_clean_data(root, tmp_path):
    image = {"problem_id": 2, "data_type": "image", "path": "./photo.png", "problem_type": "free-form", "options": []}
    code, found = run(root, tmp_path, [ROW, ROW | image])
    assert code == 0 and found["clean"] and found["rows"] == found["usable"] == 2
    assert found["sizes"]["visual_tokens"]["count"] == 2 and found["sizes"]["bytes"]["sum"] > 1000
    assert found["kinds"]["data_type"] == {"video": 1, "image": 1} and found["decoded"] == 2


def test_every_bad_row_is_found_with_its_line(root, tmp_path):
    bad = {
        "options": {"options": []}, "solution": {"solution": "<answer>C</answer>"}, "path": {"path": "../x.mp4"},
        "problem_type": {"problem_type": "riddle"}, "problem_id": {"problem_id": 1},
    }  # fmt: skip
    rows = [ROW] + [ROW | {"problem_id": 10 + i} | change for i, change in enumerate(bad.values())]
    rows += [ROW | {"problem_id": 20 + i, "path": p} for i, p in enumerate(("./cut.mp4", "./text.mp4", "./gone.mp4"))]
    rows += [ROW | {"problem_id": 30, "problem_type": "regression", "options": [], "solution": "<answer>x</answer>"},
             ROW | {"problem_id": 31, "solution": "A"}]  # fmt: skip
    code, found = run(root, tmp_path, rows)
    assert code == 1 and found["usable"] == 1 and found["rows"] == 11
    fields = {p["row"]: p["field"] for p in found["problems"]}
    assert fields == {i: name for i, name in enumerate(bad, 1)} | {6: "path", 7: "path", 8: "path", 9: "solution",
                                                                  10: "solution"}  # fmt: skip
    assert all(p["line"] and p["reason"] for p in found["problems"])
    assert preflight.main([str(tmp_path / "q.json"), f"--root={root}", f"--report={tmp_path / 'r.html'}", *QUICK]) == 1
    page = (tmp_path / "r.html").read_text()
    assert "1 of 11 rows can be used" in page and "the beginning of none of the 2 options" in page


def test_files_can_be_looked_at_without_decoding(root, tmp_path):
    code, found = run(root, tmp_path, [ROW, ROW | {"problem_id": 2, "path": "./cut.mp4"}], "--decode=0")
    assert code == 0 and found["decoded"] == 0 and found["media"] == 2
    assert list(preflight.spread(dict.fromkeys("abcde"), 3)) == ["a", "c", "e"]


def test_what_cannot_be_looked_at(root, tmp_path, capsys):
    assert preflight.main([str(tmp_path / "none.json"), f"--root={root}"]) == 2
    assert preflight.main([str(tmp_path / "none.json"), f"--root={tmp_path / 'gone'}"]) == 2
    assert "none.json" in capsys.readouterr().err


def test_tokens_of_text_and_a_benchmark_in_its_own_form(root, tmp_path, test_data):
    code = preflight.main([
        str(test_data / "annotations" / "nextqa" / "val.csv"), "--benchmark=nextqa", f"--root={root}", "--decode=0",
        f"--tokenizer={test_data / 'tokenizer' / 'qwen2.5'}", f"--report={tmp_path / 'r.json'}",
    ])  # fmt: skip
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 1 and found["rows"] == 200 and found["usable"] == 0  # no video is there
    assert 100 < found["sizes"]["question_tokens"]["p50"] < 400
