"""Host side of a step: which videos, which questions, as padded numpy arrays. Deterministic in (seed, stage, step).

Training draws *recomposed* videos: events of decoded training videos set side by side anew. No vision attention
crosses a temporal patch (models.md 1.3), so their visual tokens are exactly those of the file that would hold them.
"""

import dataclasses
import functools
import zlib
from typing import NamedTuple

import numpy as np

from data_pipelines.sources import question_text
from data_pipelines.synthetic import questions as ask
from data_pipelines.synthetic import recompose
from marc_jax.memory.view import Shapes, VideoIndex
from marc_jax.models.prompts import Visual as Placeholder
from marc_jax.models.prompts import build_prompt, pad_prompts
from marc_jax.rl.types import PromptBatch

BLOCK = 128  # records that are drawn at a time
STYLE = "glued"  # of `question_text`: what the synthetic set trains on and is asked in its evaluation


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static lengths: patches and events of a video, patches of one event, text tokens of a question, of an answer.

    `lead`: tokens of a prompt before its visual ones. `told`: those that a view says before the question.
    """

    patches: int
    events: int
    event: int
    question: int
    answer: int
    lead: int = 3
    told: int = 0

    @property
    def asked(self) -> int:
        """Tokens of a question and of what is said before it."""
        return self.told + self.question


class Shape(NamedTuple):
    """A "video" or "image": (h, w) in merged tokens, position ids from one temporal patch to the next."""

    kind: str
    hw: tuple[int, int]
    rate: float


@dataclasses.dataclass(frozen=True)
class Videos:
    """B videos as spans of a patch bank. `start_be`, `len_be` count patches inside the video, `row_be` in the bank.

    Patches between two spans, a transition, are in no event; they are read with the video's other patches and lie in
    the bank right before the next event's.
    """

    row_be: np.ndarray
    start_be: np.ndarray
    len_be: np.ndarray
    mask_be: np.ndarray
    emb_bed: np.ndarray

    def index(self, sizes: Sizes) -> VideoIndex:
        """Spans -> padded patch rows; a patch between two events counts with the later one in `event_bt`."""
        t = np.arange(sizes.patches)[None, :, None]
        ahead_bte = (t < (self.start_be + self.len_be)[:, None]) & self.mask_be[:, None]
        mask_bt = ahead_bte.any(-1)
        event_bt = np.where(mask_bt, ahead_bte.argmax(-1), sizes.events)
        slot_bt = np.minimum(event_bt, sizes.events - 1)
        row_bt = np.take_along_axis(self.row_be - self.start_be, slot_bt, 1) + t[..., 0]
        return VideoIndex(
            np.where(mask_bt, row_bt, 0).astype(np.int32), mask_bt, event_bt.astype(np.int32),
            self.start_be.astype(np.int32), self.len_be.astype(np.int32), self.mask_be, self.emb_bed,
        )  # fmt: skip

    def arrays(self) -> list[np.ndarray]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def take(self, rows_b) -> "Videos":
        """These videos."""
        return Videos(*(array[rows_b] for array in self.arrays()))


class Prompter:
    """Token arrays of questions in the chat template; prompts are kept for the next time they are asked for.

    Args:
      tokenizer: of the model.
      grid_hw: (h, w) of a temporal patch in merged tokens; where videos differ in it, h * w is what they are padded to.
      time_scale: position ids from one temporal patch to the next, where a `Shape` does not say.
      system: the system turn; "" gives none.
      cache: how many prompts are kept.
    """

    def __init__(
        self, tokenizer, grid_hw: tuple[int, int], time_scale: float, system: str = "", *, cache: int = 8192
    ):
        self.tokenizer, self.system = tokenizer, system
        self.shape = Shape("video", grid_hw, time_scale)
        self.tokens_per_patch = grid_hw[0] * grid_hw[1]
        self._prompt = functools.lru_cache(maxsize=cache)(self._build)
        self._answer = functools.lru_cache(maxsize=cache)(self._encode_answer)
        self._row = functools.lru_cache(maxsize=cache)(self._pad)
        self._continued = functools.lru_cache(maxsize=cache)(self._continue)
        self._text = functools.lru_cache(maxsize=cache)(lambda text: np.array(tokenizer.encode(text), np.int32))

    def _build(self, text: str, kept: int, kind: str, hw: tuple[int, int]):
        """`kept` patches' placeholders at temporal offset 0, taking no more positions than one patch does."""
        place = Placeholder(kind=kind, grid=(kept, *hw), t_ids=(0,) * kept, extent=max(hw))
        prompt, own = build_prompt(self.tokenizer, text, [place], system=self.system), hw[0] * hw[1]
        row = prompt.vis_index // own * self.tokens_per_patch + prompt.vis_index % own
        return dataclasses.replace(prompt, vis_index=np.where(prompt.vis_index >= 0, row, -1).astype(np.int32))

    def prompt(self, text: str, kept: int, patches: int, shape: Shape | None = None):
        """The prompt of a question about a video of `patches`, of which `kept` are read: its text goes on after all."""
        shape = shape or self.shape
        base, late = self._prompt(text, kept, shape.kind, shape.hw), self._late(patches, shape)
        after = np.arange(len(base.tokens)) >= _cut(base)
        return dataclasses.replace(base, pos=base.pos + late * after, next_pos=base.next_pos + late)

    def _late(self, patches: int, shape: Shape) -> int:
        """How much later than after one patch the text goes on."""
        side = max(shape.hw)
        return max(int((patches - 1) * shape.rate + 1e-4) + 1, side) - side

    def _pad(self, text: str, kept: int, kind: str, hw: tuple[int, int], length: int, whole: bool):
        """A prompt, or its beginning up to the last visual token, as a batch of one; and where its text goes on."""
        prompt = self._prompt(text, kept, kind, hw)
        cut = _cut(prompt)
        if not whole:
            start = int(np.asarray(prompt.pos)[0, cut])
            prompt = dataclasses.replace(
                prompt, tokens=prompt.tokens[:cut], pos=prompt.pos[:, :cut], vis_index=prompt.vis_index[:cut],
                next_pos=start,
            )  # fmt: skip
        there = np.arange(length)
        return pad_prompts([prompt], length), (there >= cut) & (there < len(prompt.tokens))

    def _batch(self, texts, kept: int, patches_b, length: int, shapes, whole: bool) -> PromptBatch:
        shapes = shapes or [self.shape] * len(texts)
        rows = [self._row(text, kept, s.kind, s.hw, length, whole) for text, s in zip(texts, shapes, strict=True)]
        late_b = np.array([self._late(int(t), s) for t, s in zip(patches_b, shapes, strict=True)], np.int32)
        ones, after = [one for one, _ in rows], np.stack([after for _, after in rows])
        return PromptBatch(
            np.concatenate([one.tokens_bp for one in ones]), np.concatenate([one.mask_bp for one in ones]),
            np.concatenate([one.pos_3bp for one in ones], axis=1) + late_b[:, None] * after,
            np.concatenate([one.vis_index_bp for one in ones]),
            np.concatenate([one.next_pos_b for one in ones]) + late_b,
        )  # fmt: skip

    def words(self, text: str, shape: Shape | None = None) -> tuple[int, int]:
        """Tokens of a prompt before and after its visual ones."""
        seen = np.flatnonzero(self.prompt(text, 1, 1, shape).vis_index >= 0)
        return int(seen[0]), len(self.prompt(text, 1, 1, shape).tokens) - 1 - int(seen[-1])

    def spoken(self, answer: str) -> int:
        """Tokens of an answer, its stop token included."""
        return len(self._answer(answer))

    def _encode_answer(self, text: str) -> np.ndarray:
        return np.array([*self.tokenizer.encode(text), self.tokenizer.id("<|im_end|>")], np.int32)

    def prompts(self, texts, kept: int, patches_b, length: int, shapes=None) -> PromptBatch:
        """Whole prompts, right-padded to `length`."""
        return self._batch(texts, kept, patches_b, length, shapes, True)

    def whole(self, texts, kept: int, patches_b, sizes: Sizes, shapes=None) -> PromptBatch:
        """Whole prompts, padded to the longest that `sizes` allows: those before, the visual ones, the question's."""
        return self.prompts(texts, kept, patches_b, self._before(kept, sizes) + sizes.asked, shapes)

    def _before(self, kept: int, sizes: Sizes) -> int:
        return sizes.lead + kept * self.tokens_per_patch

    def split(self, texts_bg, answers_bg, kept: int, patches_b, sizes: Sizes, shapes=None):
        """Prompts cut behind their last visual token: the shared prefix, and per question the rest with its answer.

            prefix  <|im_start|> user <|vision_start|> v v v v          once per video
            suffix  <|vision_end|> question ... assistant answer        G of them; loss on the answer alone

        Returns (prefix PromptBatch [B, P], tokens_bgr, mask_bgr, loss_bgr), R = sizes.asked + sizes.answer.
        """
        b, g, r = len(texts_bg), len(texts_bg[0]), sizes.asked + sizes.answer
        kinds = shapes or [self.shape] * b
        rows = [
            self._continued(text, answer, shape.kind, shape.hw, sizes.asked, sizes.answer)
            for texts, answers, shape in zip(texts_bg, answers_bg, kinds, strict=True)
            for text, answer in zip(texts, answers, strict=True)
        ]
        tokens_bgr = np.stack([row for row, _, _ in rows]).reshape(b, g, r)
        asked_bg, said_bg = (np.array([row[i] for row in rows]).reshape(b, g, 1) for i in (1, 2))
        mask_bgr = np.arange(r) < said_bg
        first = [texts[0] for texts in texts_bg]
        prefix = self._batch(first, kept, patches_b, self._before(kept, sizes), shapes, False)
        return prefix, tokens_bgr, mask_bgr, mask_bgr & (np.arange(r) >= asked_bg)

    def _continue(self, text: str, answer: str, kind: str, hw: tuple[int, int], most: int, longest: int):
        """(tokens [most + longest] of a prompt behind its last visual token and of its answer, where each ends)."""
        prompt, target = self._prompt(text, 1, kind, hw), self._answer(answer)
        rest = np.asarray(prompt.tokens[_cut(prompt) :])
        if len(rest) > most or len(target) > longest:
            raise ValueError(
                f"question of {len(rest)} tokens (limit {most}), answer of {len(target)} (limit {longest}): {text!r}"
            )
        n = len(rest) + len(target)
        tokens_r = np.zeros(most + longest, np.int32)
        tokens_r[:n] = np.concatenate([rest, target])
        return tokens_r, len(rest), n

    def queries(self, problems, length: int):
        """Question tokens for the retriever: int32 [B, length] and their mask."""
        tokens_bl, mask_bl = np.zeros((len(problems), length), np.int32), np.zeros((len(problems), length), bool)
        for i, problem in enumerate(problems):
            ids = self._text(problem)[:length]
            tokens_bl[i, : len(ids)] = ids
            mask_bl[i, : len(ids)] = True
        return tokens_bl, mask_bl


