"""From a finished run to its report: all arms answered, scored, compared, drawn."""

import datetime
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from data_pipelines import video
from marc_jax import files, hardware, records, settings
from marc_jax.baselines.kept import real_tokens
from marc_jax.evaluation import pictures, report, run, scoring
from marc_jax.memory import embed
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.run import Run
from marc_jax.synthetic import data_folder

GROUP_ORDER = ("teacher", "student", "baseline")


def report_on(here: Run, timings: dict, started: float, arms=None, folder: Path | None = None) -> dict:
    """Answers the held-out questions and writes the report. Returns the results.

    Args:
      timings: seconds per stage so far; the evaluation's own are added.
      started: time.monotonic() at the start of the run.
      arms: which of config.eval.arms; default all.
      folder: default `<workdir>/report`.
    """
    config, begun = here.config, time.monotonic()
    sources = run.arm_sources(here, arms or list(config.eval.arms))
    test = memory_of(here, sources)
    timings["memory"] = time.monotonic() - begun
    folder = folder or here.workdir / "report"
    rows = {arm: answer(here, test, arm, *source, folder) for arm, source in sources.items()}
    timings["evaluation"] = time.monotonic() - begun - timings["memory"]
    predictions = {arm: str(run.predictions_path(folder, arm)) for arm in rows}
    samples = draw_samples(here, test, sources, rows, folder)
    timings["pictures"] = time.monotonic() - begun - timings["memory"] - timings["evaluation"]
    print(f"everything took {time.monotonic() - started:.0f} s")
    results = assemble(here, test, rows, timings) | {"predictions": predictions, "samples": samples}
    written = report.write(folder, results)
    print(f"report: {written['html']}")
    return results


def answer(here: Run, test, arm: str, params: dict, visual: str, folder: Path) -> list[dict]:
    """The prediction rows of one arm, also written to `<folder>/predictions`."""
    rows = run.answer_all(here, params, here.config.eval.arms[arm].view, visual, test, f"eval {arm}")
    run.write_predictions(folder, arm, rows)
    return rows


def answer_missing(here: Run, arms: list[str], folder: Path) -> None:
    """Predictions of those of these arms that have none in `folder`, and no report: processes can share the arms.

    With the teacher's goes `about.json`, what is known of the questions and their events.
    """
    config = here.config
    missing = [arm for arm in arms if not run.predictions_path(folder, arm).exists()]
    if not missing:
        return
    sources = run.arm_sources(here, missing)
    test = memory_of(here, run.arm_sources(here, [config.eval.teacher]) | sources)
    for arm, source in sources.items():
        answer(here, test, arm, *source, folder)
        if arm == config.eval.teacher:
            told = {**about(here, test), "hardware": hardware.described(), "seed": config.seed}
            files.write_whole(folder / "about.json", json.dumps(told, indent=1) + "\n")


def memory_of(here: Run, sources) -> run.TestSet | records.Records:
    """The indexed test set, by the weights of the teacher arm: what the memory on disk was made with."""
    if settings.on_files(here.config):
        return records.open_records(here, here.config.data.test, "eval")
    params, _ = sources[here.config.eval.teacher]
    return run.index_test(here, params, pixels=any(visual == "pixels" for _, visual in sources.values()))


def assemble(here: Run, test: run.TestSet | records.Records, rows: dict, timings: dict) -> dict:
    """results.json, see `report` for its schema."""
    config = here.config
    apart = tuple(config.eval.apart)
    several = config.data.questions_per_video > 1
    tables = scoring.tables(rows, teacher=config.eval.teacher, apart=apart, by_video=several)
    arms = []
    for key in rows:
        arm = config.eval.arms[key]
        arms.append({"key": key, "label": arm.label or key, "group": arm.group, "note": arm.note, **tables[key]})
        if key == config.eval.main:
            arms[-1]["main"] = True
    arms.sort(key=lambda arm: (GROUP_ORDER.index(arm["group"]), -arm["headline"]["accuracy"]))
    return {
        "title": config.title,
        "arms": arms,
        "apart": list(apart),
        "chance": scoring.chance(rows[config.eval.teacher], apart=apart),
        "claims": claims(arms, config),
        "comparisons": compared(rows, config, apart),
        **about(here, test),
        "timings": {name: round(seconds, 1) for name, seconds in timings.items()},
        "memory_gb": round(hardware.process_peak() / 2**30, 2),
        "curves": {name: str((here.workdir / name / "metrics.jsonl").resolve()) for name in config.stages},
        "seed": config.seed,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.described(),
        "command": " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        "decoding": f"greedy, at most {config.max_new_tokens} tokens",
        "config": config.to_dict(),
    }


def about(here: Run, test: run.TestSet | records.Records) -> dict:
    """What the questions were, and what is known of their events."""
    if isinstance(test, run.TestSet):
        split = f"{len(test.records)} held-out questions on {len(test.found)} videos that no stage has seen"
        found = run.segmentation(test.found, test.records)
        return {"split": split, "retriever": run.retrieval(here, test), "segmentation": found}
    count = len(test.records)
    return {"split": f"{count} of {count + len(test.unreadable)} questions of {here.config.data.test}"}


