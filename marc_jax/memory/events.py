"""Events without weights: where a video changes, from colour and structure, one frame at a time.

Every frame becomes a small descriptor: mean colours of a 16 x 16 grid, colour histograms of four quarters, edge
energy in two directions. The difference of two frames is

    S = A + 2 B + 2 C
    A = mean over cells of min(|colour change|, 32) / 32   (saturates: a small bright object cannot look like a cut)
    B = mean histogram distance, C = change of edge energy (both blind to motion inside the frame)

Four kinds of border are found. A cut is a single difference that stands out from all others within a tenth of a second
and from the recent level, and that lasts (a flash does not). A dissolve is a run of similar differences whose frames
are mixtures of the run's two ends (a pan or a fast motion is not a mixture). A fade passes through a blank frame. A
long take that has drifted away from its own beginning is split at its change point: where two means, one before and
one after, explain the last seconds best. The level is a low quantile of recent differences, so it follows the camera's
unrest and is not raised by the borders themselves.

A border knows which frames around it show both scenes of a dissolve, or the blank of a fade. An event's span leaves out
the temporal patches that hold one of them: merged into the event, or into its embedding, they would bring in another
scene. They lie between the events, and who looks at the whole video still sees them. An event none of whose patches is
clean keeps them all.

The segmenter is causal with a bounded delay; `segment` is its replay, so both give the same borders. It is the default
where no TransNetV2 weights are given. numpy and OpenCV only. docs/events.md has the measurements behind its choices.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from marc_jax.memory.quantile import quantile

GRID, SIDE, BINS = 16, 64, 8
FINGERPRINT = "events 3"  # raised whenever spans change: memories made before are then stale
DUPLICATE = 0.01  # S of a frame shown twice, or of a still scene: says nothing about the camera's unrest


@dataclasses.dataclass(frozen=True)
class Options:
    """Thresholds in units of S (0 to about 4); lengths in temporal patches of `frames_per_patch` frames.

    Attributes:
      cut: least S of a cut, in a quiet video.
      peak: a cut exceeds this many times the largest step within `near_seconds`, and `above` more.
      lasts: share of a cut's step that must still be there after `near_seconds`.
      blend: least S between the ends of a dissolve; twice that if it is shorter than `blend_seconds`.
      residual: largest part of a frame inside a dissolve that a mixture of its ends does not explain.
      blank: a frame all of whose cells are within this many levels of black or of white is blank.
      drift: S (without A) from the event's first second that splits a long take, at most once in `drift_seconds`.
      min_len, max_len: shortest and longest event; None: no longest.
    """

    cut: float = 0.5
    peak: float = 1.5
    above: float = 0.3
    lasts: float = 0.7
    near_seconds: float = 0.1
    blend: float = 0.85
    blend_seconds: float = 0.25
    residual: float = 0.05
    blank: float = 16.0
    drift: float = 0.7
    drift_seconds: float = 5.0
    min_len: int = 1
    max_len: int | None = None
    frames_per_patch: int = 2
    memory: int = 64
    longest_blend: int = 48

    def __post_init__(self):
        if self.min_len < 1 or (self.max_len is not None and self.max_len < self.min_len):
            raise ValueError(f"need 1 <= min_len <= max_len, got {self.min_len} and {self.max_len}")


class Border(NamedTuple):
    """Where an event begins, in frames.

    Attributes:
      frame: the first frame of the new event; in a dissolve, the first that is more new than old.
      begin, end: the frames begin..end - 1 show both scenes, or none; begin <= frame <= end, all equal in a cut.
    """

    frame: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Descriptor:
    cells: np.ndarray  # float32 [256, 3], levels
    histogram: np.ndarray  # float32 [4, 24], each channel's part sums to 1
    edges: np.ndarray  # float32 [2], 0..1

    @functools.cached_property
    def content(self) -> np.ndarray:
        """float32 [98]; L1 distances of it are S without A: blind to motion."""
        return np.concatenate([self.histogram.ravel() / 12, 2 * self.edges])

    @property
    def contrast(self) -> float:
        """Largest deviation of the cells over space, in levels; about 0 for a blank frame."""
        return float(self.cells.std(axis=0).max())


def describe(frame: np.ndarray) -> Descriptor:
    """Descriptor of one RGB frame, uint8 [H, W, 3]."""
    small = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    cells = cv2.resize(small.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    ycc = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float32)
    span = np.array([[0, 64, 64], [255, 192, 192]], np.float32)
    place = (np.clip(ycc, span[0], span[1]) - span[0]) / (span[1] - span[0]) * (BINS - 1)
    place = place.reshape(2, SIDE // 2, 2, SIDE // 2, 3).transpose(0, 2, 4, 1, 3).reshape(12, -1)  # quarter x channel
    low = np.minimum(place.astype(np.int32), BINS - 2)
    up = place - low
    index = low + BINS * np.arange(12)[:, None]
    total = np.bincount(index.ravel(), (1 - up).ravel(), 12 * BINS)
    total += np.bincount(index.ravel() + 1, up.ravel(), 12 * BINS)
    edges = [np.minimum(np.abs(np.diff(ycc[..., 0], axis=axis)), 32).mean() / 32 for axis in (0, 1)]
    histogram = (total.reshape(4, 3 * BINS) / (SIDE * SIDE / 4)).astype(np.float32)
    return Descriptor(cells, histogram, np.array(edges, np.float32))


def difference(a: Descriptor, b: Descriptor) -> float:
    """S between two frames."""
    moved = np.minimum(np.abs(a.cells - b.cells).mean(axis=1), 32).mean() / 32
    return float(moved + np.abs(a.content - b.content).sum())


class Segmenter:
    """Online segmentation: `push` one frame at a time; state and delay are bounded.

    Borders come in increasing order and are never taken back. They are reported with a delay: a cut after a tenth of a
    second, a dissolve after at most `longest_blend` frames, a fade when the blank has ended, the change point of a
    drifting take after at most `drift_seconds`. What the last moments of a stream would still have confirmed is not
    reported.
    """

    def __init__(self, fps: float, options: Options | None = None):
        self.options = options or Options()
        self.near = max(1, round(self.options.near_seconds * fps))
        self.drift_frames = max(1, round(self.options.drift_seconds * fps))
        self.second = max(1, round(fps))
        self.blend_frames = round(self.options.blend_seconds * fps)
        size = max(self.options.longest_blend, 2 * self.near) + 2
        self.now = -1  # index of the latest frame
        self.start = 0  # first frame of the open event
        # Differences, for the level; it starts from a belief, as a clip may begin with three short events.
        self.recent = collections.deque([0.15] * 8, maxlen=self.options.memory)
        self.frames = collections.deque(maxlen=size)  # latest descriptors
        self.steps = collections.deque(maxlen=size)  # difference of each to the one before it
        self.drifted = 0  # how many latest frames are far from the event's beginning
        self.last_drift = 0  # when a take was last found to have drifted
        self.blank_from = self.beginning = None  # the latter is the mean content of the event's first second
        self.rested = {}  # border of the latest drift: content where it came to rest
        # Content of the last `drift_seconds`, thinned to at most 128 frames: (index, content).
        self.stride = max(1, self.drift_frames // 64)
        self.past = collections.deque(maxlen=self.drift_frames // self.stride + 1)

    def push(self, frame: np.ndarray) -> list[Border]:
        """Takes the next frame, uint8 RGB [H, W, 3]; returns the borders it confirms."""
        return self.take(describe(frame))

    def take(self, seen: Descriptor) -> list[Border]:
        """`push` of the frame that was described."""
        step = difference(self.frames[-1], seen) if self.frames and self.frames[-1] is not seen else 0.0
        if step > DUPLICATE:
            self.recent.append(step)
        self.frames.append(seen)
        self.steps.append(step)
        self.now += 1
        if self.now % self.stride == 0:
            self.past.append((self.now, seen.content))
        level = quantile(self.recent, 0.3)
        candidates = (self._fade(seen), self._cut(level), self._dissolve(step), self._drift(seen))
        found = []
        # Two kinds may name one frame: the one that knows the longer transition counts.
        for border in sorted((c for c in candidates if c), key=lambda c: (c.frame, c.begin - c.end)):
            self._accept(border, found)
        longest = self.options.max_len and self.options.max_len * self.options.frames_per_patch
        if longest and self.now - self.start > longest + self.options.longest_blend:
            self._open(sharp(self.start + longest), found)
        return found

    def _accept(self, border: Border, found: list[Border]):
        patch = self.options.frames_per_patch
        longest = self.options.max_len and self.options.max_len * patch
        while longest and border.frame - self.start > longest:
            self._open(sharp(self.start + longest), found)
        if border.frame // patch - self.start // patch >= self.options.min_len:
            self._open(border, found)

    def _open(self, border: Border, found: list[Border]):
        found.append(border)
        self.start, self.drifted, self.beginning = border.frame, 0, self.rested.get(border.frame)

    def _fade(self, seen: Descriptor) -> Border | None:
        """The middle of a run of blank frames, once it has ended."""
        if seen.cells.max() < self.options.blank or seen.cells.min() > 255 - self.options.blank:
            self.blank_from = self.now if self.blank_from is None else self.blank_from
            return None
        begun, self.blank_from = self.blank_from, None
        return Border((begun + self.now) // 2, begun, self.now) if begun else None

    def _cut(self, level: float) -> Border | None:
        """The frame `near` frames ago, if its step towers over all within `near` frames and has lasted."""
        near = self.near
        if self.now < near + 1:
            return None
        steps = list(self.steps)[-2 * near - 1 :]
        at = len(steps) - 1 - near
        it, others = steps[at], max(steps[:at] + steps[at + 1 :])
        if it <= max(self.options.cut, 2 * level, self.options.peak * others + self.options.above):
            return None
        lasting = difference(self.frames[-near - 2], self.frames[-1]) >= self.options.lasts * it
        return sharp(self.now - near) if lasting else None

    def _dissolve(self, step: float) -> Border | None:
        """The first frame that is more new than old, when a run of similar steps has just ended as a mixture.

        The run ends where a step falls to 0.6 of the one before, and of the median of a run of more than three (coded
        video repeats a pattern of larger and smaller steps); it reaches back while steps are at least half of its last.
        """
        if len(self.steps) < 4 or step > 0.6 * self.steps[-2]:
            return None
        past = list(self.steps)[-2::-1]
        length = next((i for i, s in enumerate(past) if s < 0.5 * past[0]), len(past))
        if not 2 <= length <= len(self.frames) - 2 or self.now - 1 - length < self.start:
            return None  # a cut, or longer than we remember, or already divided
        if length > 3 and step > 0.6 * np.median(past[:length]):
            return None  # still going on
        frames = list(self.frames)[-length - 2 : -1]  # the two ends and what lies between
        a, b = frames[0], frames[-1]
        far = self.options.blend * (2 if length < self.blend_frames else 1)
        if difference(a, b) < far or min(a.contrast, b.contrast) < 4.0 or dimmed(a, b):
            return None  # too near, or one end is a blank frame or a faint copy of the other: a fade, for `_fade`
        share, residual = mixture(a, frames[1:-1], b)
        jumps = np.diff(np.concatenate([[0.0], share, [1.0]]))
        if residual > self.options.residual or jumps.max() > 0.8 or jumps.min() < -0.1:
            return None
        begin = self.now - length
        return Border(begin + int(np.argmax(np.append(share, 1.0) >= 0.5)), begin, self.now - 1)

    def _drift(self, seen: Descriptor) -> Border | None:
        """The change point of a take far from its beginning, once the change has come to rest (or after 2 s)."""
        if self.beginning is None and self.now - self.start >= self.second:
            self.beginning = self._mean_content(self.start, self.start + self.second)
        if self.now - max(self.start, self.last_drift) < self.drift_frames:
            return None
        far = np.abs(self.beginning - seen.content).sum() > self.options.drift
        self.drifted = self.drifted + 1 if far else 0
        lately = self._mean_content(self.now - self.second // 2, self.now)
        rests = np.abs(lately - seen.content).sum() < self.options.drift / 4
        if self.drifted < 3 or not (rests or self.drifted >= 2 * self.second):
            return None
        kept = [(i, content) for i, content in self.past if i >= self.start]
        border = kept[change_point(np.stack([content for _, content in kept]))][0]
        self.last_drift = self.now
        # Not the first second of the new event, which may still belong to the change.
        self.rested = {border: self._mean_content(max(border, self.now - self.second), self.now)}
        return sharp(border)

    def _mean_content(self, first: int, last: int) -> np.ndarray:
        """Mean content of the remembered frames first..last; of the one nearest to `first` if there is none."""
        near = [content for i, content in self.past if first <= i <= last]
        return np.mean(near or [min(self.past, key=lambda entry: abs(entry[0] - first))[1]], axis=0)


def sharp(frame: int) -> Border:
    """A border without a transition."""
    return Border(frame, frame, frame)


def change_point(content_nd: np.ndarray) -> int:
    """The split k, 1 <= k < n, of a sequence that leaves the least scatter around the means of [:k] and [k:]."""
    n = len(content_nd)
    left = np.cumsum(content_nd - content_nd.mean(axis=0), axis=0)[:-1]  # centred, so the right part sums to -left
    k = np.arange(1, n)
    return 1 + int(np.argmax(np.sum(left**2, axis=1) * (1 / k + 1 / (n - k))))


def dimmed(a: Descriptor, b: Descriptor) -> bool:
    """Whether one of two frames is the other at less than half its contrast, as on the way to a blank frame."""
    x, y = (f.cells - f.cells.mean(axis=0) for f in (a, b))
    like = np.sum(x * y) / (np.sqrt(np.sum(x**2) * np.sum(y**2)) + 1e-6)
    return bool(like > 0.8) and min(a.contrast, b.contrast) < 0.5 * max(a.contrast, b.contrast)


def mixture(a: Descriptor, between: list[Descriptor], b: Descriptor) -> tuple[np.ndarray, float]:
    """Fits x = a + s (b - a) to each frame between.

    Returns the shares s and the largest unexplained part |r|^2 / |b - a|^2, both over the three quarters of the cells
    that fit best: things that move during a dissolve do not count.
    """
    way = b.cells - a.cells
    gone = np.stack([f.cells for f in between]) - a.cells
    share = np.einsum("fcx,cx->f", gone, way) / (np.sum(way**2) + 1e-6)
    rest = np.sum((gone - share[:, None, None] * way) ** 2, axis=2)
    best = np.argsort(rest, axis=1, kind="stable")[:, : rest.shape[1] * 3 // 4]
    unexplained = np.take_along_axis(rest, best, axis=1).sum(axis=1)
    return share, float(np.max(unexplained / (np.sum(way**2, axis=1)[best].sum(axis=1) + 1e-6)))


def described(frames: Iterable[np.ndarray]) -> Iterator[Descriptor]:
    """Of every frame; of one that is shown again, as a key frame that stands for others, it is the same object."""
    last, seen = None, None
    for frame in frames:
        again = last is not None and (frame[0] == last[0]).all() and np.array_equal(frame, last)
        last, seen = frame, seen if again else describe(frame)
        yield seen


def replay(frames: np.ndarray, fps: float, options: Options | None = None, threads: int = 1) -> list[Border]:
    """What `Segmenter` says of a whole clip uint8 RGB [T, H, W, 3]; `threads` describe the frames."""
    segmenter = Segmenter(fps, options)
    if threads < 2:
        return [border for seen in described(frames) for border in segmenter.take(seen)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return [border for seen in pool.map(describe, frames) for border in segmenter.take(seen)]


def borders(frames: np.ndarray, fps: float, options: Options | None = None) -> list[int]:
    """First frame of each event but the first, of a whole clip uint8 RGB [T, H, W, 3]."""
    return [border.frame for border in replay(frames, fps, options)]


def segment(
    frames: np.ndarray, fps: float, options: Options | None = None, threads: int = 1
) -> list[tuple[int, int]]:
    """Event spans [start, end) in temporal patches, in time order, each at least one patch.

    Patches of a transition lie between two events and belong to neither, and so does a patch with a border inside.
    Where an event would be left with none, it has all from its own border to the next, a border inside a patch giving
    that patch to the new event. An odd last frame counts as a patch.

    Args:
      frames: uint8 RGB [T, H, W, 3], as sampled (not necessarily the file's own rate).
      fps: frames per second of `frames`.
      threads: that describe the frames; more than one where a single clip is waited for.
    """
    options = options or Options()
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, got {frames.dtype} {frames.shape}")
    return spans(replay(frames, fps, options, threads), len(frames), options)


def spans(found: list[Border], num_frames: int, options: Options) -> list[tuple[int, int]]:
    """Borders in frames -> spans in patches as in `segment`.

    A last event shorter than min_len joins the one before it; min_len counts an event's transitions too.
    """
    patch = options.frames_per_patch
    end = -(-num_frames // patch)
    starts = [0, *dict.fromkeys(b.frame // patch for b in found if 0 < b.frame // patch < end)]
    if len(starts) > 1 and end - starts[-1] < options.min_len:
        starts.pop()
    mixed = {p for b in found for p in range(b.begin // patch, -(-b.end // patch)) if b.frame // patch in starts}
    out = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        clean = [p for p in range(start, stop) if p not in mixed]
        start, stop = (clean[0], clean[-1] + 1) if clean else (start, stop)
        longest = options.max_len or stop - start
        out += [(s, min(s + longest, stop)) for s in range(start, stop, longest)]
    return out


def segment_features(feat_tnd: np.ndarray, options: Options | None = None, *, floor=0.1) -> list[tuple[int, int]]:
    """Event spans from features of temporal patches, [t, n, D] or [t, D] (the tower's, any encoder's).

    A border where 1 - mean_n cos of neighbouring patches exceeds `floor` and three times the 40 % quantile of the
    clip's, and is not below either neighbour. Not causal. min_len and max_len as in `Options`.
    """
    options = dataclasses.replace(options or Options(), frames_per_patch=1)
    feat = np.asarray(feat_tnd, np.float32).reshape(len(feat_tnd), -1, feat_tnd.shape[-1])
    feat = feat / np.maximum(np.linalg.norm(feat, axis=-1, keepdims=True), 1e-6)
    step = 1 - np.sum(feat[1:] * feat[:-1], axis=-1).mean(axis=1)
    if not len(step):
        return [(0, len(feat))]
    padded = np.pad(step, 1)
    high = (step > max(floor, 3 * float(np.quantile(step, 0.4)))) & (step >= padded[:-2]) & (step >= padded[2:])
    found = []
    for border in (np.flatnonzero(high) + 1).tolist():
        if border - (found[-1] if found else 0) >= options.min_len:
            found.append(border)
    return spans([sharp(border) for border in found], len(feat), options)


def score_borders(found, truth, tolerance: int) -> tuple[float, float]:
    """(precision, recall) of borders within +- tolerance frames, each true border matched once, nearest first."""
    pairs = sorted((abs(f - t), i, j) for i, f in enumerate(found) for j, t in enumerate(truth))
    used_f, used_t = set(), set()
    for distance, i, j in pairs:
        if distance <= tolerance and i not in used_f and j not in used_t:
            used_f.add(i)
            used_t.add(j)
    return (len(used_f) / len(found) if found else 1.0), (len(used_t) / len(truth) if truth else 1.0)
