"""Judging against Video-R1's published rules and vectors."""

import pytest

pytest.importorskip("marc_jax.rl.answers", reason="the answer rules are not here")

from marc_jax.evaluation import judging  # noqa: E402

MRA = [(90, 100, 0.9), (95, 100, 1.0), (3, 4, 0.5), (50, 100, 0), (0, 0, 1)]


@pytest.mark.parametrize("predicted, truth, mra", MRA)
def test_mean_relative_accuracy_on_its_float32_boundaries(predicted, truth, mra):
    assert judging.mean_relative_accuracy(predicted, truth) == pytest.approx(mra)


def test_judging_follows_the_training_or_the_benchmark_rule():
    good = "<think>x</think><answer>B</answer>"
    assert judging.judge(good, "B", "multiple choice") == {"correct": True, "score": 1.0, "format_ok": True}
    assert judging.judge("B", "<answer>B</answer>", "multiple choice")["correct"] is False
    bare = judging.judge("B", "<answer>B</answer>", "multiple choice", rule="benchmark")
    assert bare == {"correct": True, "score": 1.0, "format_ok": False}
    near = "<answer>90</answer>"
    assert judging.judge(near, "100", "regression", rule="benchmark")["score"] == pytest.approx(0.9)
    assert judging.judge("<answer>STOP</answer>", "STOP", "OCR")["correct"] is True
    assert judging.judge("<answer>STOP</answer>", "STOP", "OCR", rule="benchmark")["correct"] is False
    assert judging.judge("<answer>soon</answer>", "100", "regression", rule="benchmark")["score"] == 0
    with pytest.raises(ValueError, match="unknown rule"):
        judging.judge(good, "B", "multiple choice", rule="other")
