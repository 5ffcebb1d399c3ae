"""From predictions to each benchmark's number: three rules, macro averages, breakdowns, comparisons, submissions."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.benchmarks.read import read
from data_pipelines.sources import Record
from marc_jax.evaluation import benchmarks, intervals, report, submissions, table

DIRECTIONS = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]


def question(i, kind, truth, options=("A. left", "B. right"), **extra):
    choice = bool(options)
    published = {"ground_truth": truth, "number": not choice, "answer": truth}
    return Record(
        i, "Which?", "video", "multiple choice" if choice else "regression", tuple(options),
        f"<answer>{truth}</answer>", f"v{i // 2}.mp4", extra={"question_type": kind, "published": published, **extra},
    )  # fmt: skip


def says(i, text, **more):
    return {"problem_id": i, "completion": f"<think>x</think><answer>{text}</answer>", "truncated": False, **more}


RECORDS = [
    question(0, DIRECTIONS[0], "A"), question(1, DIRECTIONS[0], "A"), question(2, DIRECTIONS[1], "B"),
    question(3, DIRECTIONS[2], "B"), question(4, "object_counting", "4", ()), question(5, "route_planning", "A"),
]  # fmt: skip
SAID = [says(0, "A"), says(1, "B."), says(2, "B."), says(3, "A"), says(4, "3"), says(5, "(A)")]


def test_vsibench_has_three_means():
    tables = {
        rule: benchmarks.table("vsibench", benchmarks.judged("vsibench", RECORDS, SAID, rule), rule)
        for rule in benchmarks.RULES
    }
    # Video-R1: letters as whole strings (1 of 5), MRA of (3, 4) strictly below is 0.5.
    assert tables["videor1"]["accuracy"] == pytest.approx(100 * (1 / 5 + 0.5) / 2)
    # Macro: directions (1/2 + 1 + 0) / 3, counting 0.6, route 1.
    assert tables["strict"]["accuracy"] == pytest.approx(100 * (0.5 + 0.6 + 1) / 3)
    # The first word without full stops: "B." is B, "(A)" is not A.
    assert tables["published"]["accuracy"] == pytest.approx(100 * (0.5 + 0.6 + 0) / 3)
    for found in tables.values():
        low, high = found["ci95"]
        assert low <= found["accuracy"] <= high and found["n"] == 6 and found["extraction_rate"] >= 80
    assert tables["strict"]["per_type"]["route_planning"]["accuracy"] == 100


def test_what_is_missing_unreadable_or_unscored_is_counted():
    records = [question(i, "T", "A", duration=d) for i, d in enumerate(("short", "short", "long", "long"))]
    said = [says(0, "A"), says(1, "none"), {"problem_id": 2, "error": "unreadable video"}]
    found = benchmarks.table("videomme", benchmarks.judged("videomme", records, said, "published"), "published")
    # Video-MME leaves an answer without a letter out of its mean; nobody answered the last question.
    assert (found["n"], found["unreadable"], found["unscored"], found["accuracy"]) == (1, 1, 1, 100.0)
    assert list(found["per_duration"]) == ["short"] and found["extraction_rate"] == 50
    strict = benchmarks.table("videomme", benchmarks.judged("videomme", records, said, "strict"), "strict")
    assert (strict["n"], strict["unscored"], strict["accuracy"]) == (2, 0, 50.0)
    with pytest.raises(ValueError, match="unknown rule"):
        benchmarks.judged("videomme", records, said, "kind")


def test_durations_come_from_the_video_where_the_benchmark_has_none():
    records = [question(i, "T", "A") for i in range(3)]
    said = [says(i, "A", video_seconds=s) for i, s in enumerate((59.9, 60, 4000))]
    found = benchmarks.table("mvbench", benchmarks.judged("mvbench", records, said, "strict"), "strict")
    assert list(found["per_duration"]) == ["under 1 min", "1 to 5 min", "over 30 min"]


def test_comparison_of_two_runs_is_paired():
    records = [question(2 * i, "T", "A") for i in range(40)]
    a = benchmarks.judged("mvbench", records, [says(2 * i, "A") for i in range(40)], "strict")
    b = benchmarks.judged("mvbench", records, [says(2 * i, "A" if i % 2 else "B") for i in range(39)], "strict")
    found = benchmarks.compare("mvbench", a, b, "strict")
    assert (found["n"], found["only_a"], found["only_b"], found["test"]) == (39, 20, 0, "exact McNemar")
    assert found["difference"] == pytest.approx(100 * 20 / 39) and found["p"] < 1e-4
    shared = [Record(**vars(r) | {"path": "one.mp4"}) for r in records]
    rows = [benchmarks.judged("mvbench", shared, [says(2 * i, x) for i in range(40)], "strict") for x in "AB"]
    assert benchmarks.compare("mvbench", *rows, "strict")["test"] == "paired bootstrap"


def test_runs_without_a_scored_question_in_common_are_not_compared():
    records = [question(0, "T", "A")]
    said = [benchmarks.judged("videomme", records, [says(0, text)], "published") for text in ("none", "A")]
    assert benchmarks.compare("videomme", *said, "published") is None
    assert benchmarks.table("videomme", said[0], "published")["accuracy"] is None


def test_retention_of_a_macro_average():
    teacher = benchmarks.judged("vsibench", RECORDS, [says(r.problem_id, "A" if r.options else "4") for r in RECORDS],
                                "strict")  # fmt: skip
    student = benchmarks.judged("vsibench", RECORDS, SAID, "strict")
    found = benchmarks.table("vsibench", student, "strict", teacher=teacher)
    assert found["retention_pct"] == pytest.approx(100 * (2.1 / 3) / ((1 / 3 + 1 + 1) / 3))


def test_tempcompass_letters_become_its_own_words():
    published = {"task": "caption_matching", "question": "Which?\nOption 1: He runs.\nOption 2: He swims.",
                 "answer": "Option 2: He swims."}  # fmt: skip
    record = question(0, "action", "B", ("A. He runs.", "B. He swims."), task="caption_matching")
    record.extra["published"] = published
    assert benchmarks.as_published("tempcompass", record, "<answer>B</answer>") == "Option 2: He swims."
    (row,) = benchmarks.judged("tempcompass", [record], [says(0, "b)")], "published")
    assert row["score"] == 1.0


def test_an_arm_of_the_paper_fits_the_report(tmp_path):
    rows = benchmarks.judged("vsibench", RECORDS, SAID, "strict")
    own = {"key": "own", "label": "own", "group": "student", **benchmarks.table("vsibench", rows, "strict")}
    results = {"title": "VSI-Bench", "arms": [own, *benchmarks.paper_arms("vsibench")],
               "tables": [{"title": "By length", "head": ["a"], "rows": [["1"]]}]}  # fmt: skip
    written = report.write(tmp_path, results)
    text = written["markdown"].read_text()
    assert "MARC-3B, 1 frame (paper)" in text and "27.6" in text and "By length" in text
    assert "By length" in written["html"].read_text()


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("xyz")), min_size=1, max_size=30))
def test_macro_is_the_weighted_mean_of_means(pairs):
    weights = {"x": 1.0, "y": 1 / 3, "z": 2.0}
    values, groups = np.array([v for v, _ in pairs]), [g for _, g in pairs]
    found = intervals.macro(values, np.array(groups), weights, resamples=50)
    there = set(groups)
    means = {g: np.mean([v for v, h in pairs if h == g]) for g in there}
    assert found.value == pytest.approx(sum(weights[g] * means[g] for g in there) / sum(weights[g] for g in there))
    assert found.ci95[0] <= found.value <= found.ci95[1] and 0 < found.p <= 1


def test_macro_interval_covers_what_a_plain_bootstrap_does():
    rng = np.random.default_rng(0)
    values = (rng.uniform(size=400) < 0.4).astype(float)
    found = intervals.macro(values, np.array(["all"] * 400), {"all": 1.0})
    low, high = intervals.wilson(int(values.sum()), 400)
    assert math.isclose(found.ci95[0], low, abs_tol=0.012) and math.isclose(found.ci95[1], high, abs_tol=0.012)
    alone = intervals.macro(values, np.array(["all"] * 400), {"all": 1.0}, clusters=np.arange(400) // 8)
    assert alone.value == found.value
    with pytest.raises(ValueError, match="0 values"):
        intervals.macro(np.zeros(0), np.zeros(0), {})


def test_submissions_in_the_published_forms(test_data):
    folder = test_data / "annotations"
    made = {}
    files = {"videomme": "video_r1_eval/eval_videomme.json", "mvbench": "video_r1_eval/eval_mvbench.json",
             "vsibench": "video_r1_eval/eval_vsibench.json", "mmvu": "mmvu/validation.json", "videommmu": "videommmu",
             "tempcompass": "tempcompass", "nextqa": "nextqa/val.csv"}  # fmt: skip
    for name, file in files.items():
        records = read(name, folder / file).records[:50]
        answers = [r.solution for r in records]
        said = [{"problem_id": r.problem_id, "completion": a} for r, a in zip(records, answers, strict=True)]
        made |= {f"{name}/{key}": text for key, text in submissions.files(name, records, said).items()}
    mme = json.loads(made["videomme/output_videomme.json"])
    assert set(mme[0]) == {"video_id", "duration", "domain", "sub_category", "questions"}
    assert all(q["response"] == q["answer"] for video in mme for q in video["questions"])
    captions = json.loads(made["tempcompass/caption_matching.json"])
    assert all(q["prediction"] == q["answer"] for v in captions.values() for dim in v.values() for q in dim)
    assert all(row["prediction"] == row["answer"] for row in json.loads(made["nextqa/nextqa.json"]).values())
    assert json.loads(made["mvbench/upload_leaderboard.json"])["Avg"] == 100
    assert json.loads(made["mmvu/mmvu.json"])[0].keys() >= {"id", "question", "choices", "answer", "response"}
    assert json.loads(made["vsibench/samples.jsonl"].splitlines()[0])["doc"]["ground_truth"]
    (line,) = submissions.moments([{"qid": 1, "pred_relevant_windows": [[0, 1, 1]], "x": 2}]).values()
    assert json.loads(line) == {"qid": 1, "pred_relevant_windows": [[0, 1, 1]]}


def test_one_table_of_several_benchmarks(tmp_path, capsys):
    def finished(name, accuracy, n, **more):
        scores = {rule: {"own": {"accuracy": accuracy, "ci95": None, "n": n, "visual_tokens": 120.0}}
                  for rule in benchmarks.RULES}  # fmt: skip
        (tmp_path / name).mkdir()
        result = {"benchmark": name, "arms": [{"key": "own", "label": "ours"}], "scores": scores} | more
        (tmp_path / name / "results.json").write_text(json.dumps(result))
        return str(tmp_path / name)

    folders = [finished("mmvu", 40.0, 1000), finished("vsibench", 30.0, 250)]
    assert table.main([*folders, f"--out={tmp_path / 't.md'}"]) == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert "VSI-Bench (250 of 5130) | MMVU |" in lines[0]  # the paper's order
    assert "| ours | 120.0 | 30.00 | 40.00 | 35.00 |" in lines
    assert "| MARC-3B, 1 frame (paper) | 122.7 | 27.55 | 51.99 | 39.77 |" in lines
    assert table.main([folders[0], folders[0]]) == 2 and table.main([str(tmp_path)]) == 2
    assert "no finished evaluation" in capsys.readouterr().err
