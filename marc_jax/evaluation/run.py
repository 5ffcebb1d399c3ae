"""Arms over the held-out questions: who answers, looking how. The same code for the report and for `marc_jax.eval`.

The test videos are indexed once into a memory on disk; every arm reads its patches, events and embeddings from there.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from data_pipelines.patches import frames_to_pixel_patches
from data_pipelines.sources import question_text
from data_pipelines.video import VideoError
from marc_jax import files, metrics
from marc_jax.batches import STYLE, Sizes, Videos
from marc_jax.config import ConfigError
from marc_jax.evaluation import judging
from marc_jax.memory import embed, indexer, store
from marc_jax.memory import view as views
from marc_jax.rl import rollout, step
from marc_jax.run import Run, data_folder, read_records, report_unreadable


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Held-out questions over an indexed bank.

    Attributes:
      records: Video-R1 records, one per question.
      bank: {"features": [N, n, V], "pixels": uint8 [N, n, 1176]}; patches of all test videos, one after the other.
      videos: spans of each question's video, B = questions.
      found: {path: MemoryEntry} for pictures and the segmentation score.
      unreadable: records whose video cannot be read: counted in every arm, never scored.
    """

    records: list[dict]
    bank: dict[str, np.ndarray]
    videos: Videos
    sizes: Sizes
    found: dict[str, store.MemoryEntry]
    unreadable: tuple[dict, ...] = ()


def index_test(run: Run, params: dict, pixels: bool) -> TestSet:
    """Indexes the test videos into `<workdir>/memory` (those it lacks) and lays the questions over them."""
    folder = data_folder(run.config, run.workdir)
    records = read_records(folder, "test")
    names = list(dict.fromkeys(record["path"] for record in records))
    worker = indexer.Indexer(run.cfg, params, run.retriever, run.sampling)
    memory = run.workdir / "memory"
    with (
        store.MemoryWriter(memory, worker.fingerprint) as writer,
        metrics.Progress("memory", len(names)) as bar,
    ):
        errors = {}
        for i, name in enumerate(names):
            try:
                if name not in writer:
                    writer.add(name, worker.file(folder / name))
            except VideoError as error:
                errors[name] = {"row": i, "path": name, "reason": str(error)}
            bar.update(i + 1)
    report_unreadable(run, list(errors.values()), len(names))
    unreadable = tuple(record for record in records if record["path"] in errors)
    records = [record for record in records if record["path"] not in errors]
    names = [name for name in names if name not in errors]
    reader = store.MemoryReader(memory, worker.fingerprint)
    found = {name: reader.get_checked(name, store.file_sha256(folder / name)) for name in names}
    bank = {"features": np.concatenate([found[name].tokens for name in names])}
    if pixels:
        clips = (run.sampling.read(folder / name) for name in names)
        bank["pixels"] = np.concatenate([frames_to_pixel_patches(clip.frames)[0] for clip in clips])
    first = dict(zip(names, np.cumsum([0] + [len(found[n].tokens) for n in names[:-1]]).tolist(), strict=True))
    most = max(len(entry.event_spans) for entry in found.values())
    longest = max(int(np.diff(entry.event_spans, axis=1).max()) for entry in found.values())
    sizes = dataclasses.replace(run.sizes, events=max(most, run.sizes.events), event=max(longest, run.sizes.event))
    return TestSet(records, bank, _spans(records, found, first, sizes), sizes, found, unreadable)


def _spans(records, found, first, sizes: Sizes) -> Videos:
    b, e = len(records), sizes.events
    start, length = np.zeros((b, e), np.int64), np.zeros((b, e), np.int64)
    mask, row = np.zeros((b, e), bool), np.zeros((b, e), np.int64)
    emb = np.zeros((b, e, next(iter(found.values())).event_embeddings.shape[1]), np.float32)
    for i, record in enumerate(records):
        entry = found[record["path"]]
        n = len(entry.event_spans)
        start[i, :n], length[i, :n] = entry.event_spans[:, 0], np.diff(entry.event_spans, axis=1)[:, 0]
        mask[i, :n], emb[i, :n] = True, entry.event_embeddings
        row[i, :n] = first[record["path"]] + entry.event_spans[:, 0]
    return Videos(row, start, length, mask, emb)


