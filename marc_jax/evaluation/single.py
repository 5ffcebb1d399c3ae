"""One question over one video or several: the parts of an answer in order, each timed on its own."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines import patches, sources, video
from marc_jax import records, settings, unusable
from marc_jax.batches import Sizes, Videos
from marc_jax.config import ConfigError
from marc_jax.evaluation import experiment, pictures
from marc_jax.memory import embed, encoders, store
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.rl import rollout
from marc_jax.rl.types import PromptBatch
from marc_jax.run import Run


class Clock:
    """Seconds of every part, in order; of what is compiled in it, compiling included."""

    def __init__(self):
        self.parts: dict[str, float] = {}

    def once(self, name: str, fn: Callable):
        begun = time.perf_counter()
        result = jax.block_until_ready(fn())
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - begun
        return result


@dataclasses.dataclass(frozen=True)
class Event:
    """An event that was read. `number` of `count` in its video, from 1; seconds of the video; cosine similarity."""

    video: str
    number: int
    count: int
    begin: float
    end: float
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was said, and what it was made from.

    Attributes:
      events: what was retrieved, by video and time; empty where the view retrieves nothing.
      tokens, all_tokens: visual tokens read, and of all patches of these videos.
      seconds: {part: seconds}.
      first_token: seconds from the question to the first token.
      entries: {video: memory}, by name; `scores`: similarity of every event of each.
    """

    question: str
    text: str
    events: tuple[Event, ...]
    tokens: int
    all_tokens: int
    seconds: dict[str, float]
    first_token: float
    entries: Mapping[str, store.MemoryEntry]
    scores: Mapping[str, np.ndarray]


def join(entries: Mapping[str, store.MemoryEntry], query_d: np.ndarray) -> store.MemoryEntry:
    """Several videos as one, shown one after the other; event embeddings [E, D] for this question.

    So a question over an archive whose events all lie in one video is answered exactly as over that video.
    """
    parts = list(entries.values())
    first = np.cumsum([0] + [len(part.tokens) for part in parts])
    return store.MemoryEntry(
        video_sha256="",
        seconds=np.concatenate([part.seconds for part in parts]),
        event_spans=np.concatenate([part.event_spans + at for part, at in zip(parts, first, strict=False)]),
        event_seconds=np.concatenate([part.event_seconds for part in parts]),
        event_embeddings=np.concatenate([encoders.nearest_frames(p.event_embeddings, query_d) for p in parts]),
        tokens=np.concatenate([np.asarray(part.tokens, np.float32) for part in parts]),
        grid=parts[0].grid,
    )


class Laid(NamedTuple):
    """A question and what it is about, padded to static sizes: what the compiled functions take."""

    index: views.VideoIndex
    bank: np.ndarray
    sizes: Sizes
    prompt: PromptBatch


