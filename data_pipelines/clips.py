"""Clips of videos and their texts, video by video: what a step of contrastive training reads."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from data_pipelines import video
from data_pipelines.patches import squash
from data_pipelines.sources import Pair, media_path


@dataclasses.dataclass(frozen=True)
class VideoPairs:
    """Some pairs of one video; `row` is the first one's in the file of pairs."""

    path: str
    pairs: tuple[Pair, ...]

    @property
    def row(self) -> int:
        return self.pairs[0].row


def by_video(pairs: list[Pair], most: int) -> list[VideoPairs]:
    """The pairs of each video in lists of at most `most`, videos and pairs in the order of the file."""
    videos: dict[str, list[Pair]] = {}
    for pair in pairs:
        videos.setdefault(os.path.normpath(pair.path), []).append(pair)
    return [
        VideoPairs(group[0].path, tuple(group[i : i + most]))
        for group in videos.values()
        for i in range(0, len(group), most)
    ]


@dataclasses.dataclass(frozen=True)
class ReadClips:
    """VideoPairs -> uint8 [most, frames, size, size, 3]: `frames` spread over each clip, squashed; zeros beyond.

    A clip of fewer frames repeats some. `read`: called in place of `video.read_frames`. Raises VideoError, ValueError:
    the file, or what is wrong with its path.
    """

    root: str
    most: int
    frames: int
    size: int
    read: Callable = video.read_frames

    def __call__(self, group: VideoPairs) -> np.ndarray:
        path = media_path(self.root, group.path)
        out = np.zeros((self.most, self.frames, self.size, self.size, 3), np.uint8)
        for clip, pair in zip(out, group.pairs, strict=False):
            read = self.read(path, num_frames=self.frames, start=pair.start, end=pair.end)
            clip[...] = squash(read.frames[: self.frames], self.size)
        return out


def apart(groups: list[VideoPairs], most: int) -> np.ndarray:
    """bool [N, N], N = len(groups) * most: whether the clip of one pair may be a negative of another's text.

    Not where the texts are the same, nor where the clips are of one video and overlap.
    """
    texts, paths = np.full(len(groups) * most, -1), np.full(len(groups) * most, -1)
    spans = np.zeros((len(groups) * most, 2))
    known: dict[str, int] = {}
    for i, group in enumerate(groups):
        for j, pair in enumerate(group.pairs, i * most):
            texts[j] = known.setdefault(f"text {' '.join(pair.text.lower().split())}", len(known))
            paths[j] = known.setdefault(f"path {os.path.normpath(pair.path)}", len(known))
            spans[j] = pair.start or 0, np.inf if pair.end is None else pair.end
    begin_n, end_n = spans.T
    overlap_nn = (begin_n[:, None] < end_n[None]) & (begin_n[None] < end_n[:, None])
    return (texts[:, None] != texts[None]) & ~((paths[:, None] == paths[None]) & overlap_nn)
