"""Arms over the held-out questions: who answers, looking how. The same code for the report and for `marc_jax.eval`.

The test videos are indexed once into a memory on disk; every arm reads its patches, events and embeddings from there.
"""

import dataclasses
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.video import VideoError
from marc_jax import files, metrics, settings
from marc_jax.baselines import fastv
from marc_jax.batches import Asked, Sizes, Videos
from marc_jax.config import ConfigError
from marc_jax.evaluation import judging
from marc_jax.memory import choose, embed, indexer, store
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.records import Records
from marc_jax.rl import rollout
from marc_jax.run import Run, embedded
from marc_jax.synthetic import bank_of, data_folder, decoded, read_records, report_unreadable


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

    def asked(self, rows) -> Asked:
        """These questions."""
        questions = [[types.SimpleNamespace(**self.records[i])] for i in rows]
        return Asked(self.videos.take(rows), questions, np.asarray(rows, np.int32), self.sizes)


def index_test(run: Run, params: dict, pixels: bool) -> TestSet:
    """Indexes the test videos into `<workdir>/memory` (those it lacks) and lays the questions over them."""
    folder = data_folder(run.config, run.workdir)
    records = read_records(folder, "test")[: run.config.eval.limit or None]
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
    bank = {"features": bank_of([found[name].tokens for name in names])}
    if pixels:
        bank["pixels"], _ = decoded(run, folder, names, "test")
    first = dict(zip(names, np.cumsum([0] + [len(found[n].tokens) for n in names[:-1]]).tolist(), strict=True))
    most = max(len(entry.event_spans) for entry in found.values())
    longest = max(int(np.diff(entry.event_spans, axis=1).max()) for entry in found.values())
    # In steps of 2 and 4, so that sets alike share compiled programs.
    most, longest = max(-(-most // 4) * 4, run.sizes.events), max(-(-longest // 2) * 2, run.sizes.event)
    sizes = dataclasses.replace(run.sizes, events=most, event=longest)
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


def _batches(order: np.ndarray, size: int):
    """These rows in batches of one shape; the last is filled up with the first row and cut by the caller."""
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield np.concatenate([part, np.full(size - len(part), order[0])]), len(part)


def queries(run: Run, test: TestSet, rows):
    return run.prompter.queries([test.records[i]["problem"] for i in rows], run.sizes.question)


def make_answerer(run: Run, view: views.View, sizes: Sizes):
    """(params, retriever, bank, emb, index, queries, prompt=, ids_b=) -> (greedy completions through one view, int [B]
    visual tokens read). Arms that look the same way share what is compiled, arms that read as much the decoder.
    """
    how = run.decoding(0.0)

    def look(params, retriever, key, bank, emb_nd, index, asked, prompt):
        query = embedded(view, retriever, asked)
        visual = views.select(view, index, query, bank, sizes.event, key, emb_nd)
        encode = views.make_encode(view, run.grid_hw, run.time_scale)
        vis, prompt = encode(qwen25_vl.bind(run.cfg, params, **run.binding), visual, prompt)
        slots = view.kept(index.patch_bt.shape[1], sizes.event) * run.prompter.tokens_per_patch
        return jnp.pad(vis, ((0, 0), (0, max(slots - vis.shape[1], 0)), (0, 0)))[:, :slots], prompt

    def speak(pruned, params, key, vis, prompt, ids_b):
        model = qwen25_vl.bind(run.cfg, params, **run.binding)
        keys = rollout.rollout_keys(key, 0, ids_b, 1)
        read_b = jnp.sum(prompt.mask_bp & (prompt.vis_index_bp >= 0), axis=1)
        if pruned is None:
            return rollout.decode(model, rollout.prefill(model, vis, prompt), keys, how), read_b
        read_b, slots = pruned.count(read_b, 1), vis.shape[1]
        length = prompt.tokens_bp.shape[1] - slots + int(pruned.count(np.array(slots), 1))
        prefix = fastv.prefill(model, vis, prompt, read_b, layer=pruned.layer, length=length)
        return rollout.decode(model, prefix, keys, how), read_b

    look = run.compiled.setdefault((view, sizes), jax.jit(look))
    pruned = view if view.method == "fastv" else None
    speak = run.compiled.setdefault(("speak", pruned), jax.jit(functools.partial(speak, pruned)))

    key = run.whole(jax.random.key(run.config.seed))  # an argument: runs that differ in it share what is compiled

    def answer(params, retriever, *looked_at, prompt, ids_b):
        return speak(params, key, *look(params, retriever, key, *looked_at, prompt), ids_b)

    return answer


def answer_all(
    run: Run, params: dict, view_name: str, visual: str, test: TestSet | Records, label: str
) -> list[dict]:
    """Prediction rows (see `scoring`) of one arm, in the order of the questions."""
    order, rows = np.arange(len(test.records)), []
    for _, found in answers(run, params, view_name, visual, test, label, order):
        rows += found
    fields = ("problem_id", "question_type", "problem_type", "solution")
    return rows + [{**{f: record[f] for f in fields}, "error": "unreadable video"} for record in test.unreadable]


def answers(run: Run, params: dict, view_name: str, visual: str, test: TestSet | Records, label: str, order):
    """Yields (row numbers, their prediction rows) batch by batch, of the questions in `order`."""
    view, most = run.view(view_name), test.sizes.event
    answer, done = make_answerer(run, view, test.sizes), 0
    bank = run.whole(test.bank[visual]) if isinstance(test, TestSet) else None
    emb = patch_embeddings(run, test) if view.asks and view.select in choose.SELECTORS else None
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    batch = -(-run.config.eval.batch // ways) * ways  # every device has as many questions
    with metrics.Progress(label, len(order)) as bar:
        for chosen, real in _batches(np.asarray(order), batch):
            asked = test.asked(chosen)
            index, sizes = asked.index(), asked.sizes
            kept, lengths = view.kept(sizes.patches, most), index.mask_bt.sum(1)
            texts = [text for row in asked.told_bg(view, kept, run.prompter.tokens_per_patch) for text in row]
            prompt = run.prompter.whole(texts, kept, lengths, sizes, asked.shapes)
            inputs = (index, run.queries(asked, asked.problems), prompt, chosen.astype(np.int32))
            own, *inputs, prompt, ids_b = run.split(asked.bank, *inputs)
            looked_at = (bank if own is None else own, emb, *inputs)
            said, read_b = answer(params, run.retriever, *looked_at, prompt=prompt, ids_b=ids_b)
            tokens_br, mask_br, used = (np.asarray(x) for x in (said.tokens_bgr[:, 0], said.mask_bgr[:, 0], read_b))
            yield chosen[:real], [
                _row(run, test.records[chosen[i]], tokens_br[i][mask_br[i]], int(used[i])) for i in range(real)
            ]
            done += real
            bar.update(done)


def patch_embeddings(run: Run, test: TestSet):
    """Embeddings [N, D] of the bank's patches by the run's own retriever, each patch on its own."""
    if "patch_embeddings" not in run.compiled:
        run.compiled["patch_embeddings"] = jax.jit(embed.embed_patches)
    return run.compiled["patch_embeddings"](run.retriever, run.whole(test.bank["features"]))


def _row(run: Run, record: dict, tokens: np.ndarray, visual: int) -> dict:
    completion = run.tokenizer.decode(tokens.tolist())
    stopped = bool(len(tokens)) and int(tokens[-1]) in run.tokenizer.stop_ids
    verdict = judging.judge(completion, record["solution"], record["problem_type"], rule=run.config.eval.rule)
    soft = {"score": verdict["score"], "options": record["options"]} if settings.on_files(run.config) else {}
    fields = ("problem_id", "question_type", "problem_type", "solution")  # chance: from the distinct solutions
    return {
        **{name: record[name] for name in fields}, "video": record["path"], "completion": completion,
        "correct": bool(verdict["correct"]), "format_ok": bool(verdict["format_ok"]), "truncated": not stopped,
        "visual_tokens": visual, "completion_tokens": len(tokens), **soft,
    }  # fmt: skip


def retrieval(run: Run, test: TestSet) -> dict:
    """Recall@k in percent, over all questions and per type: every needed event is among the k retrieved."""
    hits = {k: np.zeros(len(test.records), bool) for k in (1, 2, 3)}
    needed = needed_events(test)
    for k in hits:
        view = views.View(select="retrieve", method="merge", k=k)
        for chosen, real in _batches(np.arange(len(test.records)), run.config.eval.batch):
            index = test.videos.take(chosen).index(test.sizes)
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


def predictions_path(folder: Path, arm: str) -> Path:
    return Path(folder) / "predictions" / f"{arm}.jsonl"


def write_predictions(folder: Path, arm: str, rows: list[dict]) -> None:
    """One JSON line per question; the file appears whole."""
    path = predictions_path(folder, arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def arm_sources(run: Run, arms: list[str]) -> dict[str, tuple[dict, str]]:
    """{arm: (parameters, bank kind)} of these arms of config.eval; each stage's parameters are read once."""
    loaded: dict[str, dict] = {}
    out = {}
    for arm in arms:
        stage = run.config.eval.arms[arm].stage
        if stage and stage not in run.config:
            raise ConfigError(f"config.eval.arms.{arm}.stage names {stage!r}, which is no stage")
        if stage not in loaded:
            loaded[stage] = run.parameters(stage)
        if run.view(run.config.eval.arms[arm].view).reads_pixels:
            visual = "pixels"
        else:
            visual = run.config[stage].visual if stage else "features"
        out[arm] = (loaded[stage], visual)
    return out
