"""Benchmark files in their published forms and in Video-R1's schema; every bad row is named with its line."""

import json

import pytest

from data_pipelines import rows
from data_pipelines.benchmarks import published
from data_pipelines.benchmarks.read import BadRows, read
from marc_jax.evaluation import benchmarks, submissions

VSI = {
    "id": 0, "dataset": "arkitscenes", "scene_name": "41069025", "question_type": "object_counting",
    "question": "How many table(s) are in this room?", "ground_truth": "4", "options": None,
}  # fmt: skip
VSI_CHOICE = VSI | {
    "id": 1, "question_type": "route_planning", "options": ["A. Back", "B. Left"], "ground_truth": "B",
}  # fmt: skip
MME = {
    "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "videoID": "abc",
    "question_id": "001-1", "task_type": "Counting Problem", "question": "How many?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
}  # fmt: skip
MVBENCH = {"video": "v.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y", "start": 1.5, "end": 9}
MMVU = {
    "id": "validation_1", "video": "https://huggingface.co/x/resolve/main/videos/Art/0.mp4",
    "question_type": "multiple-choice", "question": "Which?", "choices": {"A": "a", "B": "b"}, "answer": "B",
}  # fmt: skip
VIDEO_R1 = {
    "problem_id": 3, "problem": "What moves?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. a dog", "B. a cat"], "solution": "<answer>A</answer>", "path": "./clips/a.mp4",
}  # fmt: skip


def lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def indented(path, value):
    path.write_text(json.dumps(value, indent=1))
    return path


def test_vsibench_lines(tmp_path):
    number, choice = read("vsibench", lines(tmp_path / "test.jsonl", [VSI, VSI_CHOICE])).records
    assert (number.problem_type, number.solution, number.path) == (
        "regression", "<answer>4</answer>", "arkitscenes/41069025.mp4",
    )  # fmt: skip
    assert choice.options == ("A. Back", "B. Left") and choice.solution == "<answer>B</answer>"
    assert [r.extra["question_type"] for r in (number, choice)] == ["object_counting", "route_planning"]
    assert (choice.row, choice.line) == (1, 2)


def test_videomme_takes_the_folder_that_has_the_video(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "abc.mp4").write_bytes(b"x")
    (record,) = read("videomme", indented(tmp_path / "q.json", [MME]), root=tmp_path).records
    assert record.path == "videos/abc.mp4" and record.extra["duration"] == "short"
    assert record.extra["published"]["question_id"] == record.problem_id == "001-1"


def test_videomme_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([MME, MME | {"question_id": "2"}]), tmp_path / "t.parquet")
    records = read("videomme", tmp_path / "t.parquet").records
    assert [r.problem_id for r in records] == ["001-1", "2"] and records[0].line is None


def test_parquet_files_are_of_the_task_of_their_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for task, answer in (("yes_no", "no"), ("captioning", "B. run")):
        (tmp_path / task).mkdir()
        rows = [{"video_id": "77", "dim": "action", "question": "Is it?", "answer": answer}] * 2
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / task / "test-00000-of-00001.parquet")
    found = [r.problem_id for r in read("tempcompass", tmp_path).records]
    assert found == [f"{task}/77/action/{i}" for task in ("captioning", "yes_no") for i in (0, 1)]


def test_mvbench_folder_knows_task_and_cut(tmp_path):
    indented(tmp_path / "action_sequence.json", [MVBENCH])
    indented(tmp_path / "state_change.json", [MVBENCH, MVBENCH | {"answer": "y "}])
    first, second, third = read("mvbench", tmp_path).records
    assert first.extra["clip"] == (1.5, 9.0) and "clip" not in second.extra
    assert first.path == "star/Charades_v1_480/v.mp4" and first.solution == third.solution == "<answer>B</answer>"
    assert [r.extra["question_type"] for r in (first, second)] == ["action_sequence", "state_change"]
    assert first.options == ("A. x", "B. y")


