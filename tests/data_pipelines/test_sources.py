"""Question files: schema, errors that say where, media confined to the data root, and Video-R1's exact wording."""

import hashlib
import json
import os

import pytest

from data_pipelines import sources

ROW = {
    "problem_id": 7,
    "problem": "What moves?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a dog", "B. a cat"],
    "solution": "<answer>A</answer>",
    "path": "./clips/a.mp4",
    "data_source": "somewhere",
}


def write(path, rows, lines=False):
    path.write_text("\n".join(json.dumps(r) for r in rows) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_both_layouts_give_the_same_records(tmp_path, lines):
    records = sources.load_records(write(tmp_path / "q", [ROW, ROW | {"video_id": "x", "process": "<think>"}], lines))
    assert [r.row for r in records] == [0, 1]
    assert records[0].options == ("A. a dog", "B. a cat") and records[0].extra == {}
    assert records[1].extra == {"video_id": "x"} and records[1].process == "<think>"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"problem": ""}, "problem"),
        ({"problem": None}, "problem"),
        ({"solution": 3}, "solution"),
        ({"data_type": "audio"}, "data_type"),
        ({"problem_type": "Multiple choice"}, "problem_type"),
        ({"options": "A. B."}, "options"),
        ({"options": [1, 2]}, "options"),
        ({"options": []}, "options"),
        ({"path": "  "}, "path"),
        ({"problem_id": [1]}, "problem_id"),
        ({"process": {"a": 1}}, "process"),
    ],
)
def test_an_error_names_file_row_and_field(tmp_path, change, field):
    file = write(tmp_path / "q.json", [ROW, ROW | change, ROW])
    with pytest.raises(sources.RecordError) as caught:
        sources.load_records(file)
    assert (caught.value.row, caught.value.field) == (1, field)
    assert str(file) in str(caught.value) and "row 1" in str(caught.value) and repr(field) in str(caught.value)
    errors = []
    good = sources.load_records(file, errors=errors)
    assert [r.row for r in good] == [0, 2] and [e.row for e in errors] == [1]


@pytest.mark.parametrize("content", ["", "[]", "[{]", "\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(sources.RecordError, match="q.json"):
        sources.load_records(tmp_path / "q.json", errors=[])
    with pytest.raises(sources.RecordError, match="cannot be read"):
        sources.load_records(tmp_path / "absent.json")


def test_a_broken_line_is_one_bad_row(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW) + "\n{oops\n" + json.dumps(ROW) + "\n")
    errors = []
    assert [r.row for r in sources.load_records(tmp_path / "q.jsonl", errors=errors)] == [0, 2]
    assert "line 2" in str(errors[0])


def test_published_evaluation_files_load(test_data):
    files = sorted((test_data / "annotations" / "video_r1_eval").glob("*.json"))
    assert len(files) == 5
    for file in files:
        records = sources.load_records(file)
        assert len(records) == len(json.loads(file.read_text()))
        assert all(r.path.startswith("./") for r in records)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.mp4",
        "a/../../secret.mp4",
        "/etc/passwd",
        "~/x.mp4",
        "link.mp4",
        "dirlink/secret.mp4",
        "",
        " ",
        "x\0.mp4",
        "file:///etc/passwd",
        "http://host/x.mp4",
        "concat:good.mp4|good.mp4",
        "subfile,,start,0,end,9,,:good.mp4",
        "pipe:0",
        "folder",
        ".",
        "absent.mp4",
        "\\\\host\\x",
        "fifo",
    ],
)
def test_media_stays_under_the_root(tmp_path, path):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "good.mp4").write_bytes(b"good")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "dirlink").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    with pytest.raises(ValueError):
        sources.media_path(root, path)
    (root / "inner.mp4").symlink_to(root / "good.mp4")
    for inside in ("./good.mp4", "good.mp4", "folder/../good.mp4", "inner.mp4"):
        assert sources.media_path(root, inside) == str((root / "good.mp4").resolve())
    assert sources.confined_path(root, "absent.mp4") == str(root.resolve() / "absent.mp4")


def digest(text):
    return len(text), hashlib.sha256(text.encode()).hexdigest()


def test_templates_are_video_r1s_to_the_character():
    assert digest(sources.TRAIN_TEMPLATE)[0] == 480 and digest(sources.TRAIN_TEMPLATE)[1].startswith("c250cd90e06fd8f9")
    assert digest(sources.EVAL_TEMPLATE)[0] == 488 and digest(sources.EVAL_TEMPLATE)[1].startswith("bbbe96bd45c75a76")
    expected = {
        "multiple choice": (106, "7ec249c5"),
        "numerical": (90, "853b6e89"),
        "regression": (90, "853b6e89"),
        "OCR": (117, "d93be5c6"),
        "free-form": (68, "b5da6fec"),
    }
    assert {k: (digest(v)[0], digest(v)[1][:8]) for k, v in sources.TYPE_SUFFIX.items()} == expected


def test_question_text_joins_as_published():
    text = sources.question_text("Why?", "multiple choice", ["A. x", "B. y"])
    assert text.startswith("Why?Options:\nA. x\nB. y\n\nPlease think") and text.endswith(
        sources.TYPE_SUFFIX["multiple choice"]
    )
    text = sources.question_text("How many {Question}?", "numerical", ["A. x"], style="eval")
    assert text.startswith("How many {Question}?\nPlease") and "Options" not in text and "<think> and </think>" in text
    assert sources.question_text("Why?", "multiple choice", ["A. x", "B. y"], style="plain") == "Why?\nA. x\nB. y"
    assert sources.question_text("Why?", "free-form", style="plain") == "Why?"
    glued = sources.question_text("Why?", "multiple choice", ["A. x", "B. y"], style="glued")
    assert glued == "Why?Options:\nA. x\nB. y" and sources.question_text("Why?\n", "OCR", style="glued") == "Why?\n"
    with pytest.raises(ValueError, match="style"):
        sources.question_text("Why?", "free-form", style="loud")
    with pytest.raises(ValueError, match="problem_type"):
        sources.question_text("Why?", "freeform")
