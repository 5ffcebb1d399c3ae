"""Training and evaluation on files of one's own: Video-R1 records over a memory on disk.

Every video and image is decoded and goes through the frozen vision tower once (`memory.indexer`); what a step reads of
them are the stored features, so another epoch, stage or evaluation decodes nothing:

    question file --rows--> media --decode, events, tower--> memory on disk --batch of a step--> bank [B, T, n, V]

A temporal patch is padded to one number of tokens, a batch to a bucket of temporal patches; masks leave the rest out.
What a step sees is a function of (seed, stage, step) alone: its position in the data is one integer.
"""

import dataclasses
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from data_pipelines import loader, sources
from marc_jax import distributed, files, unusable
from marc_jax.batches import Asked, Shape, Videos
from marc_jax.config import ConfigError
from marc_jax.media import media_key, open_indexer, remember
from marc_jax.memory import encoders, indexer, store
from marc_jax.memory.view import View
from marc_jax.rl import packing
from marc_jax.run import Run, chosen_encoder

READERS = 4  # threads that read a batch's features


class Records:
    """Questions over a memory, with the interface that stages and the evaluation draw from.

    Attributes:
      records: dicts, one per question that can be asked.
      unreadable: dicts of those that cannot.
      sizes: the largest that a batch is padded to.
    """

    def __init__(
        self, run: Run, records: Sequence[sources.Record], memory: store.MemoryReader, query_nd, style: str,
        unreadable: Sequence[dict] = (),
    ):  # fmt: skip
        """`query_nd`: embeddings of the records' questions, or None."""
        self._records, self._memory, self._query_nd, self._style = records, memory, query_nd, style
        self.sizes, self._prompter, self._seed = run.sizes, run.prompter, run.config.seed
        self._most_k, data = max(view.k for view in run.views.values()), run.config.data
        self._buckets, self._second_per_grid = sorted(data.buckets), data.second_per_grid
        self._tokens_per_second, self._patches = run.cfg.tokens_per_second, run.grid_hw[0] * run.grid_hw[1]
        self._readers, self._packs = ThreadPoolExecutor(READERS), {}
        self.records, self.unreadable = [row_of(record) for record in records], tuple(unreadable)

    def draw(self, stage: str, step: int, videos: int, per_video: int, events, types) -> Asked:
        """The questions of one step, about a video or image each; the same for the same (seed, stage, step).

        Up to `per_video` questions about one medium stand together. Every question is met once per epoch; a batch may
        hold the end of one and the beginning of the next.
        """
        del events, types  # of the synthetic set
        return self._asked(self._of_step(stage, step, videos, self._together(per_video)))

    def draw_packed(self, stage: str, step: int, rows: int, packs: "Packs") -> Asked:
        """The questions of one step, `packs.segments` places in each packed row; as `draw`, with rows for questions.

        What a row leaves free is filled with its first question, which is not real.
        """
        drawn = self._of_step(stage, step, rows, packs.rows)
        asked = self._asked([(i,) for row in drawn for i in (*row, *row[:1] * (packs.segments - len(row)))])
        real_b = np.concatenate([np.arange(packs.segments) < len(row) for row in drawn])
        return dataclasses.replace(asked, real_b=real_b)

    def _of_step(self, stage: str, step: int, count: int, rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """`count` of the rows, which are shuffled anew each epoch."""
        seed, drawn = zlib.crc32(f"{self._seed}/{stage}".encode()), []
        for position in range(step * count, (step + 1) * count):
            epoch, at = divmod(position, len(rows))
            drawn.append(rows[int(loader.epoch_order(len(rows), seed, epoch)[at])])
        return drawn

    def packs(self, name: str, views: dict[str, View], max_length: int, max_segments: int) -> "Packs":
        """All questions in rows of `max_length` tokens, each at the most that one of the views reads of it.

        Raises:
          ConfigError: a question is longer than config[name].max_length.
        """
        key = (*views.values(), max_length, max_segments)
        if key not in self._packs:
            lengths_n, targets_n = self._lengths(views.values())
            if (over := np.flatnonzero(lengths_n > max_length)).size:
                longest, seen = lengths_n.max(), " or ".join(map(repr, views))
                one = self._records[int(lengths_n.argmax())]
                raise ConfigError(
                    f"config.{name}.max_length = {max_length}: {len(over)} of {len(lengths_n)} questions are longer, "
                    f"read through {seen}; the longest, row {one.row} of the file ({one.path}), has {longest} tokens: "
                    f"set max_length to {longest}, or read fewer frames or tokens of each"
                )
            rows = packing.best_fit_decreasing(lengths_n, max_length, max_segments)
            targets = max(int(targets_n[list(row)].sum()) for row in rows)
            self._packs[key] = Packs(rows, max(map(len, rows)), targets, int(lengths_n.sum()))
        return self._packs[key]

    def _lengths(self, views: Iterable[View]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every question with its answer, the most that one of the views reads; those of its answer."""
        count, blank = self._prompter.tokenizer.counts, Shape("video", (1, 1), 0.0)
        around = sum(self._prompter.words("", blank))
        targets_n = np.array(count(record.target for record in self._records)) + 1  # the stop token
        heads = [self._memory.head(media_key(record)) for record in self._records]
        patches_n = [len(head.seconds) for head in heads]
        own_n = [int(np.prod(self._shape(*pair).hw)) for pair in zip(self._records, heads, strict=True)]
        asked = [sources.question_text(r.problem, r.problem_type, r.options, self._style) for r in self._records]
        longest_n, event = np.zeros(len(heads), int), self.sizes.event
        for view in views:
            said = view.told(view.kept(self._buckets[-1], event), self._patches)
            read_n = [view.most(patches, own, event) for patches, own in zip(patches_n, own_n, strict=True)]
            longest_n = np.maximum(longest_n, np.array(count(said + text for text in asked)) + read_n)
        return longest_n + around + targets_n, targets_n

    def _together(self, most: int) -> list[tuple[int, ...]]:
        """All questions, up to `most` about the same medium together."""
        if most not in self._packs:
            media: dict[str, list[int]] = {}
            for i, record in enumerate(self._records):
                media.setdefault(media_key(record) if most > 1 else str(i), []).append(i)
            packs = (rows[start : start + most] for rows in media.values() for start in range(0, len(rows), most))
            self._packs[most] = [tuple(rows) for rows in packs]
        return self._packs[most]

    def asked(self, rows: Sequence[int]) -> Asked:
        """These questions, one in each row, padded to the smallest sizes that hold them."""
        return self._asked([(i,) for i in rows])

    def _asked(self, rows: Sequence[tuple[int, ...]]) -> Asked:
        records_bg = [[self._records[i] for i in row] for row in rows]
        records = [row[0] for row in records_bg]
        entries = list(self._readers.map(lambda record: self._memory[media_key(record)], records))
        shapes = tuple(self._shape(*pair) for pair in zip(records, entries, strict=True))
        shaped = [(record, shape) for row, shape in zip(records_bg, shapes, strict=True) for record in row]
        texts = [sources.question_text(r.problem, r.problem_type, r.options, self._style) for r, _ in shaped]
        words = [self._prompter.words(text, shape)[1] for text, (_, shape) in zip(texts, shaped, strict=True)]
        said = [self._prompter.spoken(record.target) for record, _ in shaped]
        most = bucket(max(len(entry.tokens) for entry in entries), self._buckets)
        sizes = dataclasses.replace(
            self.sizes, patches=most, events=max(most, self._most_k), event=most,
            question=halved(max(words), self.sizes.question), answer=halved(max(said), self.sizes.answer),
        )  # fmt: skip
        first = entries[0].tokens
        bank = np.zeros((len(rows), most, self._patches, first.shape[-1]), first.dtype)
        for row, entry in zip(bank, entries, strict=True):
            row[: len(entry.tokens), : entry.tokens.shape[1]] = entry.tokens
        query_bd = None if self._query_nd is None else self._query_nd[[row[0] for row in rows]]
        ids_b = np.array([record.row for record in records])
        return Asked(
            spans(entries, sizes.events, query_bd), records_bg, ids_b, sizes, self._style, shapes, bank, query_bd,
        )  # fmt: skip

    def _shape(self, record: sources.Record, entry: store.MemoryEntry) -> Shape:
        merged = (entry.grid[0] // 2, entry.grid[1] // 2)
        if record.data_type == "image":
            return Shape("image", merged, 0.0)
        seconds = self._second_per_grid or entry.extra["second_per_grid"]
        return Shape("video", merged, seconds * self._tokens_per_second)

    def lengths(self) -> list[tuple[int, float]]:
        """(bucket of temporal patches, seconds of video) of every question."""
        heads = (self._memory.head(media_key(record)) for record in self._records)
        return [(bucket(len(head.seconds), self._buckets), float(head.extra.get("duration", 0.0))) for head in heads]

    def events(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(seconds [E, 2], similarity to the question [E]) of the events of question i's video."""
        entry, query_d = self._memory.head(media_key(self._records[i])), self._query_nd[i]
        return entry.event_seconds, encoders.nearest_frames(entry.event_embeddings, query_d) @ query_d

    def files(self, asked: Asked) -> list[list[str]]:
        """The file of each question."""
        return [[record.path for record in row] for row in asked.questions_bg]


@dataclasses.dataclass(frozen=True)
class Packs:
    """Which questions lie in one row.

    Attributes:
      rows: numbers of the questions in each.
      segments: most questions of a row.
      targets: most tokens of the answers in a row.
      tokens: of all questions, at most.
    """

    rows: list[tuple[int, ...]]
    segments: int
    targets: int
    tokens: int


def bucket(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `count`."""
    return next(size for size in buckets if size >= count)


def halved(count: int, most: int) -> int:
    """`most`, or half of it where that is enough: two compiled lengths, not one of every length."""
    return most if count > most // 2 else most // 2


def spans(entries: Sequence[store.MemoryEntry], events: int, query_bd) -> Videos:
    """The events of B videos, each in a bank of its own."""
    b, start, length = len(entries), np.zeros((len(entries), events), int), np.zeros((len(entries), events), int)
    width = entries[0].event_embeddings.shape[-1]
    emb = np.zeros((b, events, width), np.float32)
    for i, entry in enumerate(entries):
        n = len(entry.event_spans)
        start[i, :n], length[i, :n] = entry.event_spans[:, 0], np.diff(entry.event_spans, axis=1)[:, 0]
        query_d = np.zeros(width) if query_bd is None else query_bd[i]
        emb[i, :n] = encoders.nearest_frames(entry.event_embeddings, query_d)
    return Videos(start, start, length, length > 0, emb)


def row_of(record: sources.Record) -> dict:
    """A record as the evaluation's tables know it; questions are told apart by their row in the file."""
    kind = str(record.extra.get("question_type") or record.extra.get("original_question_type") or record.problem_type)
    fields = ("problem", "problem_type", "solution", "path")
    return {"problem_id": record.row, "question_type": kind, "options": list(record.options)} | {
        name: getattr(record, name) for name in fields
    }


# ------------------------------------------------------------------------------------------------ files -> memory


def load_training(run: Run) -> None:
    """Opens the question files of the stages to come, their media in the memory."""
    config = run.config
    for name in config.stages:
        wanted = not any(config.only) or name in config.only
        if wanted and config[name].file not in run.sources:
            run.sources[config[name].file] = open_records(run, config[name].file or config.data.train, "train")


def open_records(run: Run, file: str, style: str) -> Records:
    """Reads a question file and brings what the memory lacks of its media into it.

    Args:
      file: Video-R1's JSON; paths in it are relative to config.data.root.
      style: of `question_text`, "train" or "eval".

    Raises:
      ConfigError: rows that cannot be used (bad fields, files that are absent, broken or outside of the root, texts
        that are too long), with their number and the first; all are in `<workdir>/<name of the file>.bad.jsonl`.
        With config.data.skip_bad they are left out instead, unless nothing is left.
      StaleMemory: the memory was made with other weights or settings.
    """
    errors: list[sources.RecordError] = []
    try:
        records = sources.load_records(file, errors=errors)
    except sources.RecordError as e:
        raise ConfigError(str(e)) from None
    if style == "train":
        records, errors = _sampled(run, records, errors)
    return over_memory(run, file, records, style, errors)


def over_memory(
    run: Run, file: str, records: Sequence[sources.Record], style: str, errors: Sequence[sources.RecordError] = ()
) -> Records:
    """`open_records` of records that have been read: told apart by their row; `errors` are those of other rows."""
    told = [{"row": e.row, "line": e.line, "path": "", "reason": f"{e.field or 'row'}: {e.reason}"} for e in errors]
    bad, total = {line["row"]: line for line in told}, len(records) + len(errors)
    bad |= unusable.too_long(run, records, style)
    rest = [record for record in records if record.row not in bad]
    bad |= {r.row: unusable.line_of(r, reason) for r in rest if (reason := unusable.absent(run, r))}
    if not run.config.data.skip_bad:
        unusable.exclude(run, file, bad, total)  # before hours of decoding
    alone = run.alone()
    encoder, pool = chosen_encoder(alone)
    worker = open_indexer(alone, alone.parameters(""), encoder, pool, run.config.data.shots, "config.data.shots")
    run.tower = dict(worker.fingerprint.parts)["tower"]
    memory, broken = remember(run, worker, [record for record in records if record.row not in bad])
    bad |= {r.row: unusable.line_of(r, broken[media_key(r)]) for r in records if media_key(r) in broken}
    good = [record for record in records if record.row not in bad]
    unusable.exclude(run, file, bad, total)
    query_nd = None if encoder is None else _embedded(memory, worker, encoder, [record.problem for record in good])
    left_out = [row_of(record) for record in records if record.row in bad]
    blank = {"question_type": "bad row", "problem_type": "", "solution": "", "path": ""}
    left_out += [{"problem_id": e.row, **blank} for e in errors]
    return Records(run, good, memory, query_nd, style, left_out)


def _sampled(run: Run, records, errors):
    """config.data.sample of all rows, the same for the same seed."""
    rows, count = sorted(row.row for row in [*records, *errors]), run.config.data.sample
    if not 0 < count < len(rows):
        return records, errors
    kept = set(np.random.default_rng(run.config.seed).choice(rows, count, replace=False).tolist())
    return [r for r in records if r.row in kept], [e for e in errors if e.row in kept]


def _embedded(memory: store.MemoryReader, worker: indexer.Indexer, encoder, problems: list[str]) -> np.ndarray:
    """Embeddings [N, D] of the questions, kept beside the memory."""
    told = json.dumps([encoder.fingerprint, problems]).encode()
    path = memory.path / f"questions-{hashlib.sha256(told).hexdigest()[:16]}.npy"
    if jax.process_index() == 0 and not path.exists():
        content = io.BytesIO()
        np.save(content, encoder.embed_texts(problems))
        files.write_whole(path, content.getvalue())
    distributed.exchanged(None)  # it is there
    return np.load(path, allow_pickle=False)