def segmentation(found: dict, records: list[dict]) -> dict:
    """Precision and recall (%) of event borders in patches, against the annotation.

    An annotated event starts where it begins to show: a found border is where the event before it ends.
    """
    truth = {r["path"]: [e["start_patch"] for e in r["events"]][1:] for r in records}
    hits = guesses = reals = exact = 0
    for name, entry in found.items():
        guess = set(entry.event_spans[:-1, 1].tolist())
        hits += len(guess & set(truth[name]))
        guesses, reals, exact = guesses + len(guess), reals + len(truth[name]), exact + (guess == set(truth[name]))
    return {
        "precision_pct": 100 * hits / max(guesses, 1), "recall_pct": 100 * hits / max(reals, 1),
        "videos_exact_pct": 100 * exact / max(len(found), 1), "videos": len(found),
    }  # fmt: skip


def _batches(test: TestSet, size: int):
    """Row numbers in batches of one shape; the last is filled up with row 0 and cut by the caller."""
    n = len(test.records)
    for start in range(0, n, size):
        rows = np.arange(start, start + size)
        yield np.where(rows < n, rows, 0), min(size, n - start)


def take(videos: Videos, rows) -> Videos:
    return Videos(*(getattr(videos, f.name)[rows] for f in dataclasses.fields(videos)))


def queries(run: Run, test: TestSet, rows):
    return run.prompter.queries([test.records[i]["problem"] for i in rows], run.sizes.question)


def make_answerer(run: Run, view: views.View, sizes: Sizes):
    """Compiled (params, retriever, bank, index, queries, prompt, ids) -> greedy completions through one view.

    Arms that look the same way share one compiled function.
    """
    if (view, sizes) in run.compiled:
        return run.compiled[view, sizes]
    encode = views.make_encode(view, run.grid_hw, run.time_scale)
    sample = step.make_sampler(run.cfg, encode, run.decoding(0.0))

    @jax.jit
    def answer(params, retriever, bank, index, asked, prompt, ids_b):
        query = embed.embed_questions(retriever, *asked) if view.select == "retrieve" else None
        visual = views.select(view, index, query, bank, sizes.event, jax.random.key(run.config.seed))
        return sample(params, prompt, visual, rollout.rollout_keys(run.config.seed, 0, ids_b, 1))

    run.compiled[view, sizes] = answer
    return answer


def answer_all(run: Run, params: dict, view_name: str, visual: str, test: TestSet, label: str) -> list[dict]:
    """Prediction rows (see `scoring`) of one arm, in the order of the questions."""
    view, sizes = run.view(view_name), test.sizes
    answer = make_answerer(run, view, sizes)
    bank, rows = run.whole(test.bank[visual]), []
    kept = view.kept(sizes.patches, sizes.event)
    with metrics.Progress(label, len(test.records)) as bar:
        for chosen, real in _batches(test, run.config.eval.batch):
            index = take(test.videos, chosen).index(sizes)
            records = [test.records[i] for i in chosen]
            texts = [question_text(r["problem"], r["problem_type"], r["options"], STYLE) for r in records]
            prompt = run.prompter.whole(texts, kept, index.mask_bt.sum(1), sizes)
            inputs = run.split(index, queries(run, test, chosen), prompt, chosen.astype(np.int32))
            done = answer(params, run.retriever, bank, *inputs)
            tokens_br, mask_br = (np.asarray(x)[:real, 0] for x in (done.tokens_bgr, done.mask_bgr))
            used = visual_tokens(run, view, index)[:real]
            for record, tokens, mask, count in zip(records[:real], tokens_br, mask_br, used, strict=True):
                rows.append(_row(run, record, tokens[mask], int(count)))
            bar.update(len(rows))
    fields = ("problem_id", "question_type", "problem_type", "solution")
    return rows + [{**{f: record[f] for f in fields}, "error": "unreadable video"} for record in test.unreadable]