def _cut(prompt) -> int:
    """Where a prompt's text goes on behind its last visual token."""
    return int(np.flatnonzero(prompt.vis_index >= 0)[-1]) + 1


@dataclasses.dataclass(frozen=True)
class Asked:
    """Questions about B videos, G each.

    Attributes:
      videos: where they lie in the bank of the run, or in `bank`.
      questions_bg: problem, problem_type, options, solution, target (what SFT learns to say) and `needed`, the events
        it is about, of each.
      ids_b: int [B], a stable id of each video's first question.
      sizes: what the batch is padded to.
      style: of `question_text`.
      shapes: of each video, where they differ.
      bank: the videos' own patches [B, T, n, C], where the run holds none.
      query_bd: embeddings of the questions where they are known.
      real_b: bool [B], False for those that only fill a packed row up; None: all are real.
    """

    videos: Videos
    questions_bg: list[list[ask.Question]]
    ids_b: np.ndarray
    sizes: Sizes
    style: str = STYLE
    shapes: tuple[Shape, ...] | None = None
    bank: np.ndarray | None = None
    query_bd: np.ndarray | None = None
    real_b: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: list["Asked"]) -> "Asked":
        """Those of several draws, one after the other, of one shape and from one bank."""
        spans = [np.concatenate(x) for x in zip(*(p.videos.arrays() for p in parts), strict=True)]
        asked = [row for part in parts for row in part.questions_bg]
        return dataclasses.replace(
            parts[0], videos=Videos(*spans), questions_bg=asked, ids_b=np.concatenate([p.ids_b for p in parts])
        )  # fmt: skip

    def take(self, rows_b: np.ndarray) -> "Asked":
        """These videos with their questions."""
        asked = [self.questions_bg[i] for i in rows_b.tolist()]
        return dataclasses.replace(
            self, videos=self.videos.take(rows_b), questions_bg=asked, ids_b=self.ids_b[rows_b]
        )  # fmt: skip

    def index(self) -> VideoIndex:
        index = self.videos.index(self.sizes)
        if self.shapes is None:
            return index
        tokens_b = np.array([np.prod(shape.hw) for shape in self.shapes], np.int32)
        wide_b = np.array([shape.hw[1] for shape in self.shapes], np.int32)
        rate_b = np.array([shape.rate for shape in self.shapes], np.float32)
        return dataclasses.replace(index, shapes=Shapes(tokens_b, wide_b, rate_b))

    @property
    def image_b(self) -> np.ndarray:
        """bool [B]."""
        return np.array([shape.kind == "image" for shape in self.shapes or ()] or np.zeros(len(self.ids_b)), bool)

    @property
    def texts_bg(self):
        text = lambda q: question_text(q.problem, q.problem_type, q.options, self.style)  # noqa: E731
        return [[text(q) for q in row] for row in self.questions_bg]

    def told_bg(self, view, kept: int, tokens_per_patch: int):
        """`texts_bg` as a reader through this view gets them: told its budget where the view has words for it."""
        said = view.told(kept, tokens_per_patch)
        return [[said + text for text in row] for row in self.texts_bg]

    @property
    def answers_bg(self):
        return [[q.target for q in row] for row in self.questions_bg]

    @property
    def problems_bg(self):
        return [[q.problem for q in row] for row in self.questions_bg]

    @property
    def problems(self):
        return [problem for row in self.problems_bg for problem in row]

    def needed(self, events: int) -> np.ndarray:
        """bool [B*G, E]."""
        out = np.zeros((len(self.problems), events), bool)
        for i, q in enumerate(q for row in self.questions_bg for q in row):
            out[i, list(q.needed)] = True
        return out


