"""Tables against numbers worked out by hand."""

import numpy as np
import pytest

from marc_jax.evaluation import intervals, scoring


def row(key, kind="colour", correct=True, **more):
    return {"problem_id": key, "question_type": kind, "correct": correct, "solution": "A", **more}


@pytest.fixture
def teacher():
    return [row(i, correct=i != 9, visual_tokens=48, format_ok=True) for i in range(10)] + [
        row(i, "order", visual_tokens=48, format_ok=True) for i in range(10, 14)
    ]


@pytest.fixture
def student():
    first = [row(i, correct=i < 6, visual_tokens=4, format_ok=i != 0, truncated=i == 0) for i in range(10)]
    return first + [row(i, "order", i == 10, visual_tokens=4, format_ok=True) for i in range(10, 14)]


def test_the_table_of_an_arm_by_hand(student, teacher):
    table = scoring.arm_table(student, teacher=teacher)
    assert table["n"] == 14 and table["unreadable"] == 0
    assert table["accuracy"] == pytest.approx(100 * 7 / 14)
    assert table["ci95"] == pytest.approx([100 * x for x in intervals.wilson(7, 14)])
    assert table["headline"]["n"] == 10
    assert table["headline"]["accuracy"] == pytest.approx(60)
    assert table["headline"]["leaves_out"] == ["order"]
    assert {name: cell["accuracy"] for name, cell in table["per_type"].items()} == {"colour": 60, "order": 25}
    assert table["format_rate"] == pytest.approx(100 * 13 / 14)
    assert table["truncation_rate"] == pytest.approx(10)
    assert table["visual_tokens"] == 4
    assert table["tokens_kept_pct"] == pytest.approx(100 * 4 / 48)
    assert table["retention_pct"] == pytest.approx(100 * 7 / 13)
    assert table["headline_retention_pct"] == pytest.approx(100 * 6 / 9)
    low, high = table["retention_ci95"]
    assert low < table["retention_pct"] < high


def test_the_teacher_keeps_all_of_itself(teacher):
    table = scoring.tables({"teacher": teacher})["teacher"]
    assert table["retention_pct"] == 100 and table["retention_ci95"] == [100, 100]
    assert table["tokens_kept_pct"] == 100


def test_without_a_teacher_there_is_no_retention(student):
    table = scoring.tables({"student": student}, teacher=None)["student"]
    assert table["retention_pct"] is None and table["tokens_kept_pct"] is None


def test_a_teacher_that_knows_nothing_gives_no_retention(student):
    assert scoring.retention(student, [row(i, correct=False) for i in range(14)]) == (None, None)


def test_unreadable_videos_are_counted_and_never_scored(student):
    broken = student + [{"problem_id": 99, "question_type": "colour", "error": "truncated file"}]
    table = scoring.arm_table(broken)
    assert table["unreadable"] == 1
    assert table["accuracy"] == scoring.arm_table(student)["accuracy"]


def test_soft_scores_are_averaged_and_bootstrapped():
    scores = np.random.default_rng(0).uniform(size=50)
    rows = [row(i, score=float(s), correct=s > 0.5) for i, s in enumerate(scores)]
    cell = scoring.summarise(rows)
    assert cell["accuracy"] == pytest.approx(100 * scores.mean())
    assert cell["ci95"] == pytest.approx([100 * x for x in intervals.bootstrap_ratio(scores)])


def test_rows_that_cannot_be_scored_are_named():
    with pytest.raises(ValueError, match="'q7' has neither"):
        scoring.summarise([{"problem_id": "q7", "question_type": "x"}])
    with pytest.raises(ValueError, match="outside"):
        scoring.summarise([row(1, score=float("nan"))])
    with pytest.raises(ValueError, match="more than once.*3"):
        scoring.arm_table([row(3), row(3)])


def test_an_arm_without_rows_is_empty_not_wrong():
    table = scoring.arm_table([], teacher=[])
    assert table["n"] == 0 and table["accuracy"] is None and table["retention_pct"] is None


def test_the_paired_test_sees_what_single_intervals_do_not():
    a = [row(i, correct=i % 5 != 0) for i in range(500)]  # 80 %
    b = [row(i, correct=i % 5 != 0 and i % 50 != 1) for i in range(500)]  # ten fewer, on the same questions
    result = scoring.compare(a, b)
    assert result["test"] == "exact McNemar" and result["n"] == 500
    assert result["difference"] == pytest.approx(2.0)
    assert (result["only_a"], result["only_b"]) == (10, 0)
    assert result["p"] == pytest.approx(2 / 2**10)
    assert result["ci95"][0] > 0
    overlap = scoring.summarise(b)["ci95"][1] - scoring.summarise(a)["ci95"][0]
    assert overlap > 0


def test_comparison_can_leave_types_out(student, teacher):
    result = scoring.compare(student, teacher, apart=("order", "absent"))
    assert result["n"] == 10 and result["leaves_out"] == ["order"]
    assert result["difference"] == pytest.approx(-30)


def test_comparison_uses_only_shared_questions_and_any_order():
    a = [row(i, correct=i < 5) for i in range(10)]
    b = [row(i, correct=False) for i in reversed(range(2, 20))]
    result = scoring.compare(a, b)
    assert result["n"] == 8 and result["only_a"] == 3
    with pytest.raises(ValueError, match="share no question"):
        scoring.compare(a, [row(77)])


def test_soft_scores_are_compared_by_bootstrap():
    rng = np.random.default_rng(0)
    a = [row(i, score=float(x)) for i, x in enumerate(rng.uniform(0.2, 1, size=80))]
    b = [{**r, "score": r["score"] - 0.15} for r in a]
    result = scoring.compare(a, b)
    assert result["test"] == "paired bootstrap" and result["p"] < 0.01
    assert result["difference"] == pytest.approx(15)


def test_chance_levels_come_from_the_questions():
    rows = [row(i, "colour", solution="ABBB"[i % 4], options=["A. x", "B. y", "C. z", "D. w"]) for i in range(8)]
    rows += [row(100 + i, "count", solution=str(i % 3)) for i in range(6)]
    rows += [row(200 + i, "order", solution="AB"[i % 2], options=["A", "B"]) for i in range(2)]
    levels = scoring.chance(rows)
    assert levels["per_type"]["colour"] == {"uniform": 25, "majority": 75}
    assert levels["per_type"]["count"] == pytest.approx({"uniform": 100 / 3, "majority": 100 / 3})
    assert levels["per_type"]["order"] == {"uniform": 50, "majority": 50}
    assert levels["headline"]["uniform"] == pytest.approx((8 * 25 + 6 * 100 / 3) / 14)
    assert levels["accuracy"]["uniform"] == pytest.approx((8 * 25 + 6 * 100 / 3 + 2 * 50) / 16)
    assert scoring.chance([row(1, "order")])["headline"] is None


def test_a_benchmark_with_regression_is_the_two_way_mean():
    rows = [row(i, correct=i < 3, problem_type="multiple choice") for i in range(4)]
    assert scoring.benchmark_score(rows)["score"] == 75
    rows += [row(10 + i, score=0.25, problem_type="regression") for i in range(12)]
    assert scoring.benchmark_score(rows) == pytest.approx({"mean_acc": 75, "mean_mra": 25, "score": 50})
