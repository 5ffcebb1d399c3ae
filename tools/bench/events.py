"""Segmenters side by side on real files: what they find, what they cost.

    python -m tools.bench.events [--data=FOLDER] [--files=NAME,...]

Ours (`memory.events`, one frame at a time, causal) beside PySceneDetect's detectors (pip install scenedetect; left out
where it is absent) on every video of FOLDER/videos, and beside the simpler rules it was chosen from, each of those with
the one threshold that does best on these very files. Prints Markdown; docs/events.md keeps a run.

A true border is a range of frames (a cut: one frame) and is found by a border within 2 frames of it; each border found
counts for one true border. SCENES has them for files with cuts; every other file is a single take, where a border is
at most a change of content and more than one in 5 s is shattering.
"""

import argparse
import os
import pathlib
import time

import numpy as np

from data_pipelines.containers import DEFAULT_LIMITS, VideoError
from data_pipelines.decoders import open_reader
from marc_jax.memory import events

TOLERANCE, SECONDS = 2, 5.0
# bikes and fades: asserted by upstream's tests (shots/upstream_shots.json). The others were read off frame by frame
# for this table: nasa's first is a dissolve, demo's are the ends of a damaged stretch inside one take.
SCENES = {
    "bikes.mp4": [30, 76, 137, 187, 242],
    "fades.mp4": [42, 84, 126, 167, 209],
    "video1.mp4": [67, 167, 226, 287, 320, 426],
    "big_buck_bunny_0_30.webm": [283, 376, 551],
    "nasa_13013.mp4": [(126, 150), 202],
    "counter.mp4": [10, 20],
    "demo.mp4": [(229, 230), (267, 268)],
}
# A fade from black at the very start and a title that appears over a picture: right to report, right not to.
EITHER = {"big_buck_bunny_0_30.webm": [(0, 48), (494, 504), (598, 616)]}
LEAST_SECONDS = 2.0


def ranges(rows) -> list[tuple[int, int]]:
    return [row if isinstance(row, tuple) else (row, row) for row in rows]


def score(found: list[int], truth, either=()) -> tuple[int, int]:
    """(true borders found, false borders)."""

    def inside(border, row):
        return row[0] - TOLERANCE <= border <= row[1] + TOLERANCE

    left, false = ranges(truth), 0
    total = len(left)
    for border in found:
        match = next((row for row in left if inside(border, row)), None)
        if match is not None:
            left.remove(match)
        elif not any(inside(border, row) for row in ranges(either)):
            false += 1
    return total - len(left), false


# --- the simpler rules; each gives borders of a clip for a threshold ---


def adjacent(descriptors, threshold: float) -> list[int]:
    """Where the cosine of neighbouring thumbnails (about their grey) falls below 1 - threshold; local minima."""
    cells = np.stack([d.cells.ravel() for d in descriptors]) - 128
    unit = cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6)
    return peaks(1 - np.sum(unit[1:] * unit[:-1], axis=1), threshold)


def plain_difference(descriptors, threshold: float) -> list[int]:
    """Where S of neighbouring frames exceeds a threshold; local maxima."""
    pairs = zip(descriptors, descriptors[1:], strict=False)
    return peaks(np.array([events.difference(a, b) for a, b in pairs]), threshold)


def peaks(step, threshold: float) -> list[int]:
    padded = np.pad(step, 1)
    return (np.flatnonzero((step > threshold) & (step > padded[:-2]) & (step >= padded[2:])) + 1).tolist()


def kernel(descriptors, penalty: float) -> list[int]:
    """Kernel change points: the least scatter around segment means plus a penalty per segment, by dynamic programming.

    Linear kernel on thumbnails and content, so scatter comes from cumulative sums; O(T^2), not causal.
    """
    x = np.stack([np.concatenate([d.cells.ravel() / 255 / 16, d.content]) for d in descriptors]).astype(np.float64)
    sums = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x - x.mean(0), axis=0)])
    squares = np.concatenate([[0.0], np.cumsum(np.sum((x - x.mean(0)) ** 2, axis=1))])
    best, back = np.zeros(len(x) + 1), np.zeros(len(x) + 1, int)
    for end in range(1, len(x) + 1):
        start = np.arange(end)
        scatter = squares[end] - squares[start] - np.sum((sums[end] - sums[start]) ** 2, axis=1) / (end - start)
        total = best[start] + scatter + penalty
        back[end] = int(np.argmin(total))
        best[end] = total[back[end]]
    found, at = [], len(x)
    while back[at]:
        at = back[at]
        found.append(int(at))
    return found[::-1]


RULES = {
    "adjacent cosine < threshold": (adjacent, np.geomspace(0.005, 1.0, 24)),
    "S > threshold": (plain_difference, np.geomspace(0.2, 2.0, 24)),
    "kernel change point (DP)": (kernel, np.geomspace(0.03, 10.0, 16)),
}


# --- measuring ---


def ours(path):
    """(descriptors, rate [1/s], borders, ms per frame) with every frame at its full size."""
    with open_reader(path, "auto", DEFAULT_LIMITS, None) as reader:
        segmenter, found, descriptors, spent = events.Segmenter(reader.info.fps), [], [], 0.0
        for _, frame in reader.decode(np.arange(len(reader.times))):
            begun = time.perf_counter()
            found += [border.frame for border in segmenter.push(frame)]
            spent += time.perf_counter() - begun
            descriptors.append(segmenter.frames[-1])
        return descriptors, reader.info.fps, found, 1000 * spent / len(reader.times)