def test_all_four_tasks_of_tempcompass(tmp_path):
    def one(name, question, answer):
        indented(tmp_path / f"{name}.json", {"77": {"action": [{"question": question, "answer": answer}]}})

    one("multi-choice", "What?\nA. run\nB. swim", "B. swim")
    one("yes_no", "Is it?", "no")
    one("caption_matching", "Which?\nOption 1: He runs.\nOption 2: He swims.", "Option 2: He swims.")
    one("captioning", "Describe:\nInformation A: ...", "B. swimming")
    indented(tmp_path / "meta_info.json", {"77": {}})
    found = {r.extra["task"]: r for r in read("tempcompass", tmp_path).records}
    assert set(found) == set(published.TEMPCOMPASS_TASKS)
    assert found["multi-choice"].problem == "What?" and found["multi-choice"].options == ("A. run", "B. swim")
    assert found["yes_no"].options == ("A. yes", "B. no") and found["yes_no"].solution == "<answer>B</answer>"
    assert found["caption_matching"].options == ("A. He runs.", "B. He swims.")
    assert found["captioning"].problem_type == "free-form"
    assert found["multi-choice"].problem_id == "multi-choice/77/action/0" and found["yes_no"].line == 4


def test_mmvu_videommmu_nextqa(tmp_path):
    (record,) = read("mmvu", indented(tmp_path / "validation.json", [MMVU])).records
    assert (record.path, record.extra["question_type"], record.solution) == (
        "videos/Art/0.mp4", "Art", "<answer>B</answer>",
    )  # fmt: skip
    row = {"id": "dev_Art_Theory_3", "question": "<image 1> What?", "options": ["p", "q"], "answer": "A"}
    opened = {"id": "dev_Math_1", "question": "How much?", "options": [], "answer": "1.5", "question_type": "open"}
    file = indented(tmp_path / "adaptation_video.json", {"Adaptation": {"0": row, "1": opened}})
    choice, text = read("videommmu", file).records
    assert (choice.path, choice.problem, choice.options) == ("Art/dev_Art_Theory_3.mp4", "What?", ("A. p", "B. q"))
    assert text.problem_type == "free-form" and text.solution == "<answer>1.5</answer>"
    (tmp_path / "val.csv").write_text(
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n9,3,4,5,why,2,6,CW,a,b,c,d,e\n"
    )
    (record,) = read("nextqa", tmp_path / "val.csv").records
    assert (record.problem_id, record.solution, record.line) == ("9_6", "<answer>C</answer>", 2)


