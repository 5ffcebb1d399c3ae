"""Moment retrieval and highlight detection, scored as QVHighlights does, to its second decimal.

    scores = evaluate(predictions, truths)
    scores["MR-full-R1@0.5"], scores["MR-full-mAP"], scores["HL-min-VeryGood-Hit1"], ...

A truth is a row of highlight_<split>_release.jsonl: qid, relevant_windows [[start, end]] in seconds and, for
highlights, duration, relevant_clip_ids and saliency_scores (three annotators, 0 to 4, of clips of 2 s). A prediction
has the same qid, pred_relevant_windows [[start, end, score]] and, for highlights, pred_saliency_scores of every clip.

Source of the definitions: github.com/jayleicn/moment_detr, standalone_eval. R1@t compares the first window with the
true one nearest to it, by intersection over the hull of both; AP is that of detection (interpolated, one prediction per
truth) over intersection over union.
"""

from collections.abc import Mapping, Sequence

import numpy as np

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": None}  # seconds of the true window, (a, b]
HIGHLIGHTS = {"Fair": 2, "Good": 3, "VeryGood": 4}  # least saliency of a positive clip
MOST_WINDOWS = 10
CLIP_SECONDS = 2


def evaluate(predictions: Sequence[Mapping], truths: Sequence[Mapping]) -> dict[str, float]:
    """Every published number, in percent, rounded to two decimals.

    Raises ValueError: the two hold other queries, a query met twice, or a query without a window.
    """
    said = {row["qid"]: row for row in predictions}
    true = {row["qid"]: row for row in truths}
    if len(said) != len(predictions) or len(true) != len(truths):
        raise ValueError("a qid is met more than once")
    if said.keys() != true.keys():
        raise ValueError(f"{len(said.keys() ^ true.keys())} qids are in only one of predictions and truths")
    out = {}
    if all("pred_relevant_windows" in row for row in predictions):
        out |= _moments(said, true)
    judged = all(row.get("saliency_scores") is not None for row in truths)  # not in other sets of this schema
    if judged and all("pred_saliency_scores" in row for row in predictions):
        out |= _highlights(said, true)
    if not out:
        raise ValueError("the predictions hold neither pred_relevant_windows nor pred_saliency_scores")
    return out


def _percent(value: float) -> float:
    return float(f"{100 * value:.2f}")


def _moments(said: dict, true: dict) -> dict[str, float]:
    empty = [qid for qid, row in said.items() if not row["pred_relevant_windows"]]
    if empty:
        raise ValueError(f"{len(empty)} queries have no window, the first {empty[0]!r}")
    out = {}
    for name, limits in LENGTHS.items():
        windows = {qid: _within(row["relevant_windows"], limits) for qid, row in true.items()}
        kept = [qid for qid, found in windows.items() if len(found)]
        if not kept:
            continue
        ap = np.array([average_precision(windows[q], said[q]["pred_relevant_windows"]) for q in kept]).mean(0)
        overlap = np.array([first_overlap(windows[q], said[q]["pred_relevant_windows"][0]) for q in kept])
        out[f"MR-{name}-mAP"] = _percent(np.mean(ap))
        for i, threshold in enumerate(THRESHOLDS):
            out[f"MR-{name}-mAP@{threshold}"] = _percent(ap[i])
            out[f"MR-{name}-R1@{threshold}"] = _percent(np.mean(overlap >= threshold))
    return out


def _within(windows, limits) -> np.ndarray:
    windows = np.asarray(windows, np.float64).reshape(-1, 2)
    length = windows[:, 1] - windows[:, 0]
    return windows if limits is None else windows[(length > limits[0]) & (length <= limits[1])]


def iou(windows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union float64 [n, m] of windows [n, 2] and others [m, 2]."""
    low = np.maximum(windows[:, None, 0], others[None, :, 0])
    high = np.minimum(windows[:, None, 1], others[None, :, 1])
    both = np.clip(high - low, 0, None)
    length = (windows[:, 1] - windows[:, 0])[:, None] + (others[:, 1] - others[:, 0])[None]
    with np.errstate(invalid="ignore"):
        return both / (length - both)


def first_overlap(windows: np.ndarray, first) -> float:
    """Intersection over hull of a prediction [start, end, ...] and the true window [n, 2] of highest IoU."""
    first = np.asarray(first[:2], np.float64)
    near = windows[int(np.argmax(iou(first[None], windows)[0]))]
    both = max(0.0, min(first[1], near[1]) - max(first[0], near[0]))
    hull = max(first[1], near[1]) - min(first[0], near[0])
    return both / hull if hull else 0.0


def average_precision(windows: np.ndarray, predicted) -> np.ndarray:
    """Interpolated AP float64 [10] of one query at THRESHOLDS; the first 10 predictions count, best score first."""
    predicted = np.asarray([w[:3] for w in predicted[:MOST_WINDOWS]], np.float64)
    predicted = predicted[np.argsort(-predicted[:, 2], kind="stable")]
    overlap = iou(predicted[:, :2], windows)
    hit = np.zeros((len(THRESHOLDS), len(predicted)))
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(windows), bool)
        for i, row in enumerate(overlap):
            for j in row.argsort()[::-1]:
                if row[j] < threshold:
                    break
                if free[j]:
                    free[j], hit[t, i] = False, 1
                    break
    right = hit.cumsum(1)
    return np.array([_area(r / np.arange(1, len(r) + 1), r / len(windows)) for r in right])


def _area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the falling envelope of precision over recall (Pascal VOC 2011)."""
    precision = np.maximum.accumulate(np.concatenate([[0], precision, [0]])[::-1])[::-1]
    recall = np.concatenate([[0], recall, [1]])
    step = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[step] - recall[step - 1]) * precision[step]))


def _highlights(said: dict, true: dict) -> dict[str, float]:
    out, saliency = {}, {qid: saliency_of(row) for qid, row in true.items()}
    for name, least in HIGHLIGHTS.items():
        hits, precisions = [], []
        for qid, row in said.items():
            positive = saliency[qid] >= least  # [clips, annotators]
            scores = np.asarray(row["pred_saliency_scores"], np.float64)
            best = int(np.argmax(scores))
            hits.append(bool(positive[best].any()) if best < len(positive) else False)
            fitted = np.zeros(len(positive))
            fitted[: len(scores)] = scores[: len(positive)]
            precisions.append([clip_precision(column, fitted) for column in positive.T])
        out[f"HL-min-{name}-mAP"] = _percent(np.mean(precisions))
        out[f"HL-min-{name}-Hit1"] = _percent(np.mean(hits))
    return out


def saliency_of(row: Mapping) -> np.ndarray:
    """float64 [clips, 3]; 0 for clips that nobody judged."""
    scores = np.zeros((int(row["duration"] / CLIP_SECONDS), 3))
    scores[np.asarray(row["relevant_clip_ids"], int)] = np.asarray(row["saliency_scores"], np.float64).reshape(-1, 3)
    return scores


def clip_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Mean interpolated precision at every threshold where recall grows; 0 without positives, 1 without negatives."""
    if not positive.any() or positive.all():
        return float(positive.all())
    order = np.argsort(scores, kind="stable")[::-1]
    scores, right = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of equal scores
    recall = np.append((right[last] / right[-1])[::-1], 0).astype(np.float32)
    precision = np.maximum.accumulate(np.append((right[last] / (last + 1))[::-1], 1))
    return float(np.mean(precision[np.flatnonzero(np.diff(recall))]))
