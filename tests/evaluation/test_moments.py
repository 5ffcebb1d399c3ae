"""Moment retrieval and highlights beside the published evaluator's own numbers, and beside plain definitions."""

import json

import numpy as np
import pytest

from marc_jax.evaluation import moments


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_published_number(test_data):
    folder = test_data / "annotations" / "qvhighlights"
    found = moments.evaluate(lines(folder / "sample_val_preds.jsonl"), lines(folder / "highlight_val_release.jsonl"))
    published = json.loads((folder / "sample_val_preds_metrics_raw.json").read_text())
    assert {name: found[name] for name in published["brief"]} == published["brief"]
    for name in moments.LENGTHS:
        assert found[f"MR-{name}-mAP"] == published[name]["MR-mAP"]["average"]
        for t in moments.THRESHOLDS:
            assert found[f"MR-{name}-mAP@{t}"] == published[name]["MR-mAP"][str(t)]
            assert found[f"MR-{name}-R1@{t}"] == published[name]["MR-R1"][str(t)]


def test_perfect_and_hopeless_predictions():
    truth = {
        "qid": 1, "duration": 10, "relevant_windows": [[2, 6]], "relevant_clip_ids": [1, 2],
        "saliency_scores": [[4, 4, 4], [3, 3, 3]],
    }  # fmt: skip
    good = {"qid": 1, "pred_relevant_windows": [[2, 6, 1.0]], "pred_saliency_scores": [0, 2, 1, 0, 0]}
    found = moments.evaluate([good], [truth])
    assert found["MR-full-R1@0.7"] == found["MR-short-mAP"] == found["HL-min-VeryGood-Hit1"] == 100.0
    assert found["HL-min-Good-mAP"] == 100.0 and "MR-long-mAP" not in found
    bad = {"qid": 1, "pred_relevant_windows": [[8, 9, 1.0]], "pred_saliency_scores": [5, 2, 1]}
    found = moments.evaluate([bad], [truth])
    assert found["MR-full-R1@0.5"] == found["MR-full-mAP"] == found["HL-min-Fair-Hit1"] == 0.0


def test_average_precision_of_detections_in_a_row():
    windows = np.array([[0, 10], [20, 30]])
    # Right, wrong, right: precision 1 and 2/3 at recall 1/2 and 1.
    ap = moments.average_precision(windows, [[0, 10, 0.9], [50, 60, 0.8], [20, 30, 0.7]])
    assert ap == pytest.approx([0.5 * 1 + 0.5 * 2 / 3] * 10)
    assert moments.average_precision(windows, [[0, 10, 0.1], [0, 10, 0.9]]) == pytest.approx([0.5] * 10)


def test_what_cannot_be_compared_is_refused():
    truth = {"qid": 1, "relevant_windows": [[0, 1]]}
    with pytest.raises(ValueError, match="1 qids are in only one"):
        moments.evaluate([], [truth])
    with pytest.raises(ValueError, match="more than once"):
        moments.evaluate([{"qid": 1}, {"qid": 1}], [truth])
    with pytest.raises(ValueError, match="have no window"):
        moments.evaluate([{"qid": 1, "pred_relevant_windows": []}], [truth])
    with pytest.raises(ValueError, match="neither"):
        moments.evaluate([{"qid": 1}], [truth])
