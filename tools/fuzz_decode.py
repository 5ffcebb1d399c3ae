"""Damages real videos and decodes them: nothing may crash, hang or fail in an unforeseen way.

    python -m tools.fuzz_decode --videos=FOLDER [--count=2000] [--seed=0]

Each attempt takes a small file of the folder, changes it (bit flips, a zeroed or removed piece, truncation, header
edits) and decodes 8 frames in a worker process. The table counts, per kind of damage:

    refused     an error that names the file and the reason
    same        the frames and times of the undamaged file
    warned      other frames, with what the decoder complained of in `Clip.warnings`
    unseen      other frames and no complaint: the format has no checksum that could tell
    unseen+hash the same with `sha256` given: must be 0
    hung, died  over the deadline, or the worker ended: costs that file alone
    failed      an error that no reader foresaw: a bug

The exit code is 1 if anything failed, or was unseen in spite of its hash.
"""

import argparse
import collections
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.sandbox import decode_many
from data_pipelines.video import Clip, VideoError, read_frames

KINDS = ("flip", "flips", "header", "word", "zero", "cut", "remove", "swap")
OUTCOMES = ("refused", "same", "warned", "unseen", "unseen+hash", "hung", "died", "failed")
SAMPLING = {"num_frames": 8}
LARGEST = 400_000  # bytes of an original
WORDS = (b"\0\0\0\0", b"\0\0\0\1", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff")


def header(data: bytes) -> tuple[int, int]:
    """Where a file describes itself: MP4's moov box, else the first 2 KiB."""
    at = data.find(b"moov")
    if at < 4:
        return 0, min(len(data), 2048)
    return at, min(len(data), at + max(8, int.from_bytes(data[at - 4 : at], "big")))


def damage(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """`data` changed in one of the ways of KINDS."""
    out, n = bytearray(data), len(data)
    at, length = int(rng.integers(n)), int(rng.integers(1, max(2, n // 10)))
    low, high = header(data)
    if kind in ("flip", "flips"):
        for place in rng.integers(n, size=1 if kind == "flip" else rng.integers(2, 64)):
            out[place] ^= 1 << int(rng.integers(8))
    elif kind == "header":
        for place in rng.integers(low, high, size=rng.integers(1, 8)):
            out[place] = int(rng.integers(256))
    elif kind == "word":
        place = int(rng.integers(low, max(low + 1, high - 4)))
        out[place : place + 4] = WORDS[rng.integers(len(WORDS))]
    elif kind == "zero":
        out[at : at + length] = bytes(len(out[at : at + length]))
    elif kind == "cut":
        del out[at:]
    elif kind == "remove":
        del out[at : at + length]
    elif kind == "swap":
        other, size = int(rng.integers(n)), min(length, 4096)
        a, b = sorted((at, other))
        size = min(size, b - a, n - b)
        out[a : a + size], out[b : b + size] = out[b : b + size], out[a : a + size]
    return bytes(out)


def originals(folder: Path) -> dict[Path, Clip | VideoError]:
    """The small videos of a folder and what they hold undamaged."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".json", ".txt", ".md") or not 0 < path.stat().st_size <= LARGEST:
            continue
        try:
            found[path] = read_frames(path, **SAMPLING)
        except VideoError as error:
            found[path] = error
    return found


def mutants(paths: list[Path], count: int, seed: int, folder: Path) -> Iterator[tuple[Path, Path, str]]:
    """Writes (damaged file, original, kind), one after another: every kind of damage to every file in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path, kind = paths[i % len(paths)], KINDS[i // len(paths) % len(KINDS)]
        data = path.read_bytes()
        while (changed := damage(data, kind, rng)) == data:
            pass
        target = folder / f"{i}{path.suffix}"
        target.write_bytes(changed)
        yield target, path, kind


def judge(path: Path, got: Clip | VideoError, truth: Clip | VideoError, sha256: str) -> str:
    """One of OUTCOMES; `sha256` is the undamaged file's."""
    if isinstance(got, VideoError):
        reasons = {"decoding took longer": "hung", "its decoder died": "died", "the decoder failed": "failed"}
        return next((name for start, name in reasons.items() if got.reason.startswith(start)), "refused")
    if isinstance(truth, Clip) and got.frames.shape == truth.frames.shape:
        if (got.frames == truth.frames).all() and np.allclose(got.seconds, truth.seconds, atol=1e-6):
            return "same"
    if got.warnings:
        return "warned"
    try:
        read_frames(path, **SAMPLING, sha256=sha256)
    except VideoError:
        return "unseen"
    return "unseen+hash"


def fuzz(
    videos: Path, count: int, seed: int = 0, *, workers: int | None = None, seconds: float = 10.0
) -> tuple[collections.Counter, list[str]]:
    """(kind, outcome) -> attempts, and a line for each attempt that hung, died or failed."""
    truth, counts, notes = originals(Path(videos)), collections.Counter(), []
    if not truth:
        raise SystemExit(f"error: no video under {LARGEST} bytes in {videos}")
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in truth}
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        made = {}

        def paths():
            for target, path, kind in mutants(list(truth), count, seed, Path(folder)):
                made[target] = path, kind
                yield target

        for target, got in decode_many(paths(), SAMPLING, workers, seconds):
            path, kind = made.pop(target)
            outcome = judge(target, got, truth[path], hashes[path])
            counts[kind, outcome] += 1
            if outcome in ("hung", "died", "failed", "unseen+hash"):
                notes.append(f"{outcome}: {path.name} {kind} (attempt {target.stem}): {getattr(got, 'reason', '')}")
            target.unlink()
    return counts, notes


def table(counts: collections.Counter) -> str:
    """A Markdown table of `fuzz`'s counts."""
    rows = [f"| damage | attempts | {' | '.join(OUTCOMES)} |", "|---|--:|" + "--:|" * len(OUTCOMES)]
    for kind in (*KINDS, "all"):
        row = [sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == outcome) for outcome in OUTCOMES]
        rows.append(f"| {kind} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="deadline of one file")
    args = parser.parse_args()
    counts, notes = fuzz(args.videos, args.count, args.seed, seconds=args.seconds)
    print(table(counts))
    print("\n".join(notes), file=sys.stderr)
    return int(any(counts[kind, outcome] for kind in KINDS for outcome in ("failed", "unseen+hash")))


if __name__ == "__main__":
    sys.exit(main())
