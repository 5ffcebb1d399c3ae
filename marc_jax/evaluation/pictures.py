"""One picture per question: the film strip, its events, which were retrieved, what was merged into what, who was right.

Read downwards: the question; the video as a film strip over its events; ribbons from every patch into the kept patch it
was merged into, as wide as its weight; the answers.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from marc_jax.evaluation.canvas import INK, MARGIN, MUTED, PALE, RULE, WIDTH, Page

RIGHT, WRONG = "#0072b2", "#c2410c"
EVENTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7b5ea7", "#8a7a2f")
MAX_ANSWER_LINES, MAX_QUESTION_LINES = 3, 6


@dataclasses.dataclass(frozen=True)
class Sample:
    """What MARC did with one question.

    Attributes:
      frames: uint8 [T, H, W, 3], RGB.
      seconds: [T] time of every frame.
      event_spans: (start, end) of every event in temporal patches of 2 frames, end excluded, in time order;
        patches between two are a transition and belong to none.
      question, options: as asked; options may be empty.
      answers: {arm: (text, correct)}; correct is None when nobody knows.
      truth: the true answer, or None.
      needed_events: which events the question is about (indices into event_spans); empty when unknown.
      retrieved_events: {event index: similarity}; None as similarity is allowed.
      merge_weights: float [K, S]; what each of the S selected patches counts in each kept one; None: nothing merged.
      merge_patches: [S] index of the selected patches in the whole video; None: the first S.
      title: a line over the question (file name, question type).
    """

    frames: np.ndarray
    seconds: Sequence[float]
    event_spans: Sequence[tuple[int, int]]
    question: str
    options: Sequence[str] = ()
    answers: Mapping[str, tuple[str, bool | None]] = dataclasses.field(default_factory=dict)
    truth: str | None = None
    needed_events: Sequence[int] = ()
    retrieved_events: Mapping[int, float | None] = dataclasses.field(default_factory=dict)
    merge_weights: np.ndarray | None = None
    merge_patches: Sequence[int] | None = None
    title: str = ""

    def __post_init__(self):
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or not len(self.frames):
            raise ValueError(f"frames must be [T, H, W, 3] with T > 0, got {self.frames.shape}")
        if len(self.seconds) != len(self.frames):
            raise ValueError(f"{len(self.seconds)} times for {len(self.frames)} frames")
        unknown = [e for e in (*self.retrieved_events, *self.needed_events) if not 0 <= e < len(self.event_spans)]
        if unknown:
            raise ValueError(f"event {unknown[0]} is not one of the {len(self.event_spans)} events")
        if self.merge_weights is None or not np.size(self.merge_weights):
            return
        width = np.shape(self.merge_weights)[-1]
        chosen = range(width) if self.merge_patches is None else self.merge_patches
        if np.ndim(self.merge_weights) != 2 or len(chosen) != width:
            raise ValueError(f"merge_weights {np.shape(self.merge_weights)} do not fit {len(chosen)} patches")
        outside = [p for p, used in zip(chosen, np.any(np.asarray(self.merge_weights) > 0, axis=0), strict=True)
                   if used and not 0 <= p < self.patches]  # fmt: skip
        if outside:
            raise ValueError(f"patch {outside[0]} is not one of the {self.patches} patches of the video")

    @property
    def patches(self) -> int:
        """Temporal patches of the video, two frames each."""
        return (len(self.frames) + 1) // 2


def draw_sample(path: str | os.PathLike, frames: np.ndarray, seconds: Sequence[float],
                event_spans: Sequence[tuple[int, int]], *, question: str, **rest) -> tuple[int, int]:  # fmt: skip
    """Draws one `Sample` (its fields are the arguments) into a PNG, all of it or nothing: (width, height) in pixels.

    Raises:
      ValueError: arguments that do not belong together (see `Sample`).
    """
    sample = Sample(np.asarray(frames), seconds, event_spans, question, **rest)
    return draw(path, sample)


def draw(path: str | os.PathLike, sample: Sample, dpi: int = 132) -> tuple[int, int]:
    """Like `draw_sample`, for a sample that is already one."""
    page = Page()
    y = _question(page, sample, MARGIN)
    y = _film(page, sample, y + 16)
    if sample.merge_weights is not None and np.size(sample.merge_weights):
        y = _merge(page, sample, y)
    y = _answers(page, sample, y + 14)
    return page.save(path, y + MARGIN, dpi)


def _question(page: Page, sample: Sample, y: float) -> float:
    if sample.title:
        y = page.paragraph(MARGIN, y, page.lines(sample.title, 14, WIDTH - 2 * MARGIN, 1), 14, color=MUTED) + 4
    lines = page.lines(sample.question, 23, WIDTH - 2 * MARGIN, MAX_QUESTION_LINES, "bold")
    y = page.paragraph(MARGIN, y, lines, 23, weight="bold") + 4
    if sample.options:
        text = "\u2003\u2003 ".join(str(option) for option in sample.options)
        y = page.paragraph(MARGIN, y, page.lines(text, 16, WIDTH - 2 * MARGIN, 5), 16, color=INK)
    return y


def _colours(sample: Sample) -> dict[int, str]:
    """Events that are used take the colours in turn, in time order; those left out by retrieval stay grey."""
    used = sorted(sample.retrieved_events) or range(len(sample.event_spans))
    return {event: EVENTS[i % len(EVENTS)] for i, event in enumerate(used)}


def _event_of(sample: Sample, patch: int) -> int | None:
    return next((e for e, (start, end) in enumerate(sample.event_spans) if start <= patch < end), None)


def _heading(page: Page, y: float, text: str) -> float:
    page.box(MARGIN, y, WIDTH - 2 * MARGIN, 1.2, RULE)
    return page.paragraph(MARGIN, y + 10, page.lines(text, 13.5, WIDTH - 2 * MARGIN, 2), 13.5, color=MUTED) + 6


def _film(page: Page, sample: Sample, y: float) -> float:
    """Film strip and the events under it: the bottom of the event bar."""
    notes = [f"{_many(len(sample.event_spans), 'event')} in {_many(sample.patches, 'temporal patch')} of two frames"]
    if sample.retrieved_events:
        notes.append(f"in colour: retrieved ({len(sample.retrieved_events)}), with the similarity to the question")
    if sample.needed_events:
        notes.append("★ the question is about it")
    y = _heading(page, y, "The video: " + "   ·   ".join(notes))
    inner, total = WIDTH - 2 * MARGIN, sample.patches
    height, width = sample.frames.shape[1:3]
    shown = max(1, min(total, int(inner // (84 if width < 1.3 * height else 124))))
    cell = inner / shown
    tall = min(cell * height / width, 190.0)
    wide = tall * width / height
    colours = _colours(sample)
    for i in range(shown):
        patch = min(total - 1, int((i + 0.5) * total / shown))
        left = MARGIN + i * cell + (cell - wide) / 2
        chosen = _event_of(sample, patch) in colours or not sample.retrieved_events
        page.image(left + 1.5, y, wide - 3, tall, sample.frames[2 * patch], 1.0 if chosen else 0.4)
        seconds = float(sample.seconds[2 * patch])
        page.text(left + wide / 2, y + tall + 4, f"{seconds:.1f} s", 11.5, color=MUTED, ha="center")
    return _event_bar(page, sample, y + tall + 26, colours)


def _event_bar(page: Page, sample: Sample, y: float, colours: Mapping[int, str]) -> float:
    """One block per event: its number, its similarity when retrieved, a star when the question is about it."""
    unit, tall = (WIDTH - 2 * MARGIN) / sample.patches, 48.0
    for event, (start, end) in enumerate(sample.event_spans):
        left, wide = MARGIN + start * unit + 1.5, (end - start) * unit - 3
        chosen, star = event in colours, "★ " if event in sample.needed_events else ""
        page.box(left, y, wide, tall, colours.get(event, PALE))
        names = (f"{star}event {event + 1}", f"{star}{event + 1}", f"{event + 1}")
        score = sample.retrieved_events.get(event)
        details = () if score is None else (f"similarity {score:.2f}", f"{score:.2f}")
        if sample.retrieved_events and not chosen:
            details = ("not used",)
        ink = _ink(colours[event]) if chosen else MUTED
        name, detail = _fitting(page, names, 15.5, wide, "bold"), _fitting(page, details, 12.5, wide)
        page.text(left + wide / 2, y + (7 if detail else 15), name, 15.5, color=ink, ha="center", weight="bold")
        page.text(left + wide / 2, y + 28, detail, 12.5, color=ink, ha="center")
    return y + tall


def _fitting(page: Page, texts: Sequence[str], size: float, width: float, weight: str = "normal") -> str:
    """The first text that fits into the width, or nothing."""
    return next((text for text in texts if page.width(text, size, weight) < width - 6), "")


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#111820" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def _many(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{count} {noun if count == 1 else plural}"


def _merge(page: Page, sample: Sample, y: float) -> float:
    """Ribbons from the patches of the video into the kept ones, and what every kept patch averages."""
    weights = np.asarray(sample.merge_weights, np.float64)
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    chosen = list(range(weights.shape[1])) if sample.merge_patches is None else [int(p) for p in sample.merge_patches]
    kept, colours = len(weights), _colours(sample)
    columns = min(kept, 8)
    rows = -(-kept // columns)
    gap, bar, deep = 18.0, 40.0, 78.0 if rows == 1 else 24.0  # ribbons over several rows would cross: none then
    wide = (WIDTH - 2 * MARGIN - gap * (columns - 1)) / columns
    height, width = sample.frames.shape[1:3]
    tall = min(130.0, (wide if columns > 3 else wide * 0.45) * height / width)
    block = bar + tall + (46 if columns > 3 else 30)
    unit = (WIDTH - 2 * MARGIN) / sample.patches
    for k in range(kept):
        left, top = MARGIN + (k % columns) * (wide + gap), y + deep + (k // columns) * block
        _kept_bar(page, sample, weights[k], chosen, (left, top, wide, bar), y if rows == 1 else None, unit, colours)
        note = _kept_thumb if columns > 3 else _kept_note
        note(page, sample, weights[k], chosen, (left, top + bar + 10, wide, tall), f"kept patch {k + 1} of {kept}")
    return y + deep + rows * block


def _kept_bar(page, sample, weights_s, chosen, place, ribbons_from, unit, colours) -> None:
    """One kept patch as a bar: a piece per source patch, as wide as its weight, and the ribbons that feed it."""
    left, top, wide, tall = place
    x = left
    for weight, patch in sorted(zip(weights_s, chosen, strict=True), key=lambda pair: pair[1]):
        piece = weight * wide
        if piece <= 0 or not 0 <= patch < sample.patches:
            continue
        colour = colours.get(_event_of(sample, patch), "#8793a0")
        if ribbons_from is not None:
            start = MARGIN + patch * unit
            page.ribbon((start + 1, start + unit - 1, ribbons_from + 3), (x, x + piece, top - 1), colour)
        page.box(x, top, piece, tall, colour, edgecolor="#ffffff", linewidth=0.8)
        ink = _ink(colour)
        text = _fitting(page, (f"{100 * weight:.0f} %", f"{100 * weight:.0f}"), 13.5, piece + 3, "bold")
        page.text(x + piece / 2, top + 5, text, 13.5, color=ink, ha="center", weight="bold")
        page.text(x + piece / 2, top + 22, _fitting(page, (f"patch {patch + 1}", str(patch + 1)), 11, piece), 11,
                  color=ink, ha="center")  # fmt: skip
        x += piece


def _kept_note(page, sample, weights_s, chosen, place, name: str) -> None:
    """Under the bar: the frames blended by the same weights, and in words what went in."""
    left, top, wide, tall = place
    parts = [(weight, patch) for weight, patch in zip(weights_s, chosen, strict=True) if weight > 0]
    if not parts:
        page.text(left, top, f"{name}: empty", 14, color=MUTED)
        return
    thumb = _blend(page, sample, parts, left, top, tall)
    first, last = min(patch for _, patch in parts), max(patch for _, patch in parts)
    starts = float(sample.seconds[2 * first])
    ends = float(sample.seconds[min(2 * last + 1, len(sample.seconds) - 1)])
    when = f"{starts:.1f} to {ends:.1f} s" if ends > starts else f"at {starts:.1f} s"
    share = max(weight for weight, _ in parts)
    words = [f"mean of {_many(len(parts), 'patch')}, {when}"]
    if share < 1:
        words.append(f"the heaviest counts {100 * share:.0f} %")
    x, room = left + thumb + 14, wide - thumb - 14
    y = page.paragraph(x, top, page.lines(name, 15, room, 2, "bold"), 15, weight="bold") + 2
    for sentence in words:
        y = page.paragraph(x, y, page.lines(sentence, 13, room, 3), 13, color=MUTED)
    if wide > 700:
        text = "picture: the frames blended by the same weights (the model blends their tokens)"
        page.text(x, y + 6, text, 13, color=MUTED)


def _kept_thumb(page, sample, weights_s, chosen, place, name: str) -> None:
    """The short note, for many kept patches side by side: a name over the blended frames."""
    left, top, wide, tall = place
    parts = [(weight, patch) for weight, patch in zip(weights_s, chosen, strict=True) if weight > 0]
    page.text(left, top - 4, _fitting(page, (name, name.removeprefix("kept patch ")), 13, wide + 6), 13, color=MUTED)
    if parts:
        _blend(page, sample, parts, left, top + 16, tall)


def _blend(page, sample, parts, left: float, top: float, tall: float) -> float:
    """Draws the weighted mean of the first frames of some patches; returns its width."""
    height, width = sample.frames.shape[1:3]
    blend = sum(weight * sample.frames[2 * patch].astype(np.float64) for weight, patch in parts)
    blend = np.clip(blend / sum(weight for weight, _ in parts), 0, 255).astype(np.uint8)
    page.image(left, top, tall * width / height, tall, blend)
    return tall * width / height


def _answers(page: Page, sample: Sample, y: float) -> float:
    """The truth, then a line per arm: right or wrong by sign and colour, the name, what it said."""
    if not sample.answers and sample.truth is None:
        return y
    y = _heading(page, y, "The answers" + ("" if sample.truth is None else f"   ·   true answer: {sample.truth}"))
    column = min(340.0, max([page.width(arm, 15.5, "bold") for arm in sample.answers], default=0) + 50)
    for arm, (text, correct) in sample.answers.items():
        sign, colour = {True: ("✓", RIGHT), False: ("✗", WRONG)}.get(correct, ("•", MUTED))
        page.text(MARGIN, y - 2, sign, 19, color=colour, weight="bold")
        name = page.lines(arm, 15.5, column - 40, 2, "bold")
        said = page.lines(text or "(nothing)", 15.5, WIDTH - 2 * MARGIN - column, MAX_ANSWER_LINES)
        low = page.paragraph(MARGIN + 26, y, name, 15.5, weight="bold")
        y = max(low, page.paragraph(MARGIN + column, y, said, 15.5, color=INK if correct is None else colour)) + 7
    return y