class Answerer:
    """One stage of a run, looking one way: compiled once for videos and questions of like length."""

    def __init__(
        self, here: Run, stage: str, view: views.View, encoder: encoders.Encoder | None = None,
        max_new: int | None = None,
    ):  # fmt: skip
        """Args:
        stage: "" is a published model as it is: it gets the question alone, a stage trained on files its own wording.
        encoder: embeds the question in place of the run's retriever: the one that embedded the events.
        max_new: most tokens of an answer; default the run's.
        """
        if view.asks and view.select != "retrieve":
            raise ConfigError(f"a view that selects by {view.select!r} is for evaluation: a memory embeds events alone")
        if view.method == "fastv":
            raise ConfigError("a view that drops tokens inside the decoder ('fastv') is for evaluation")
        self.here, self.view, self.encoder = here, view, encoder
        self.params = here.parameters(stage)
        own_tower = bool(stage) and here.config[stage].get("visual", "features") == "pixels"
        self.pixels = view.reads_pixels or own_tower
        self._lay_out = self._from_files if settings.on_files(here.config) else self._joined
        self._style = "eval" if stage else "glued"
        cfg, how, binding = here.cfg, here.decoding(0.0, max_new), here.binding
        encode = views.make_encode(view, here.grid_hw, here.time_scale)
        self._embed = jax.jit(lambda p, q: embed.embed_questions(p, *q))
        self._select = jax.jit(functools.partial(views.select, view), static_argnums=(3,))
        self._retrieved = jax.jit(functools.partial(views.retrieved, view))
        self._see = jax.jit(lambda p, v, q: encode(qwen25_vl.bind(cfg, p, **binding), v, q))
        self._say = jax.jit(lambda p, x, k: rollout.decode(qwen25_vl.bind(cfg, p, **binding), x, k, how))

        @jax.jit
        def read(params, vis, prompt):
            model = qwen25_vl.bind(cfg, params, **binding)
            prefix = rollout.prefill(model, vis, prompt)
            return prefix, model.logits(prefix.last_bd).argmax(-1)

        self._read = read

    def embed(self, question: str) -> np.ndarray:
        """[1, D]; zeros [1, 1] where nothing embeds, as the events of such a memory."""
        if self.encoder is not None:
            return self.encoder.embed_texts([question])
        if self.here.retriever is None:
            return np.zeros((1, 1), np.float32)
        tokens = self.here.prompter.queries([question], self.here.sizes.question)
        return np.asarray(self._embed(self.here.retriever, tokens))

    def chosen(self, event_emb: np.ndarray, query: np.ndarray) -> list[int]:
        """Numbers of the events, increasing, that a view that retrieves chooses among these embeddings."""
        emb_ed = encoders.nearest_frames(event_emb, query[0])
        count, padded = len(emb_ed), -(-max(len(emb_ed), self.view.k) // 8) * 8
        none = np.zeros((1, 1), np.int32)
        emb_bed = np.pad(emb_ed, ((0, padded - count), (0, 0)))[None]
        index = views.VideoIndex(none, none > 0, none, none, none, np.arange(padded)[None] < count, emb_bed)
        ids_bk, valid_bk = map(np.asarray, self._retrieved(index, query))
        return ids_bk[0][valid_bk[0]].tolist()

    def answer(
        self, question: str, query: np.ndarray, entries: Mapping[str, store.MemoryEntry], clock: Clock,
        clips: Mapping[str, video.Clip] | None = None,
    ) -> Answer:  # fmt: skip
        """Args:
        query: the embedded question [1, D].
        clips: the videos' frames, for a stage whose own vision tower sees them (`pixels`).
        """
        here, view, begun = self.here, self.view, time.perf_counter()
        before = sum(clock.parts.values())
        index, bank, sizes, prompt = self._lay_out(question, query, entries, clips)
        picked = clock.once("select", lambda: self._select(index, query, bank, sizes.event, jax.random.key(0)))
        vis, prompt = clock.once("vision + compress", lambda: self._see(self.params, picked, prompt))
        prefix, _ = clock.once("prefill", lambda: self._read(self.params, vis, prompt))
        first_token = before + time.perf_counter() - begun
        keys = rollout.rollout_keys(here.config.seed, 0, np.zeros(1, np.int32), 1)
        done = clock.once("decode, all tokens", lambda: self._say(self.params, prefix, keys))
        said = np.asarray(done.tokens_bgr)[0, 0][np.asarray(done.mask_bgr)[0, 0]]
        clock.parts["decode per token"] = clock.parts["decode, all tokens"] / max(len(said), 1)
        count = sum(len(entry.event_spans) for entry in entries.values())
        scores = index.emb_bed[0, :count] @ query[0]
        chosen = []
        if view.select == "retrieve":
            ids_bk, valid_bk = self._retrieved(index, query)
            chosen = np.asarray(ids_bk)[0][np.asarray(valid_bk)[0]].tolist()
        events, per_video = _events(entries, scores, chosen)
        used = int(np.sum(np.asarray(prompt.mask_bp & (prompt.vis_index_bp >= 0))))
        own = here.prompter.tokens_per_patch if index.shapes is None else int(index.shapes.tokens_b[0])
        everything = own * sum(len(entry.tokens) for entry in entries.values())
        text = here.tokenizer.decode(said.tolist())
        return Answer(question, text, events, used, everything, clock.parts, first_token, entries, per_video)

    def _joined(self, question: str, query: np.ndarray, entries: Mapping[str, store.MemoryEntry], clips) -> Laid:
        """Videos of one size, one after the other."""
        entry, prompter = join(entries, query[0]), self.here.prompter
        sizes = self._sizes(entry, question)
        index, kept = _videos(entry, sizes).index(sizes), self.view.kept(sizes.patches, sizes.event)
        said = self.view.told(kept, prompter.tokens_per_patch)
        told = len(self.here.tokenizer.encode(said))
        length = -(-(kept * prompter.tokens_per_patch + told + sizes.question) // 16) * 16
        prompt = prompter.prompts([said + question], kept, index.mask_bt.sum(1), length)
        return Laid(index, self._bank(entry, clips, sizes), sizes, prompt)

    def _from_files(self, question: str, query: np.ndarray, entries: Mapping[str, store.MemoryEntry], clips) -> Laid:
        """One video of any shape and rate, as training and evaluation on files read it. `clips`: not needed."""
        (name,) = entries
        record = sources.Record(0, question, "video", "free-form", (), "", name)
        for problem in unusable.too_long(self.here, [record], self._style).values():
            raise ConfigError(f"--question: {problem['reason']}")
        asked = records.Records(self.here, [record], entries, query, self._style).asked([0])
        index, sizes, kept = asked.index(), asked.sizes, self.view.kept(asked.sizes.patches, asked.sizes.event)
        texts_bg = asked.told_bg(self.view, kept, self.here.prompter.tokens_per_patch)
        prompt = self.here.prompter.whole(*texts_bg, kept, index.mask_bt.sum(1), sizes, asked.shapes)
        return Laid(index, asked.bank, sizes, prompt)

    def _sizes(self, entry: store.MemoryEntry, question: str) -> Sizes:
        """Static lengths, rounded up so that videos and questions of like length share what is compiled."""
        longest = int(np.diff(entry.event_spans, axis=1).max())
        events = max([len(entry.event_spans), *(v.k for v in self.here.views.values())])
        text = len(self.here.tokenizer.encode(question)) + 8
        up = lambda n, step: -(-n // step) * step  # noqa: E731
        return Sizes(up(len(entry.tokens), 16), up(events, 8), up(longest, 4), text, self.here.sizes.answer)

    def _bank(self, entry: store.MemoryEntry, clips, sizes: Sizes) -> np.ndarray:
        bank = entry.tokens
        if self.pixels:
            bank = np.concatenate([patches.frames_to_pixel_patches(clip.frames)[0] for clip in clips.values()])
        return np.concatenate([bank, np.zeros((sizes.patches - len(bank), *bank.shape[1:]), bank.dtype)])

    def draw(self, path, answer: Answer, clips: Mapping[str, video.Clip]) -> None:
        """A PNG of what was retrieved and merged, over the frames of the answer's videos in a row."""
        query = self.embed(answer.question)
        index, bank, sizes, _ = self._lay_out(answer.question, query, answer.entries, clips)
        looked = experiment.seen(self.here, self.params, self.view, index, bank, sizes.event, query)
        entry = join(answer.entries, query[0])
        pictures.draw_sample(
            path, np.concatenate([clip.frames for clip in clips.values()]),
            np.concatenate([clip.seconds for clip in clips.values()]), entry.event_spans.tolist(),
            question=answer.question, answers={"answer": (answer.text, None)},
            title=", ".join(answer.entries) if len(answer.entries) > 1 else "", **looked,
        )  # fmt: skip


def _videos(entry: store.MemoryEntry, sizes: Sizes) -> Videos:
    pad = ((0, 0), (0, sizes.events - len(entry.event_spans)))
    length = np.diff(entry.event_spans, axis=1)[:, 0]
    start = np.pad(entry.event_spans[None, :, 0], pad).astype(np.int64)
    count = np.pad(length[None], pad).astype(np.int64)
    emb = np.pad(entry.event_embeddings[None], ((0, 0), pad[1], (0, 0)))
    return Videos(start, start, count, count > 0, emb)


def _events(entries: Mapping[str, store.MemoryEntry], scores: np.ndarray, chosen: list[int]):
    """(the chosen events, {video: similarity of each of its events}); ids and scores count through all videos."""
    events, per_video, first = [], {}, 0
    for name, entry in entries.items():
        count = len(entry.event_spans)
        per_video[name] = scores[first : first + count]
        for i in (e - first for e in chosen if first <= e < first + count):
            begin, end = entry.event_seconds[i]
            events.append(Event(name, i + 1, count, float(begin), float(end), float(scores[first + i])))
        first += count
    return tuple(events), per_video