def claims(arms: list[dict], config) -> list[dict]:
    """config.eval.claims beside what was measured: headline accuracies and differences of them, in points."""
    score = {arm["key"]: arm["headline"]["accuracy"] for arm in arms}
    out = []
    for c in (config.eval.claims[name] for name in config.eval.claims):
        if c.arm not in score or (c.minus and c.minus not in score):
            continue
        value = score[c.arm] - (score[c.minus] if c.minus else 0.0)
        met = (c.at_least < 0 or value >= c.at_least) and (c.at_most < 0 or value <= c.at_most)
        target = f">= {c.at_least:g}" if c.at_least >= 0 else f"<= {c.at_most:g}" if c.at_most >= 0 else ""
        out.append({"text": c.text, "target": target, "measured": round(value, 1), "met": bool(met)})
    return out


def compared(rows: dict, config, apart) -> list[dict]:
    """Paired differences of the main arm against every other arm, on the same questions."""
    main = config.eval.main
    if main not in rows:
        return []
    by_video = config.data.questions_per_video > 1
    return [
        {"a": main, "b": other, **scoring.compare(rows[main], rows[other], apart=apart, by_video=by_video)}
        for other in rows if other != main
    ]  # fmt: skip


def draw_samples(here: Run, test: run.TestSet | records.Records, sources, rows, folder: Path) -> list[dict]:
    """One picture per question type: frames, events, what was retrieved, what was merged, what each arm said."""
    arm = here.config.eval.main
    if arm not in sources or not isinstance(test, run.TestSet):
        return []
    seen, made = set(), []
    for i, record in enumerate(test.records):
        if record["question_type"] in seen or len(made) >= here.config.eval.pictures:
            continue
        seen.add(record["question_type"])
        order = sorted(rows, key=lambda a: GROUP_ORDER.index(here.config.eval.arms[a].group))
        said = {here.config.eval.arms[a].label or a: (rows[a][i]["completion"], rows[a][i]["correct"]) for a in order}
        path = folder / "samples" / f"{record['question_type']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = here.sampling.read(data_folder(here.config, here.workdir) / record["path"])
        draw(here, path, clip, test, i, sources[arm], here.view(here.config.eval.arms[arm].view), said)
        made.append({"path": str(path), "caption": f"{record['question_type']}: {record['problem']}"})
    return made


def draw(here: Run, path, clip: video.Clip, test: run.TestSet, i: int, source, view: views.View, said: dict) -> None:
    """The picture of question i of the test set as one arm saw it."""
    record, (params, visual) = test.records[i], source
    looked = look(here, test, i, params, visual, view)
    pictures.draw_sample(
        path, clip.frames, clip.seconds, test.found[record["path"]].event_spans.tolist(),
        question=record["problem"], options=record["options"], answers=said,
        truth=record["solution"].removeprefix("<answer>").removesuffix("</answer>"),
        needed_events=np.flatnonzero(run.needed_events(test)[i]).tolist(), title=record["path"], **looked,
    )  # fmt: skip


def look(here: Run, test: run.TestSet, i: int, params: dict, visual: str, view: views.View) -> dict:
    """`seen` of one question, embedded by the run's own retriever."""
    index = test.videos.take(np.array([i])).index(test.sizes)
    query = embed.embed_questions(here.retriever, *run.queries(here, test, [i]))
    return seen(here, params, view, index, np.asarray(test.bank[visual]), test.sizes.event, query)


def seen(here: Run, params: dict, view: views.View, index: views.VideoIndex, bank, max_event: int, query_bd) -> dict:
    """Retrieved events with similarities, merge weights and the patches they refer to, of an index of one video.

    `bank`, `max_event`, `query_bd` [1, D] as for `views.select`.
    """
    picked = views.select(view, index, query_bd, bank, max_event, jax.random.key(0))
    ids, valid = (np.asarray(x)[0] for x in views.retrieved(view, index, query_bd))
    scores = np.asarray(index.emb_bed[0] @ np.asarray(query_bd)[0])
    vis_bspd = views.to_tokens(qwen25_vl.bind(here.cfg, params), picked.patches_bsnc, here.grid_hw)
    if picked.shapes is not None:
        there = real_tokens(picked.mask_bs, vis_bspd.shape[2], picked.shapes.tokens_b)
        vis_bspd = np.where(np.asarray(there)[..., None], vis_bspd, 0)
    kept = views.reduce(view, vis_bspd, picked)
    real = np.asarray(picked.mask_bs)[0]
    return {
        "retrieved_events": {int(e): float(scores[e]) for e, ok in zip(ids, valid, strict=True) if ok},
        "merge_weights": np.asarray(kept.weights_bkt)[0][np.asarray(kept.mask_bk)[0]][:, real],
        "merge_patches": np.asarray(picked.t_bs)[0][real].astype(int).tolist(),
    }
