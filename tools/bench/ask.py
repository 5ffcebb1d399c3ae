"""Index once, ask many: seconds from a question to its first token, without and with a memory of the video.

    python -m tools.bench.ask --checkpoint=runs/quickstart --video=FILE [--frames=64] [--repeat=9]

Cold decodes the file, finds its events, runs the vision tower over every patch, then asks. Warm reads the tokens from a
memory on disk; its questions differ from the one before. Everything is compiled beforehand, in both; medians.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

import jax

from marc_jax.archive import Archive

QUESTIONS = ("how many in blue stripes ?", "colours in blue stripes and grey checks ?", "how many in red checks ?")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--video", required=True)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--frames", type=int, default=64, help="most frames of the video, in place of the run's")
    args = parser.parse_args(argv)

    def opened(*where) -> Archive:
        archive = Archive(*where)
        archive.here.sampling = dataclasses.replace(archive.here.sampling, max_frames=args.frames)
        return archive

    def asked(archive: Archive) -> list:
        for question in QUESTIONS:
            archive.ask(question, args.video)
        return [archive.ask(QUESTIONS[i % len(QUESTIONS)], args.video) for i in range(args.repeat)]

    with tempfile.TemporaryDirectory() as memory:
        opened(memory, args.checkpoint).index([args.video])
        begun = time.perf_counter()
        cold = asked(opened(None, args.checkpoint))
        cold_s = time.perf_counter() - begun
        warm = asked(opened(memory))
    if [a.text for a in cold] != [a.text for a in warm]:
        raise SystemExit("the answers differ")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"jax {jax.__version__}, {device}; {args.video}, {len(next(iter(warm[0].entries.values())).tokens)} temporal "
          f"patches; medians of {args.repeat} ({cold_s:.0f} s)")  # fmt: skip
    parts = list(dict.fromkeys(part for a in (cold[-1], warm[-1]) for part in a.seconds))
    middle = lambda answers, of: 1000 * statistics.median(map(of, answers))  # noqa: E731
    print("| ms | cold | warm |\n|---|--:|--:|")
    for part in parts:
        row = [middle(a, lambda x: x.seconds[part]) if part in a[0].seconds else None for a in (cold, warm)]  # noqa: B023
        print(f"| {part} | " + " | ".join("" if x is None else f"{x:.2f}" for x in row) + " |")
    first = [middle(answers, lambda a: a.first_token) for answers in (cold, warm)]
    print(f"| **first token** | {first[0]:.2f} | {first[1]:.2f} |\nwarm / cold: {first[1] / first[0]:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