@pytest.mark.parametrize(
    ("benchmark", "row", "field", "reason"),
    [
        ("vsibench", VSI | {"question_type": "object_color"}, "question_type", "not one of"),
        ("vsibench", VSI | {"ground_truth": "four"}, "ground_truth", "not a number"),
        ("vsibench", VSI_CHOICE | {"options": None}, "options", "0 options"),
        ("vsibench", VSI_CHOICE | {"ground_truth": "C"}, "ground_truth", "not one of the letters of 2"),
        ("vsibench", VSI | {"scene_name": None}, "scene_name", "missing"),
        ("vsibench", VSI | {"dataset": "../../etc"}, "path", "out of the data root"),
        ("videomme", MME | {"options": ["A. One.", ""]}, "options", "option B"),
        ("videomme", MME | {"duration": "epic"}, "duration", "not one of"),
        ("mmvu", MMVU | {"answer": "E"}, "answer", "not one of the letters"),
        ("videomme", VIDEO_R1 | {"solution": "<answer>C</answer>"}, "solution", "none of the 2 options"),
        ("videomme", VIDEO_R1 | {"path": "/etc/passwd"}, "path", "not relative"),
        ("videomme", VIDEO_R1 | {"options": []}, "options", "fewer than 2"),
        ("videomme", VIDEO_R1 | {"options": ["A. a dog", " "]}, "options", "without text"),
        ("videomme", VIDEO_R1 | {"solution": "A"}, "solution", "not <answer>"),
        ("videomme", VIDEO_R1 | {"solution": "<answer>a dog</answer>"}, "solution", "none of the 2 options"),
        ("videomme", VIDEO_R1 | {"duration": 3}, "duration", "not a text"),
        ("videomme", MME | {"options": "A. One."}, "options", "not a list of texts"),
        ("vsibench", VSI | {"ground_truth": "inf"}, "ground_truth", "not a number"),
        ("mmvu", MMVU | {"choices": {"B": "a", "C": "b"}}, "choices", "not an object of A, B"),
        ("mmvu", MMVU | {"metadata": ["Art"]}, "metadata", "not an object"),
    ],
)
def test_a_bad_row_is_named_and_left_out_on_request(tmp_path, benchmark, row, field, reason):
    good = {"vsibench": VSI | {"id": 9}, "videomme": MME | {"question_id": "9"}, "mmvu": MMVU | {"id": "9"}}[benchmark]
    good = VIDEO_R1 | {"problem_id": 9} if "solution" in row else good
    file = lines(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(BadRows, match="1 of 2 rows cannot be used") as caught:
        read(benchmark, file)
    (error,) = caught.value.errors
    assert (error.row, error.line, error.field) == (1, 2, field) and reason in error.reason
    kept = read(benchmark, file, skip_bad=True)
    assert (len(kept.records), len(kept.errors), kept.total) == (1, 1, 2)


MOMENT = {
    "qid": 1, "query": "a dog", "duration": 10, "vid": "v", "relevant_windows": [[0, 4]], "relevant_clip_ids": [0, 1],
    "saliency_scores": [[4, 3, 2], [1, 4, 3]],
}  # fmt: skip
FORMS = [("vsibench", VSI), ("vsibench", VSI_CHOICE), ("videomme", MME), ("mmvu", MMVU), ("qvhighlights", MOMENT)]
FORMS += [
    (name, VIDEO_R1) for name in ("vsibench", "videomme", "mmvu", "mvbench", "videommmu", "tempcompass", "nextqa")
]
STRANGE = (None, "", 7, -1.5, float("nan"), True, [], {}, [None], [[1]], [["a", "b"]], {"A": 1}, "\0", "9" * 5000)


@pytest.mark.parametrize("benchmark,row", FORMS, ids=[f"{name}-{len(row)}" for name, row in FORMS])
def test_no_value_of_a_strange_kind_is_more_than_a_bad_row(tmp_path, benchmark, row):
    for field in row:
        for value in STRANGE:
            questions = read(benchmark, lines(tmp_path / "q.jsonl", [row | {field: value}, row]), skip_bad=True)
            assert len(questions.records) + len(questions.errors) == 2, (field, value)
            said = [{"problem_id": record.problem_id, "completion": "A"} for record in questions.records]
            for rule in benchmarks.RULES if benchmark != "qvhighlights" else ():
                benchmarks.judged(benchmark, questions.records, said, rule)
                submissions.files(benchmark, questions.records, said)


@pytest.mark.parametrize("benchmark", [name for name in benchmarks.BENCHMARKS if name != "qvhighlights"])
def test_every_rule_scores_every_benchmark_in_video_r1s_schema(tmp_path, benchmark):
    yes_no = VIDEO_R1 | {"problem_id": 4, "options": ["A. no", "B. yes"], "solution": "<answer>B</answer>"}
    records = read(benchmark, indented(tmp_path / "eval.json", [VIDEO_R1, yes_no])).records
    for letters, want in (("AB", [1, 1]), ("BA", [0, 0])):
        texts = [f"<answer>{letter}</answer>" for letter in letters]
        said = [{"problem_id": r.problem_id, "completion": x} for r, x in zip(records, texts, strict=True)]
        for rule in benchmarks.RULES:
            assert [row["score"] for row in benchmarks.judged(benchmark, records, said, rule)] == want, rule
        assert submissions.files(benchmark, records, said)


def test_highlights_are_no_questions_of_video_r1s_schema(tmp_path):
    with pytest.raises(BadRows, match="field 'vid': is missing"):
        read("qvhighlights", lines(tmp_path / "q.jsonl", [VIDEO_R1]))


def test_ids_met_twice_absent_videos_and_links_out(tmp_path):
    root, secret = tmp_path / "root", tmp_path / "secret.mp4"
    root.mkdir()
    secret.write_bytes(b"x")
    (root / "in.mp4").write_bytes(b"x")
    (root / "out.mp4").symlink_to(secret)
    made = [("in", 1), ("in", 1), ("gone", 2), ("out", 3)]
    file = indented(tmp_path / "q.json", [VIDEO_R1 | {"problem_id": i, "path": f"./{p}.mp4"} for p, i in made])
    with pytest.raises(BadRows) as caught:
        read("mvbench", file, root=root)
    found = [(e.row, e.field) for e in caught.value.errors]
    assert found == [(1, "problem_id"), (2, "path"), (3, "path")]
    text = str(caught.value)
    assert "the id of line 2 too" in text and "does not exist" in text and "out of the data root" in text
    assert [r.path for r in read("mvbench", file, root=root, skip_bad=True).records] == ["./in.mp4"]


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    text = json.dumps([VIDEO_R1, VIDEO_R1 | {"problem_id": 4, "problem": "caf@?"}], indent=1).encode()
    (tmp_path / "q.json").write_bytes(text.replace(b"@", b"\xe9"))
    kept = read("videomme", tmp_path / "q.json", skip_bad=True)
    assert [r.problem_id for r in kept.records] == [3]
    assert kept.errors[0].line == 16 and "0xe9" in str(kept.errors[0])
    (tmp_path / "q.json").write_bytes(text.decode().encode("utf-16"))
    with pytest.raises(rows.RecordError, match="UTF-16"):
        read("videomme", tmp_path / "q.json")
    (tmp_path / "q.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert len(read("videomme", tmp_path / "q.json").records) == 2


def test_a_broken_file_says_where(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([VIDEO_R1], indent=1)[:-4])
    with pytest.raises(rows.RecordError, match="is no JSON.*line 1[0-9]"):
        read("videomme", tmp_path / "q.json")
    (tmp_path / "val.csv").write_text("video,question,answer,qid,type,a0,a1,a2,a3,a4\n9,why,2,6,CW,a,b\n")
    with pytest.raises(BadRows, match="holds 7 fields, its header 10 .line 2"):
        read("nextqa", tmp_path / "val.csv")
    with pytest.raises(ValueError, match="not one of vsibench"):
        read("imagenet", tmp_path)


@pytest.mark.parametrize("text", ['{"a": [1, {"b": 2}], "c": {}}', "[]", "{}", ' [1, "x" ] ', "[[1], [2, 3]]"])
def test_members_are_those_of_json(text):
    value = json.loads(text)
    expected = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = list(rows.members(text, 0))
    assert [(key, item) for key, _, _, item in found] == expected
    assert [json.loads(text[a:b]) for _, a, b, _ in found] == [item for _, item in expected]


@pytest.mark.parametrize("text", ["", "3", "[1,]", "[1 2]", "[1", '{"a" 1}', "{a: 1}", "[1] 2", '{"a": 1,}'])
def test_what_is_no_json_raises(text):
    with pytest.raises(json.JSONDecodeError):
        list(rows.members(text, 0))
    with pytest.raises(json.JSONDecodeError):
        assert not isinstance(json.loads(text), list | dict)
        raise json.JSONDecodeError("a number is none", text, 0)


@pytest.mark.parametrize(
    ("benchmark", "file", "count"),
    [
        ("vsibench", "video_r1_eval/eval_vsibench.json", 250),
        ("mvbench", "video_r1_eval/eval_mvbench.json", 200),
        ("videomme", "video_r1_eval/eval_videomme.json", 213),
        ("videommmu", "video_r1_eval/eval_videommmu.json", 201),
        ("mmvu", "video_r1_eval/eval_mmvu.json", 134),
        ("mmvu", "mmvu/validation.json", 212),
        ("tempcompass", "tempcompass", 3033),
        ("videommmu", "videommmu", 210),
        ("nextqa", "nextqa/val.csv", 200),
        ("qvhighlights", "qvhighlights/highlight_val_release.jsonl", 1550),
    ],
)
def test_published_files(test_data, benchmark, file, count):
    questions = read(benchmark, test_data / "annotations" / file)
    assert (len(questions.records), questions.total, questions.errors) == (count, count, [])
    assert all(record.extra["question_type"] for record in questions.records)
    assert all(record.line > 0 and "paths" not in record.extra for record in questions.records)