def visual_tokens(run: Run, view: views.View, index) -> np.ndarray:
    """int [B]; visual tokens that the decoder reads of each video."""
    p, t_b = run.prompter.tokens_per_patch, index.mask_bt.sum(1)
    if view.select == "none":
        return np.zeros(len(t_b), int)
    if view.method == "keep" and view.select == "retrieve":
        return np.minimum(np.sort(index.len_be, axis=1)[:, -view.k :].sum(1), t_b) * p
    kept = {"keep": t_b if view.select == "all" else np.ones_like(t_b), "merge": np.minimum(view.keep, t_b)}
    kept |= {"per_event": np.minimum(view.k, index.mask_be.sum(1))}
    kept |= dict.fromkeys(("mean", "pooled"), np.ones_like(t_b))
    return kept[view.method] * p


def _row(run: Run, record: dict, tokens: np.ndarray, visual: int) -> dict:
    completion = run.tokenizer.decode(tokens.tolist())
    stopped = bool(len(tokens)) and int(tokens[-1]) in run.tokenizer.stop_ids
    verdict = judging.judge(completion, record["solution"], record["problem_type"])
    fields = ("problem_id", "question_type", "problem_type", "solution")  # chance: from the distinct solutions
    return {
        **{name: record[name] for name in fields}, "video": record["path"], "completion": completion,
        "correct": bool(verdict["correct"]), "format_ok": bool(verdict["format_ok"]), "truncated": not stopped,
        "visual_tokens": visual, "completion_tokens": len(tokens),
    }  # fmt: skip


def retrieval(run: Run, test: TestSet) -> dict:
    """Recall@k in percent, over all questions and per type: every needed event is among the k retrieved."""
    hits = {k: np.zeros(len(test.records), bool) for k in (1, 2, 3)}
    needed = needed_events(test)
    for k in hits:
        view = views.View(select="retrieve", method="merge", k=k)
        for chosen, real in _batches(test, run.config.eval.batch):
            index = take(test.videos, chosen).index(test.sizes)
            query = embed.embed_questions(run.retriever, *queries(run, test, chosen))
            all_b, _ = embed.recall(*views.retrieved(view, index, query), needed[chosen])
            hits[k][chosen[:real]] = np.asarray(all_b)[:real]
    kinds = np.array([record["question_type"] for record in test.records])
    per = {kind: {f"recall@{k}": 100 * float(h[kinds == kind].mean()) for k, h in hits.items()} for kind in set(kinds)}
    total = {f"recall@{k}": 100 * float(h.mean()) for k, h in hits.items()}
    return {**total, "n": len(kinds), "per_type": dict(sorted(per.items()))}


def needed_events(test: TestSet) -> np.ndarray:
    """bool [questions, E]: found events that hold most of an annotated needed event."""
    out = np.zeros((len(test.records), test.sizes.events), bool)
    for i, record in enumerate(test.records):
        spans = test.found[record["path"]].event_spans
        for j in record["needed_events"]:
            a, b = record["events"][j]["start_patch"], record["events"][j]["end_patch"]
            overlap = np.minimum(spans[:, 1], b) - np.maximum(spans[:, 0], a)
            out[i, int(np.argmax(overlap))] = True
    return out


def write_predictions(folder: Path, arm: str, rows: list[dict]) -> Path:
    """One JSON line per question; the file appears whole."""
    path = Path(folder) / f"{arm}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return path


def arm_sources(run: Run, arms: list[str]) -> dict[str, tuple[dict, str]]:
    """{arm: (parameters, bank kind)} of these arms of config.eval; each stage's parameters are read once."""
    loaded: dict[str, dict] = {}
    out = {}
    for arm in arms:
        stage = run.config.eval.arms[arm].stage
        if stage not in run.config:
            raise ConfigError(f"config.eval.arms.{arm}.stage names {stage!r}, which is no stage")
        if stage not in loaded:
            loaded[stage] = run.parameters(stage)
        out[arm] = (loaded[stage], run.config[stage].visual)
    return out