class Recomposer:
    """Training videos out of a pool of decoded events, and questions about them."""

    def __init__(
        self, pool: recompose.Pool, row_e: np.ndarray, sizes: Sizes, seed: int, files: dict[str, int] | None = None
    ):
        """`row_e`: where each event lies in the run's bank; `files`: {video: its first row}."""
        self.pool, self.row_e, self.sizes, self.seed, self.rows = pool, row_e, sizes, seed, files or {}
        self.embed(np.zeros((len(row_e), 1), np.float32))

    def embed(self, emb_ed: np.ndarray) -> None:
        """Takes the embeddings of the pool's events."""
        self.emb_ed, self._pools = emb_ed, {}

    def draw(self, stage: str, step: int, videos: int, per_video: int, events: tuple[int, int], types) -> Asked:
        """The videos and questions of one step; the same for the same (seed, stage, step)."""
        rng = np.random.default_rng([self.seed, zlib.crc32(stage.encode()), step])
        ids_be = recompose.recompose(rng, self.pool, tuple(events), videos)
        most = min(int(events[1]), self.sizes.events)
        sizes = dataclasses.replace(self.sizes, patches=most * self.sizes.event, events=most)
        pad = self.sizes.events - ids_be.shape[1]
        ids_be = np.pad(ids_be, ((0, 0), (0, pad)), constant_values=-1)
        mask_be = ids_be >= 0
        safe_be = np.maximum(ids_be, 0)
        len_be = np.where(mask_be, self.pool.patches_e[safe_be], 0)
        start_be = np.cumsum(len_be, axis=1) - len_be
        spans = Videos(self.row_e[safe_be], start_be, len_be, mask_be, self.emb_ed[safe_be])
        types = [t for t in types if ask.events_needed(t) <= events[0]]
        asked = []
        for row in ids_be.tolist():
            scenes = [self.pool.events[i] for i in row if i >= 0]
            chosen = rng.permutation(len(types))[np.arange(per_video) % len(types)].tolist()
            asked.append([ask.make_question(rng, scenes, types[c]) for c in chosen])
        return Asked(spans, asked, np.arange(videos) + step * videos, sizes)

    def again(self, stage: str, step: int, records: int, videos: int, per_video: int, events, types) -> Asked:
        """The same out of `records` videos with their questions, shuffled anew each time that all have been seen."""
        key = records, per_video, tuple(events), tuple(types)
        if key not in self._pools:
            self._pools[key] = self._records(*key)
        epoch, batch = divmod(step, records // videos)
        rng = np.random.default_rng([self.seed, zlib.crc32(stage.encode()), 1, epoch])
        return self._pools[key].take(rng.permutation(records)[batch * videos : (batch + 1) * videos])

    def _records(self, records: int, per_video: int, events, types) -> Asked:
        """Drawn in blocks, so that a smaller number of records is the beginning of a larger one."""
        blocks = range(-(-records // BLOCK))
        drawn = [self.draw("records", block, BLOCK, per_video, events, types) for block in blocks]
        return Asked.joined(drawn).take(np.arange(records))

    def files(self, asked: Asked) -> list[list[str]]:
        """The training videos that each video's events come from."""
        names, starts = list(self.rows), list(self.rows.values())
        first = lambda rows: np.searchsorted(starts, rows, side="right") - 1  # noqa: E731
        videos = zip(asked.videos.row_be, asked.videos.mask_be, strict=True)
        return [[names[i] for i in first(rows[mask])] for rows, mask in videos]
