"""Decoding speed beside the libraries it is built on, in one run: frames per second of CPU time, and ratios.

    python -m tools.bench.decode VIDEO...

`PyAV` and `cv2` are the shortest loops that the libraries allow: every frame decoded (`grab`), the wanted ones
converted to RGB (`retrieve`); `ours` returns the same frames through `open_reader`, with its scan of timestamps, limits
and rotation; all with the threads that ours chooses. `sandbox` is `decode_many` over the files with two workers, beside
`read_frames` in this process. CPU time of all threads and child processes counts, so that other work on the machine
does not; the ways take turns and the best of ROUNDS is taken.
"""

import resource
import sys
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipelines.decoders import open_reader
from data_pipelines.sandbox import decode_many
from data_pipelines.video import Clip, read_frames

ROUNDS = 3
CHOICES = (None, 64, 8)  # frames wanted, spread over the file; None is all
SAMPLING = {"num_frames": 64, "resize": (224, 224)}


def raw_pyav(path, wanted: set | None, threads: int) -> int:
    """Decodes every frame and converts those of `wanted` (None: all); the number of frames."""
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        stream.thread_type = "NONE" if threads == 1 else "AUTO"
        for count, frame in enumerate(container.decode(stream), 1):  # noqa: B007
            if wanted is None or count - 1 in wanted:
                frame.to_ndarray(format="rgb24")
    return count


def raw_cv2(path, wanted: set | None, threads: int) -> int:
    """As `raw_pyav`: `grab` for every frame, `retrieve` for the wanted ones."""
    capture, count = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads]), 0
    while capture.grab():
        if wanted is None or count in wanted:
            capture.retrieve()
        count += 1
    capture.release()
    return count


def ours(path, wanted: set | None, backend: str) -> int:
    """Every frame, or the wanted ones, through our reader."""
    with open_reader(path, backend) as reader:
        index = range(reader.info.num_frames) if wanted is None else sorted(wanted)
        for _ in reader.decode(index):
            pass
        return reader.info.num_frames


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def best(ways: dict) -> dict:
    """Name -> CPU seconds, the best of ROUNDS turns."""
    seconds = dict.fromkeys(ways, np.inf)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begun = cpu_seconds()
            way()
            seconds[name] = min(seconds[name], cpu_seconds() - begun)
    return seconds


def row(path: Path) -> str:
    """One line of the table."""
    with open_reader(path) as reader:
        info, count = reader.info, reader.info.num_frames
        threads, keys = reader._stream.codec_context.thread_count, max(1, len(reader._keys))
    cells = [path.name, f"{info.codec} {info.width}x{info.height}", str(count), f"{count / keys:.0f}"]
    for number in CHOICES:
        some = number and {int(i) for i in np.rint(np.linspace(0, count - 1, min(number, count)))}
        took = best(
            {
                "pyav": lambda some=some: raw_pyav(path, some, threads),
                "cv2": lambda some=some: raw_cv2(path, some, threads or 1),
                "ours": lambda some=some: ours(path, some, "pyav"),
            }
        )
        cells += [f"{count / took[name]:.0f}" for name in ("pyav", "cv2", "ours")]
        cells += [f"{took['pyav'] / took['ours']:.2f}", f"{took['cv2'] / took['ours']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main(names: list[str]) -> None:
    if not names:
        raise SystemExit(__doc__)
    paths = [Path(name) for name in names]
    heads = [f"{number or 'all'}: PyAV | cv2 | ours | ours/PyAV | ours/cv2" for number in CHOICES]
    print(f"| file | codec | frames | GOP | {' | '.join(heads)} |")
    print("|---|---|--:|--:|" + "--:|" * 5 * len(CHOICES))
    for path in paths:
        print(row(path), flush=True)
    many = paths * 4

    def sandbox():
        return [got for _, got in decode_many(many, SAMPLING, workers=2) if not isinstance(got, Clip)]

    took = best({"here": lambda: [read_frames(path, **SAMPLING) for path in many], "sandbox": sandbox})
    here, there = (1e3 * took[name] / len(many) for name in ("here", "sandbox"))
    print(
        f"\n64 frames of 224x224 from each of {len(many)} files: {here:.0f} ms of CPU per file in this process, ",
        end="",
    )
    print(f"{there:.0f} ms by decode_many with 2 workers, their start included")


if __name__ == "__main__":
    main(sys.argv[1:])
