"""How much of a batch is padding, questions in rows of their own against packed rows; nothing is computed.

    python -m tools.bench.packing NAME=FILE... --tokenizer=DIR [--config=EXPERIMENT.py] [--config.KEY=VALUE]
        [--rows=VIEW:MAX_LENGTH,...] [--max_segments=16]

NAME is a benchmark (`data_pipelines.benchmarks.read`), FILE its annotations. Questions and answers are tokenised, and
drawn as the experiment's SFT stage draws them. Of the videos, which are not read, only their size matters: NExT-QA's
rows say frames (taken for 30 per second) and width and height; elsewhere a video is `--seconds` of 640 x 360.
"""

import argparse
import csv
import pathlib
import types

import numpy as np

from data_pipelines import loader
from data_pipelines.benchmarks.read import read
from marc_jax import config as configs
from marc_jax import records, run, settings
from marc_jax.tokenizer import Tokenizer


class Media:
    """In place of a memory: entries of the right sizes, with features of width 1."""

    def __init__(self, sampling, sizes: dict[str, tuple[float, int, int]]):
        self._sampling, self._sizes = sampling, sizes

    def head(self, key: str):
        seconds, height, width = self._sizes[key]
        frames = int(np.clip(2 * round(seconds * self._sampling.fps / 2), 4, self._sampling.max_frames))
        grid = tuple(side // 14 for side in self._sampling.budget.size(height, width, frames))
        return types.SimpleNamespace(
            grid=grid, seconds=np.zeros(frames // 2), tokens=np.zeros((frames // 2, int(np.prod(grid)), 1), np.int8),
            event_spans=np.array([[0, frames // 2]]), event_embeddings=np.zeros((1, 1)), extra={"second_per_grid": 1.0},
        )  # fmt: skip

    __getitem__ = head


def sizes_of(name: str, file: str, rows, seconds: float) -> dict[str, tuple[float, int, int]]:
    """{path: (seconds, height, width)} of the rows' videos."""
    if name != "nextqa":
        return {row.path: (seconds, 360, 640) for row in rows}
    with open(file, encoding="utf-8", newline="") as lines:
        told = list(csv.DictReader(lines))
    of = lambda row: (int(row["frame_count"]) / 30, int(row["height"]), int(row["width"]))  # noqa: E731
    return {row.path: of(told[row.row]) for row in rows}


def unpacked(here: run.Run, source: records.Records, view, videos: int) -> int:
    """Places of the batches of one epoch."""
    order, places = loader.epoch_order(len(source.records), 0, 0), 0
    for start in range(0, len(order), videos):
        sizes = source.asked(order[start : start + videos].tolist()).sizes
        kept = view.kept(sizes.patches, here.sizes.event)
        row = sizes.lead + kept * here.prompter.tokens_per_patch + sizes.asked + sizes.answer
        places += len(order[start : start + videos]) * row
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--config", default="experiments/marc_qwen25vl_3b.py")
    parser.add_argument("--rows", default="marc:2048,marc:4096,full:8192", metavar="VIEW:MAX_LENGTH,...")
    parser.add_argument("--max_segments", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    args, overrides = parser.parse_known_args()
    config = settings.experiment(args.config, configs.split_argv(overrides)[1])
    here = run.surroundings(config, None, Tokenizer.load(pathlib.Path(args.tokenizer)))
    print("| file | view | questions | real tokens | one per row | `max_length` | packed | in a row | places |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, file in (given.split("=", 1) for given in args.files):
        rows = read(name, file, skip_bad=True).records
        media = Media(here.sampling, sizes_of(name, file, rows, args.seconds))
        source = records.Records(here, rows, media, None, "train")
        for view, most in (asked.split(":") for asked in args.rows.split(",")):
            own = unpacked(here, source, here.view(view), config.sft.videos)
            packs = source.packs("sft", {view: here.view(view)}, int(most), args.max_segments)
            count, places = len(packs.rows), len(packs.rows) * int(most)
            print(
                f"| {name} | {view} | {len(rows):,} | {packs.tokens:,} | {packs.tokens / own:.1%} | {most} | "
                f"{packs.tokens / places:.1%} | {len(rows) / count:.1f} | {own / places:.1f} times fewer |"
            )


if __name__ == "__main__":
    main()
