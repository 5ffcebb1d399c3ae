"""What is packed of a sweep's runs, and the numbers that are made of it."""

import json

import numpy as np
import pytest

from marc_jax import config as configs
from marc_jax import settings
from tools import sweep_report

KINDS = ("colours", "shapes", "order")


@pytest.fixture
def packed(tmp_path):
    """Two seeds of a rehearsal: the teacher always right, the student right on two of three videos, less in seed 1."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"seed_{seed}"
        (folder / "eval" / "predictions").mkdir(parents=True)
        rights = {"teacher": np.ones(30, bool), "untrained": np.arange(30) % 3 > 0, "distill": np.arange(30) % 6 > seed}
        for arm, right in rights.items():
            rows = [{
                "problem_id": i, "question_type": KINDS[i % 3], "video": f"{i // 3}.mp4", "format_ok": True,
                "correct": bool(right[i // 3]), "visual_tokens": 4 if arm != "teacher" else 40, "completion_tokens": 11,
            } for i in range(90)]  # fmt: skip
            text = "".join(json.dumps(row) + "\n" for row in rows[:: -1 if arm == "distill" else 1])
            (folder / "eval" / "predictions" / f"{arm}.jsonl").write_text(text)
        (folder / "distill").mkdir()
        lines = [json.dumps({"step": 20 * i, "kl": 1 / i + seed}) for i in range(1, 9)]
        (folder / "distill" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sweep_report.pack(tmp_path / "runs", ["seed_0", "seed_1"], tmp_path / "all.npz")
    return sweep_report.Packed(tmp_path / "all.npz", "eval")


def test_accuracy_is_the_mean_of_the_seeds_with_each_beside_it(packed):
    found = sweep_report.accuracy(packed, "distill", without=("order",))
    np.testing.assert_allclose(found["seeds"], [100 * 25 / 30, 100 * 20 / 30])
    assert found["mean"] == pytest.approx(75.0) and found["n"] == 120
    assert found["ci95"][0] < 75.0 < found["ci95"][1]
    assert sweep_report.accuracy(packed, "teacher")["ci95"] == [100.0, 100.0]


def test_differences_are_paired_by_question_whatever_the_order_of_the_rows(packed):
    found = sweep_report.accuracy(packed, "distill", "untrained", types=("colours",))
    np.testing.assert_allclose(found["seeds"], [100 * 5 / 30, 0.0], atol=1e-9)
    assert sweep_report.accuracy(packed, "distill", "nobody") is None


def test_tables_name_what_was_answered_and_leave_out_the_rest(packed):
    config = settings.experiment("experiments/regimes.py:rehearsal", [])
    made = sweep_report.text(packed, config, "regimes")
    assert "| teacher, every patch | 40.0 | 100.0 (100.0 to 100.0) | 100.0, 100.0 | 100.0 | 100 |" in made
    assert "180 held-out questions in all, 2 seeds" in made and "blind" not in made
    assert "| distillation without labels against the untrained student | +8.3 " in made


def test_plots_are_drawn(packed, tmp_path):
    config = settings.experiment("experiments/regimes.py:rehearsal", [])
    sweep_report.draw_pareto(packed, config, tmp_path / "pareto.png")
    assert sweep_report.draw_curves(packed, config, tmp_path / "curves.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000 and (tmp_path / "curves.png").stat().st_size > 1000


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("a\n<!-- sweep: x -->\nold\n<!-- end of sweep: x -->\nb\n")
    sweep_report.put_between(path, "x", "new\n\n")
    assert path.read_text() == "a\n<!-- sweep: x -->\nnew\n<!-- end of sweep: x -->\nb\n"
    with pytest.raises(configs.ConfigError, match="has no lines"):
        sweep_report.put_between(path, "y", "new")
