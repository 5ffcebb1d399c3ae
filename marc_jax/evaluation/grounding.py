"""Retrieval on QVHighlights: a video's events, nearest to the query first, as moments; no language model answers.

A predicted window is an event, its score the similarity to the query; a clip's saliency is that of the event over its
middle. So the numbers judge segmentation and retriever together, by the benchmark's own metrics (`moments`).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from marc_jax import files, hardware, locks, records
from marc_jax.config import ConfigError
from marc_jax.evaluation import benchmarks, harness, moments, submissions

# What is usually published, and Moment-DETR on the whole val split: the sample predictions of its repository
# (jayleicn/moment_detr, standalone_eval/sample_val_preds_metrics_raw.json).
PUBLISHED = (
    ("R1@0.5", "MR-full-R1@0.5", 53.94), ("R1@0.7", "MR-full-R1@0.7", 34.84), ("mAP@0.5", "MR-full-mAP@0.5", 54.96),
    ("mAP@0.75", "MR-full-mAP@0.75", 31.01), ("mAP, mean of 0.5 to 0.95", "MR-full-mAP", 32.20),
    ("highlights: mAP", "HL-min-VeryGood-mAP", 35.65), ("highlights: HIT@1", "HL-min-VeryGood-Hit1", 55.55),
)  # fmt: skip


def evaluate(config, checkpoint: str, out: Path) -> dict:
    """Indexes the videos, scores the events, writes results.json, report.md and the submission. Returns the results.

    Raises ConfigError as `harness.evaluate`; and where no encoder embeds the queries.
    """
    config = config.copy_and_resolve_references()
    config.init_from = checkpoint
    if not config.encoder.path:
        raise ConfigError("qvhighlights is retrieval: name a --config.encoder.path")
    questions = harness.numbered(harness.read_questions(config, out), config.eval.limit)
    with locks.held(out / ".lock", f"the evaluation in {out}"):
        here = harness.surroundings(config, out)
        asked = [dataclasses.replace(record, problem_type="free-form") for record in questions.records]
        test = records.over_memory(here, config.data.test, asked, "plain")
        by_row = {record.row: record.extra["published"] for record in questions.records}
        truths = [by_row[row["problem_id"]] for row in test.records]
        said = [predicted(truth, *test.events(i)) for i, truth in enumerate(truths)]
        results = {
            "title": benchmarks.BENCHMARKS["qvhighlights"].title, "benchmark": "qvhighlights",
            "metrics": moments.evaluate(said, truths), "n": len(said), "total": questions.total,
            "checkpoint": checkpoint, "encoder": config.encoder.path, "hardware": hardware.described(),
        }  # fmt: skip
        for name, text in submissions.moments(said).items():
            files.write_whole(out / name, text)
        files.write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
        files.write_whole(out / "report.md", _markdown(results))
    return results


def predicted(truth: dict, seconds_e2: np.ndarray, score_e: np.ndarray) -> dict:
    """A row of the submission: events as windows, best first; the saliency of every clip of 2 s."""
    windows = [[*map(float, seconds_e2[e]), float(score_e[e])] for e in np.argsort(-score_e, kind="stable")]
    middles = moments.CLIP_SECONDS * (np.arange(int(truth["duration"] / moments.CLIP_SECONDS)) + 0.5)
    inside = (seconds_e2[:, :1] <= middles) & (middles < seconds_e2[:, 1:])  # [E, clips]
    saliency = np.where(inside, score_e[:, None], score_e.min() - 1).max(0)  # between two events: below all of them
    return {"qid": truth["qid"], "query": truth["query"], "vid": truth["vid"], "pred_relevant_windows": windows,
            "pred_saliency_scores": [float(s) for s in saliency]}  # fmt: skip


def headline(metrics: dict) -> list[tuple[str, float | None, float | None]]:
    """(name, ours, Moment-DETR's) of PUBLISHED; ours is None for highlights that nobody judged."""
    return [(name, metrics.get(key), theirs) for name, key, theirs in PUBLISHED]


def _markdown(results: dict) -> str:
    number = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    first = [f"| {name} | {number(ours)} | {number(theirs)} |" for name, ours, theirs in headline(results["metrics"])]
    rows = [f"| {name} | {value:.2f} |" for name, value in results["metrics"].items()]
    return "\n".join([
        f"# {results['title']}: {results['n']} of {results['total']} queries", "",
        "| | events, best first, % | Moment-DETR, % |", "|---|--:|--:|", *first, "",
        "Windows are the events that the video was divided into, so their borders are found without the query.", "",
        "| metric of the official evaluation | % |", "|---|--:|", *rows, "",
        f"{results['hardware']}, {results['encoder']}", "",
    ])  # fmt: skip