def scenedetect_borders(path) -> dict:
    """Detector -> (borders, seconds with decoding); empty without PySceneDetect, None where it cannot read the file."""
    try:
        import scenedetect
    except ImportError:
        return {}
    out = {}
    kinds = {"Content": ["ContentDetector"], "Adaptive": ["AdaptiveDetector"]}
    kinds["Content + Threshold"] = ["ContentDetector", "ThresholdDetector"]
    for name, detectors in kinds.items():
        begun = time.perf_counter()
        try:
            stream, manager = scenedetect.open_video(str(path)), scenedetect.SceneManager()
            for detector in detectors:
                manager.add_detector(getattr(scenedetect, detector)())
            manager.detect_scenes(stream)
            found = [scene[0].frame_num for scene in manager.get_scene_list()][1:]
        except Exception:  # its own and the decoder's, of many kinds
            found = None
        out[name] = (found, time.perf_counter() - begun)
    return out


def cell(name: str, found: list[int] | None) -> str:
    if found is None:
        return "cannot read"
    if name not in SCENES:
        return str(len(found))
    hits, false = score(found, SCENES[name], EITHER.get(name, ()))
    return f"{hits}/{len(SCENES[name])}" + (f" +{false}" if false else "")


def best(rule, thresholds, clips):
    """(F1 %, recall %, precision %, most borders per 5 s in a single take, threshold) of the best threshold."""
    rows = []
    for threshold in thresholds:
        hits = false = total = 0
        worst = 0.0
        for name, (descriptors, fps) in clips.items():
            found = rule(descriptors, threshold)
            if name in SCENES:
                h, f = score(found, SCENES[name], EITHER.get(name, ()))
                hits, false, total = hits + h, false + f, total + len(SCENES[name])
            elif len(descriptors) >= LEAST_SECONDS * fps:
                worst = max(worst, len(found) / max(1.0, len(descriptors) / fps / SECONDS))
        rows.append((*summary(hits, false, total), worst, threshold))
    return max(rows, key=lambda row: (row[0], -row[3]))


def summary(hits: int, false: int, total: int) -> tuple[float, float, float]:
    recall, precision = hits / max(1, total), hits / max(1, hits + false)
    return 200 * recall * precision / max(1e-9, recall + precision), 100 * recall, 100 * precision


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("MARC_JAX_TEST_DATA", "../shared/data")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(default), help="folder with videos/")
    parser.add_argument("--files", default="", help="only these, separated by commas")
    args = parser.parse_args(argv)
    wanted = set(args.files.split(",")) - {""}
    paths = [p for p in sorted((args.data / "videos").iterdir()) if p.suffix not in (".json", ".txt")]
    clips, found_by, unreadable, costs = {}, {}, [], []
    for path in paths:
        if wanted and path.name not in wanted:
            continue
        try:
            descriptors, fps, found, cost = ours(path)
        except VideoError as error:
            unreadable.append(f"- {str(error).replace(str(path), path.name)}")
            continue
        clips[path.name] = descriptors, fps
        others = scenedetect_borders(path)
        found_by[path.name] = {"marc_jax": found} | {name: borders for name, (borders, _) in others.items()}
        costs.append((path.name, len(descriptors), cost, {name: seconds for name, (_, seconds) in others.items()}))
    print_tables(clips, found_by, unreadable, costs)
    return 0


def print_tables(clips, found_by, unreadable, costs):
    names = list(next(iter(found_by.values())))
    print("| file | frames | s | true | " + " | ".join(names) + " | borders of marc_jax |")
    print("|---|--:|--:|--:|" + "--:|" * len(names) + "---|")
    for name, (descriptors, fps) in sorted(clips.items(), key=lambda row: (row[0] not in SCENES, row[0])):
        row = found_by[name]
        true = len(SCENES[name]) if name in SCENES else "one take"
        cells = " | ".join(cell(name, row[kind]) for kind in names)
        size = f"{len(descriptors)} | {len(descriptors) / fps:.1f}"
        print(f"| {name} | {size} | {true} | {cells} | {', '.join(map(str, row['marc_jax']))} |")
    print("\nNot readable:\n" + "\n".join(unreadable) if unreadable else "")
    print("\n| segmenter | F1 % | recall % | precision % | most borders per 5 s of one take |\n|---|--:|--:|--:|--:|")
    for kind in names:
        hits = false = total = 0
        worst = 0.0
        for name, (descriptors, fps) in clips.items():
            borders = found_by[name][kind] or []
            if name in SCENES:
                h, f = score(borders, SCENES[name], EITHER.get(name, ()))
                hits, false, total = hits + h, false + f, total + len(SCENES[name])
            elif len(descriptors) >= LEAST_SECONDS * fps:
                worst = max(worst, len(borders) / max(1.0, len(descriptors) / fps / SECONDS))
        f1, recall, precision = summary(hits, false, total)
        print(f"| {kind} | {f1:.1f} | {recall:.1f} | {precision:.1f} | {worst:.1f} |")
    for label, (rule, thresholds) in RULES.items():
        f1, recall, precision, worst, threshold = best(rule, thresholds, clips)
        print(f"| {label}, best: {threshold:.3g} | {f1:.1f} | {recall:.1f} | {precision:.1f} | {worst:.1f} |")
    frames = sum(n for _, n, _, _ in costs)
    print(f"\nmarc_jax: {sum(n * c for _, n, c, _ in costs) / frames:.2f} ms per frame of any size, without decoding.")
    for kind in names[1:]:
        total = 1000 * sum(seconds[kind] for *_, seconds in costs) / frames
        print(f"PySceneDetect {kind}: {total:.2f} ms per frame, with decoding.")


if __name__ == "__main__":
    raise SystemExit(main())
