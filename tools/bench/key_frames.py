"""What a first look at key frames saves of reading a file, and how often it chooses otherwise than all sampled frames.

    OPENBLAS_NUM_THREADS=1 python -m tools.bench.key_frames VIDEO... [--within=11] [--made_up]

Per file, with 64 frames at 2 per second and 128 tokens per frame pair: CPU seconds of reading and resizing all sampled
frames, and of the first look (key frames, squashed for the encoder) and the chosen three events read in full. Events of
the look against those of the sampled frames: borders within a temporal patch of each other; and choices. A choice needs
an embedding, and here are no weights: a question is the descriptor of one sampled frame (`memory.events`), an event the
mean of its frames' descriptors; every second is asked about once. `found`: how often the patch asked about is among the
three events chosen; `alike`: shared patches over all patches chosen by either.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

from data_pipelines.decoders import open_reader
from data_pipelines.patches import TEMPORAL
from data_pipelines.video import VideoError, read_frames
from marc_jax.memory import events
from marc_jax.memory.indexer import KEY_EVENTS, KEYS_WITHIN, Published
from tools.bench.scenes import write_scenes

SAMPLING, CHOSEN, SIDE = Published(2.0, 64, 128, 128), 3, 224


def cpu(call: Callable) -> tuple[float, object]:
    """(CPU seconds, result)"""
    begun = time.process_time()
    result = call()
    return time.process_time() - begun, result


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def vectors(frames: np.ndarray) -> np.ndarray:
    """Unit vectors [T, D] of frames: colours of the cells and histograms, each about its mean over the frames."""
    seen = list(events.described(frames))
    parts = [np.stack([d.cells.ravel() for d in seen]), np.stack([d.content for d in seen])]
    return unit(np.concatenate([unit(part - part.mean(0)) for part in parts], axis=1))


def choose(emb_td: np.ndarray, spans: list, query_d: np.ndarray) -> set[int]:
    """Patches of the events nearest to the question."""
    event_ed = unit(np.stack([emb_td[TEMPORAL * a : TEMPORAL * b].mean(0) for a, b in spans]))
    best = np.argsort(-(event_ed @ query_d), kind="stable")[:CHOSEN]
    return {patch for event in best for patch in range(*spans[event])}


def compared(full: np.ndarray, looked: np.ndarray) -> dict:
    """Events and choices of all sampled frames, and of the key frames that stand for them."""
    spans, told = events.segment(full, SAMPLING.fps), events.segment(looked, SAMPLING.fps, KEY_EVENTS)
    precision, recall = events.score_borders([a for a, _ in told[1:]], [a for a, _ in spans[1:]], 1)
    emb, look = vectors(full), vectors(looked)
    asked = range(0, len(full), TEMPORAL)
    theirs = [choose(emb, spans, emb[i]) for i in asked]
    ours = [choose(look, told, emb[i]) for i in asked]
    return {
        "events": len(spans), "events, look": len(told), "borders found": recall, "borders true": precision,
        "found": np.mean([i // TEMPORAL in t for i, t in zip(asked, theirs, strict=True)]),
        "found, look": np.mean([i // TEMPORAL in o for i, o in zip(asked, ours, strict=True)]),
        "alike": np.mean([len(t & o) / len(t | o) for t, o in zip(theirs, ours, strict=True)]),
        "chosen": np.mean([len(o) for o in ours]) * TEMPORAL / len(full),
        "first": sorted(ours[0]), "spans": told,
    }  # fmt: skip


def measure(path, within: float) -> dict:
    """One file; `look` is None where its key frames are too sparse."""
    with open_reader(path) as reader:
        starts, times, info = reader.starts, reader.times, reader.info
    gaps = np.diff(np.append(times[starts], info.duration))
    out = {"seconds": info.duration, "size": f"{info.codec} {info.width}x{info.height}", "gap": gaps.mean(),
           "longest": gaps.max()}  # fmt: skip
    out["all"], _ = cpu(lambda: SAMPLING.read(path))
    full = SAMPLING.read_full(path).frames
    out["look"], clip = cpu(lambda: read_frames(path, max_frames=64, keys_within=within, keys_side=SIDE))
    if clip.shown is None:
        return out | {"look": ""}
    out |= compared(full, clip.frames)
    rows = [TEMPORAL * p + i for p in out.pop("first") for i in range(TEMPORAL)]
    out["rest"], _ = cpu(lambda: SAMPLING.read(path, lambda *args, **how: read_frames(*args, **how, rows=rows)))
    out["lower"] = 100 * (1 - (out["look"] + out["rest"]) / out["all"])
    out["keys"] = len(np.unique(clip.shown))
    return out


COLUMNS = ("seconds", "size", "gap", "longest", "keys", "all", "look", "rest", "lower", "chosen", "events",
           "events, look", "borders found", "borders true", "found", "found, look", "alike")  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*", type=pathlib.Path)
    parser.add_argument("--within", type=float, default=KEYS_WITHIN, help="seconds a key frame may stand for")
    parser.add_argument("--made_up", action="store_true", help="the made-up video too, and one of a key frame per 2 s")
    args = parser.parse_args(argv)
    print("| file | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as name:
        made = [("made-up", None), ("made-up, keyint 2 s", 48)] if args.made_up else []
        for title, keyint in made:
            write_scenes(pathlib.Path(name) / f"{title}.mp4", 720, 1280, keyint=keyint)
        for path in [*(pathlib.Path(name) / f"{title}.mp4" for title, _ in made), *args.videos]:
            try:
                row = measure(path, args.within)
            except VideoError as error:
                print(f"| {path.name} | {error.reason[:60]} |", flush=True)
                continue
            values = [row.get(column, "") for column in COLUMNS]
            cells = [value if isinstance(value, str) else f"{value:.3g}" for value in values]
            print(f"| {path.name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
