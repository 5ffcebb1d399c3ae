"""Predictions in the form that each benchmark's own evaluation or leaderboard takes.

    files("videomme", records, predictions)      # {"output_videomme.json": text}

Forms: VSI-Bench and VideoMMMU, the samples that lmms-eval logs; MMVU, its outputs/*.json; MVBench, res_list and
upload_leaderboard.json; TempCompass, predictions/<task>.json; Video-MME, output_test_template.json; NExT-QA,
{"video_qid": {"prediction", "answer"}}; QVHighlights, its predictions' JSON lines.
"""

import json
from collections.abc import Iterable, Mapping, Sequence

from marc_jax.evaluation import judging
from marc_jax.evaluation.benchmarks import as_published


def files(benchmark: str, records: Sequence, predictions: Iterable[Mapping]) -> dict[str, str]:
    """{file name: its text}; questions without a completion are not in it."""
    said = {row["problem_id"]: row for row in predictions if row.get("completion") is not None}
    pairs = [(r, as_published(benchmark, r, said[r.problem_id]["completion"])) for r in records if r.problem_id in said]
    make = {"videomme": _videomme, "tempcompass": _tempcompass, "mvbench": _mvbench, "mmvu": _mmvu, "nextqa": _nextqa}
    return make.get(benchmark, _samples)(pairs)


def moments(predictions: Sequence[Mapping]) -> dict[str, str]:
    """QVHighlights: rows with qid, query, vid, pred_relevant_windows and pred_saliency_scores."""
    fields = ("qid", "query", "vid", "pred_relevant_windows", "pred_saliency_scores")
    rows = [{field: row[field] for field in fields if field in row} for row in predictions]
    return {"hl_submission.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def _json(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _samples(pairs) -> dict[str, str]:
    rows = [{"doc_id": r.problem_id, "target": judging.answers.extract_answer(r.solution), "filtered_resps": [text],
             "doc": {"question": r.problem, "question_type": r.extra["question_type"], **r.extra["published"]}}
            for r, text in pairs]  # fmt: skip
    return {"samples.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def _videomme(pairs) -> dict[str, str]:
    videos: dict = {}
    for r, text in pairs:
        own = r.extra["published"]
        head = {field: own.get(field) for field in ("video_id", "duration", "domain", "sub_category")}
        video = videos.setdefault(own.get("video_id") or r.path, head | {"questions": []})
        fields = ("question_id", "task_type", "question", "options", "answer")
        video["questions"].append({field: own.get(field) for field in fields} | {"response": text})
    return {"output_videomme.json": _json(list(videos.values()))}


def _tempcompass(pairs) -> dict[str, str]:
    tasks: dict = {}
    for r, text in pairs:
        own = r.extra["published"]
        if own:  # Video-R1's file does not say which task a question is of
            dims = tasks.setdefault(own["task"], {}).setdefault(own["video_id"], {})
            row = {"question": own["question"], "answer": own["answer"], "prediction": text}
            dims.setdefault(own["dim"], []).append(row)
    return {f"{task}.json": _json(rows) for task, rows in tasks.items()}


def _mvbench(pairs) -> dict[str, str]:
    right: dict = {}
    shown = []
    for r, text in pairs:
        letter = judging.answers.extract_answer(r.solution)
        answer = f"({letter}) {r.extra['published']['answer']}"
        shown.append({"task_type": r.extra["question_type"], "pred": text, "gt": answer})
        right.setdefault(r.extra["question_type"], []).append(judging.option_letter(text, r.options) == letter)
    scores = {task.replace("_", " ").title(): 100 * sum(hits) / len(hits) for task, hits in right.items()}
    every = [hit for hits in right.values() for hit in hits]
    scores["Avg"] = 100 * sum(every) / len(every) if every else 0.0
    return {"upload_leaderboard.json": _json(scores), "res_list.json": _json(shown)}


def _mmvu(pairs) -> dict[str, str]:
    rows = [r.extra["published"] | {"response": text} for r, text in pairs]
    return {"mmvu.json": _json(rows)}


def _nextqa(pairs) -> dict[str, str]:
    rows = {}
    for r, text in pairs:
        letter = judging.option_letter(text, r.options)
        own = r.extra["published"]
        rows[r.problem_id] = {
            "prediction": -1 if letter is None else ord(letter) - ord("A"), "answer": own.get("answer"),
        }  # fmt: skip
    return {"nextqa.json": _json(rows)}
