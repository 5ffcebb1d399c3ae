"""New videos out of old events: which events of a pool to put side by side, for training without new files."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from data_pipelines.synthetic.scenes import COLOURS, HUES, SHAPES, TEXTURES, Event

_HUES, _COLOURS = tuple(HUES), tuple(COLOURS)
BACKGROUNDS = len(_HUES) * len(TEXTURES)
CONTENTS = len(_COLOURS) * len(SHAPES)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Events to draw from, with what must not repeat inside a video as arrays.

    Attributes:
      events: the N events; event id = position here.
      background_e: int64 [N], hue and texture as one number below BACKGROUNDS.
      content_e: int64 [N], colour and shape as one number below CONTENTS.
      patches_e: int64 [N], length in temporal patches.
    """

    events: tuple[Event, ...]
    background_e: np.ndarray
    content_e: np.ndarray
    patches_e: np.ndarray

    def take(self, ids) -> list[Event]:
        """The events of one row of `recompose`."""
        return [self.events[i] for i in ids if i >= 0]

    @functools.cached_property
    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """The backgrounds and the contents that occur."""
        return np.unique(self.background_e), np.unique(self.content_e)

    @functools.cached_property
    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids sorted by cell, first position of each cell, events in each cell); cell = background x content."""
        cell_e = self.background_e * CONTENTS + self.content_e
        held = np.bincount(cell_e, minlength=BACKGROUNDS * CONTENTS)
        return np.argsort(cell_e, kind="stable"), np.cumsum(held) - held, held


def make_pool(events) -> Pool:
    """A pool of the given events."""
    events = tuple(events)
    if not events:
        raise ValueError("an empty pool: no events to compose videos from")
    background = [_HUES.index(e.hue) * len(TEXTURES) + TEXTURES.index(e.texture) for e in events]
    content = [_COLOURS.index(e.colour) * len(SHAPES) + SHAPES.index(e.shape) for e in events]
    return Pool(events, np.array(background), np.array(content), np.array([e.patches for e in events]))


def pool_from_records(records: Iterable[Mapping]) -> tuple[Pool, list[tuple[str, int, int]]]:
    """A pool of all events of all videos in a split's records, and (path, start_patch, end_patch) of each of them.

    Videos with several questions count once; event ids follow the order of the records. A dissolving event comes
    without its blended first patch, which shows another scene too; one that has no clean patch is left out.
    """
    events, places, seen = [], [], set()
    for record in records:
        if record["video_id"] in seen:
            continue
        seen.add(record["video_id"])
        for fields in record["events"]:
            whole = Event.from_dict(fields)
            event = whole.undissolved()
            if event.patches < 1:
                continue
            events.append(event)
            places.append((record["path"], fields["start_patch"] + whole.dissolve, fields["end_patch"]))
    return make_pool(events), places


def recompose(rng: np.random.Generator, pool: Pool, n_events, batch: int = 64) -> np.ndarray:
    """Event ids of `batch` new videos, int64 [batch, most events], -1 after the last event of a shorter video.

    No background and no (colour, shape) pair repeats inside a video. `n_events` is a number, a (low, high) range with
    both ends included, or an array [batch]. Pairs of a background and a content are drawn uniformly over those the
    pool holds, then an event of that pair. Raises ValueError when the pool is too poor for so many events.
    """
    if isinstance(n_events, tuple):
        n_b = n_events[0] + (rng.random(batch) * (n_events[1] - n_events[0] + 1)).astype(np.int64)
    else:
        n_b = np.broadcast_to(np.asarray(n_events, np.int64), (batch,))
    width = int(n_b.max())
    order, first, held = pool.cells
    backgrounds, contents = pool.kinds
    possible = min(len(backgrounds), len(contents))
    if width > possible or n_b.min() < 1:
        raise ValueError(f"videos of {n_b.min()} to {width} events from a pool that allows 1 to {possible}")
    ids = np.full((batch, width), -1, np.int64)
    todo = np.arange(batch)
    for _ in range(20):
        # n different backgrounds meet n different contents in a random matching; a pair the pool lacks is drawn again
        background = backgrounds[np.argsort(rng.random((len(todo), len(backgrounds))), axis=1)[:, :width]]
        content = contents[np.argsort(rng.random((len(todo), len(contents))), axis=1)[:, :width]]
        cell = background * CONTENTS + content
        used = np.arange(width) < n_b[todo, None]
        good = ((held[cell] > 0) | ~used).all(1)
        slot = first[cell] + (rng.random(cell.shape) * held[cell]).astype(np.int64)
        drawn = order[np.minimum(slot, len(order) - 1)]
        ids[todo[good]] = np.where(used, drawn, -1)[good]
        todo = todo[~good]
        if not len(todo):
            return ids
    for row in todo.tolist():
        ids[row, : n_b[row]] = _one_by_one(rng, pool, int(n_b[row]))
    return ids


def _one_by_one(rng: np.random.Generator, pool: Pool, n: int, tries: int = 100) -> list[int]:
    """The same for one video and a thin pool: events in random order, each taken if it still fits."""
    for _ in range(tries):
        chosen, backgrounds, contents = [], set(), set()
        for i in np.argsort(rng.random(len(pool.events))).tolist():
            background, content = int(pool.background_e[i]), int(pool.content_e[i])
            if background in backgrounds or content in contents:
                continue
            chosen.append(i)
            backgrounds.add(background)
            contents.add(content)
            if len(chosen) == n:
                return chosen
    raise ValueError(f"found no {n} events without a repeated background or content in a pool of {len(pool.events)}")
