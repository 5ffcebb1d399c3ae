"""Index once, ask many: seconds from a question to its first token, without and with a memory of the video.

    python -m tools.bench.ask --checkpoint=FOLDER --video=FILE [--encoder=FOLDER] [--frames=64] [--repeat=9]
    python -m tools.bench.ask --size=3b                      # random weights of the 3B's shapes and a made-up video

Cold decodes the file, finds its events, runs the vision tower over every patch, then asks. Opened reads the tokens from
a memory on disk, as the first question about a video does; warm is every later one, each another question than the one
before. Everything is compiled beforehand, in all three; medians. --size embeds events by a tiny random encoder, so its
cold figure leaves out what PE-Core would take.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time

import jax

from marc_jax.archive import Archive
from marc_jax.models import qwen25_vl
from tools.bench import published
from tools.bench.scenes import write_scenes

QUESTIONS = ("how many in blue stripes ?", "colours in blue stripes and grey checks ?", "how many in red checks ?")


def made_up(folder: pathlib.Path, size: str) -> dict[str, str]:
    """checkpoint, encoder and video, written there."""
    cfg = qwen25_vl.tiny() if size == "tiny" else qwen25_vl.qwen25_vl(size)
    published.write_model(folder / "model", cfg)
    published.write_encoder(folder / "encoder")
    write_scenes(folder / "video.mp4")
    return {"checkpoint": str(folder / "model"), "encoder": str(folder / "encoder"), "video": str(folder / "video.mp4")}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--encoder", default="")
    parser.add_argument("--video", default="")
    parser.add_argument("--size", choices=["tiny", *qwen25_vl.SIZES], help="random weights of this size instead")
    parser.add_argument("--view", default="", help="default as ask's")
    parser.add_argument("--max_new", type=int, help="tokens of an answer; default the run's, with --size 8")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--frames", type=int, default=64, help="most frames of the video, in place of the run's")
    args = parser.parse_args(argv)
    if bool(args.size) == bool(args.checkpoint and args.video):
        parser.error("give either --size, or --checkpoint and --video")
    with tempfile.TemporaryDirectory() as name:
        if args.size:
            vars(args).update(made_up(pathlib.Path(name), args.size), max_new=args.max_new or 8)
        measure(args, pathlib.Path(name) / "memory")
    return 0


def measure(args, memory: pathlib.Path) -> None:
    """Prints the table."""

    def opened(where) -> Archive:
        archive = Archive(where, args.checkpoint, encoder=args.encoder, view=args.view, max_new=args.max_new)
        archive.here.sampling = dataclasses.replace(archive.here.sampling, max_frames=args.frames)
        return archive

    warm_archive = opened(memory)
    warm_archive.index([args.video])

    def sharing(where) -> Archive:  # one set of weights
        archive = opened(where)
        archive.indexer, archive.answerer = warm_archive.indexer, warm_archive.answerer
        return archive

    def asked(archive_of) -> list:
        for question in QUESTIONS:
            archive_of().ask(question, args.video)
        return [archive_of().ask(QUESTIONS[i % len(QUESTIONS)], args.video) for i in range(args.repeat)]

    begun, cold_archive = time.perf_counter(), sharing(None)
    answers = {"cold": asked(lambda: cold_archive)}
    cold_s = time.perf_counter() - begun
    answers |= {"opened": asked(lambda: sharing(memory)), "warm": asked(lambda: warm_archive)}
    if len({tuple(a.text for a in each) for each in answers.values()}) > 1:
        raise SystemExit("the answers differ")
    device, patches = f"{jax.device_count()} x {jax.devices()[0].device_kind}", answers["warm"][0].entries.popitem()[1]
    print(f"jax {jax.__version__}, {device}; {args.video}, {len(patches.tokens)} temporal patches; medians of "
          f"{args.repeat} ({cold_s:.0f} s)")  # fmt: skip
    parts = list(dict.fromkeys(part for each in answers.values() for part in each[-1].seconds))
    middle = lambda each, of: 1000 * statistics.median(map(of, each))  # noqa: E731
    print(f"| ms | {' | '.join(answers)} |\n|---|{'--:|' * len(answers)}")
    for part in parts:
        row = [middle(e, lambda a: a.seconds[part]) if part in e[0].seconds else None for e in answers.values()]  # noqa: B023
        print(f"| {part} | " + " | ".join("" if x is None else f"{x:.2f}" for x in row) + " |")
    first = {name: middle(each, lambda a: a.first_token) for name, each in answers.items()}
    print(f"| **first token** | {' | '.join(f'{x:.2f}' for x in first.values())} |")
    print(", ".join(f"{name} / cold: {first[name] / first['cold']:.3f}" for name in ("opened", "warm")))


if __name__ == "__main__":
    raise SystemExit(main())
