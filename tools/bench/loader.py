"""The loader beside decoding alone: batches of real videos from N workers, and N processes that only decode.

    OPENBLAS_NUM_THREADS=1 python -m tools.bench.loader [VIDEO...] [--workers=0,1,2,4] [--turns=3]

Both sides read the same files once, with one function: `--frames` frames of `--size` x `--size` pixels. Alone, every
process takes one batch after another and throws the frames away. The loader decodes in its workers, stacks, moves every
batch here and hands it out in order. Both begin with the quickest file many times over, so that the clock starts when
all processes run and have imported what they need, and nothing that takes time was decoded ahead. The two take turns;
medians, and from where to where the ratios went. Wall time is what a run waits for; CPU seconds, of this process and
its workers, are what other programs on the machine disturb less.
Without names: $MARC_JAX_TEST_DATA/videos.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import pathlib
import resource
import statistics
import time

import numpy as np

from data_pipelines import loader
from data_pipelines.video import VideoError, read_frames

LEAD = 8  # batches of the quickest file that each worker begins with; the first is off the clock


def load(path: str, frames: int, size: int) -> np.ndarray:
    """uint8 [frames, size, size, 3]."""
    return read_frames(path, num_frames=frames, resize=(size, size)).frames


def readable(paths, frames: int, size: int) -> list[str]:
    """The files that decode, the quickest first; the others are named."""
    good = {}
    for path in sorted(map(str, paths)):
        try:
            good[path] = clocked(lambda path=path: load(path, frames, size))[1]
        except (VideoError, OSError) as error:
            print(f"left out: {error}")
    quickest = sorted(good, key=good.get)[:1]
    return quickest + [path for path in good if path not in quickest]


def cpu_seconds() -> float:
    """Of this process and all below it, those that ended included."""
    below, spent, todo = {}, 0.0, [os.getpid()]
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        below.setdefault(int(fields[1]), []).append((int(stat.parent.name), int(fields[11]) + int(fields[12])))
    while todo:
        for pid, ticks in below.get(todo.pop(), ()):
            spent += ticks
            todo.append(pid)
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return spent / os.sysconf("SC_CLK_TCK") + sum(usage.ru_utime + usage.ru_stime for usage in own)


def clocked(run) -> tuple[float, float]:
    """(wall, CPU) seconds of run()."""
    begun, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - begun, cpu_seconds() - cpu


def _start(read, path: str, all_here) -> None:
    """A process decodes one file and waits for the others."""
    read(path)
    all_here.wait()


def _decode(read, path: str) -> None:
    read(path)


def alone(paths: list[str], workers: int, read, batch: int) -> tuple[float, float]:
    """Decoding every file once, in so many processes (0: this one)."""
    if not workers:
        return clocked(lambda: [read(path) for path in paths])
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, _start, (read, paths[0], spawn.Barrier(workers))) as pool:
        pool.map(functools.partial(_decode, read), paths[:1])  # all have started
        return clocked(lambda: pool.map(functools.partial(_decode, read), paths, chunksize=batch))


def through(paths: list[str], workers: int, read, batch: int) -> tuple[float, float]:
    """Batches of the same files, the first of every worker apart."""
    each = max(1, workers)
    files = paths[:1] * (each * batch) + paths
    stream = loader.iterate(files, read, batch_size=batch, workers=workers, shuffle=False, epochs=1)
    rest = lambda count: [None for _ in itertools.islice(stream, count)]  # noqa: E731
    try:
        rest(each)
        return clocked(lambda: rest(len(paths) // batch))
    finally:
        stream.close()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--workers", default="0,1,2,4")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)
    data = os.environ.get("MARC_JAX_TEST_DATA", "")
    found = args.videos or sorted(p for p in pathlib.Path(data, "videos").glob("*") if p.is_file() and data)
    paths = readable(found, args.frames, args.size)
    paths = paths[: len(paths) // args.batch * args.batch]
    if not paths:
        parser.error("no video: name some, or set MARC_JAX_TEST_DATA")
    read = functools.partial(load, frames=args.frames, size=args.size)
    print(f"{len(os.sched_getaffinity(0))} CPU cores, load {os.getloadavg()[0]:.0f}; {len(paths)} files, batches of"
          f" {args.batch} x {args.frames} x {args.size} x {args.size}; {args.turns} turns")  # fmt: skip
    print("| workers | alone, files/s | loader, files/s | loader / alone, wall | loader / alone, CPU |")
    print("|--:|--:|--:|--:|--:|", flush=True)
    for workers in map(int, args.workers.split(",")):
        turns = []
        for turn in range(args.turns):
            files = paths[:1] * ((LEAD - 1) * max(1, workers) * args.batch) + paths
            sides = [functools.partial(side, files, workers, read, args.batch) for side in (alone, through)]
            first = turn % 2  # in turn: a machine that is ever busier is unfair to nobody
            took = {side: sides[side]() for side in (first, 1 - first)}
            turns.append((took[0], took[1]))
        speeds = [len(files) / statistics.median(turn[side][0] for turn in turns) for side in (0, 1)]
        cells = []
        for clock in (0, 1):
            ratios = [a[clock] / b[clock] for a, b in turns]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {workers} | {speeds[0]:.2f} | {speeds[1]:.2f} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
