"""Writes the synthetic set: MP4 files, one Video-R1 JSON list per split, the tokenizer.

    python -m data_pipelines.synthetic.build --out=data/synthetic --train=4096 --val=256 --test=1024

Every video is a pure function of (seed, split, index), so a build that was interrupted goes on where it stopped and
any number of workers writes the same files. A file has its final name only when it is complete.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.synthetic import questions, scenes, vocabulary
from data_pipelines.synthetic.scenes import Difficulty, Event

SPLITS = ("train", "val", "test")
VERSION = 2
CHUNK = 32
RESERVE_BYTES = 64 * 2**20
_HIDDEN = ".part-"
_WHOLE = ".whole.json"  # what was asked for when the set was last completed

Progress = Callable[[str, int, int], None]


def video_rng(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The random stream of one video (purpose 0), its noise (1) or its question number p - 2."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, purpose)))


def latents(seed: int, split: str, index: int, difficulty: Difficulty) -> list[Event]:
    """The events of one video of the set."""
    return scenes.sample_video(video_rng(seed, split, index), difficulty)


def video_path(split: str, index: int) -> str:
    """Where the video lies, as written in the records."""
    return f"./videos/{split}/{index:06d}.mp4"


def make_records(seed: int, split: str, index: int, difficulty: Difficulty, per_video: int = 1) -> list[dict]:
    """Video-R1 records of one video. `difficulty.types` take turns over the split: each is asked equally often."""
    events = latents(seed, split, index, difficulty)
    types = difficulty.types
    made = []
    for j in range(per_video):
        number = index * per_video + j
        question = questions.make_question(
            video_rng(seed, split, index, 2 + j), events, types[number % len(types)], options=difficulty.options
        )
        made.append(_record(question, events, number, split, index, difficulty))
    return made


def _record(question, events, number: int, split: str, index: int, difficulty: Difficulty) -> dict:
    return {
        "problem_id": number,
        "problem": question.problem,
        "data_type": "video",
        "problem_type": question.problem_type,
        "options": list(question.options),
        "solution": question.solution,
        "process": question.process,
        "path": video_path(split, index),
        "data_source": f"synthetic/{split}",
        "video_id": f"{split}/{index:06d}",
        "question_type": question.question_type,
        "needed_events": list(question.needed),
        "fps": difficulty.fps,
        "events": event_dicts(events, difficulty),
    }


def event_dicts(events: list[Event], difficulty: Difficulty) -> list[dict]:
    """Events as they stand in a record: where they are, then what they are."""
    seconds = difficulty.patch_seconds
    return [
        {
            "start_seconds": start * seconds,
            "end_seconds": end * seconds,
            "start_patch": start,
            "end_patch": end,
            **dataclasses.asdict(event),
        }
        for event, (start, end) in zip(events, scenes.patch_spans(events), strict=True)
    ]


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encodes uint8 RGB [T, H, W, 3] as MPEG-4 in MP4; the file appears complete or not at all (OSError)."""
    part = path.with_name(_HIDDEN + path.name)
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(part), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    try:
        if not writer.isOpened():
            raise OSError(f"{path}: OpenCV could not open an MP4 writer here")
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        if not is_complete_mp4(part):
            raise OSError(errno.ENOSPC, "the video was not written completely (disk full?)", str(path))
        os.replace(part, path)
    finally:
        writer.release()
        part.unlink(missing_ok=True)


def is_complete_mp4(path: Path) -> bool:
    """Whether the file's top-level boxes fill it exactly and hold both media and index. Decodes nothing."""
    try:
        size = path.stat().st_size
        kinds, at = set(), 0
        with open(path, "rb") as file:
            while at + 8 <= size:
                file.seek(at)
                length, kind = struct.unpack(">I4s", file.read(8))
                if length < 8:
                    return False
                kinds.add(kind)
                at += length
    except OSError:
        return False
    return at == size and {b"moov", b"mdat"} <= kinds


def estimate_bytes(videos: int, difficulty: Difficulty) -> int:
    """An upper bound on what the videos take.

    The encoder is asked for at most 8 bits per pixel; clean scenes were measured at up to 0.27 bytes per pixel.
    """
    most = max(*difficulty.events) * max(*difficulty.patches) * scenes.FRAMES_PER_PATCH
    per_frame = difficulty.size**2 // (1 if difficulty.noise else 3)
    return videos * (2048 + most * per_frame)


def build(
    out: str | Path,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    difficulty: Difficulty | None = None,
    questions_per_video: int = 1,
    workers: int = 0,
    progress: Progress | None = None,
    max_bytes: int = 8 * 2**30,
) -> Path:
    """Builds the set, or completes it, in the folder `out`; returns the folder.

    Args:
      sizes: videos per split, e.g. {"train": 4096, "val": 256, "test": 1024}.
      workers: processes that render; 0 renders in this one. The result does not depend on it.
      progress: called as progress(split, videos done, videos in all).
      max_bytes: refuse to start a set that may grow larger.

    Raises:
      ValueError: sizes name an unknown split, the estimate exceeds max_bytes, or `out` holds another set.
      OSError: no room on the disk (checked up front), or another build is at work in `out`.
    """
    sizes = dict(sizes or {"train": 4096, "val": 256, "test": 1024})
    difficulty = difficulty or Difficulty()
    unknown = set(sizes) - set(SPLITS)
    if unknown or min(sizes.values()) < 0 or questions_per_video < 1:
        raise ValueError(f"sizes are videos for some of {SPLITS} and at least one question each, got {sizes}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"version": VERSION, "seed": seed, "difficulty": _plain(difficulty)}
    _check_same_set(out, settings)
    missing = _missing(out, sizes)
    whole = {**settings, "sizes": sizes, "questions_per_video": questions_per_video}
    if not any(missing.values()) and _read_json(out / _WHOLE) == whole:
        return out
    _check_room(out, sum(map(len, missing.values())), sum(sizes.values()), difficulty, max_bytes)
    with _lock(out):
        (out / _WHOLE).unlink(missing_ok=True)
        for stale in (out / "videos").glob(f"*/{_HIDDEN}*"):
            stale.unlink()
        _write_json(out / "dataset.json", settings)
        vocabulary.write_tokenizer(out / "tokenizer.json")
        for split, size in sizes.items():
            (out / "videos" / split).mkdir(parents=True, exist_ok=True)
            _render_split(out, seed, split, size, missing[split], difficulty, workers, progress)
            records = [r for i in range(size) for r in make_records(seed, split, i, difficulty, questions_per_video)]
            _write_json(out / f"{split}.json", records)
        _write_json(out / _WHOLE, whole)
    return out


def _plain(difficulty: Difficulty) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(difficulty)))


def _check_same_set(out: Path, settings: dict) -> None:
    marker = out / "dataset.json"
    if not marker.exists():
        return
    found = json.loads(marker.read_text(encoding="utf-8"))
    if found != settings:
        differing = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        differing = ", ".join(differing)
        raise ValueError(f"{out} holds another set (different {differing}); choose another folder or remove it")


def _missing(out: Path, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    return {s: [i for i in range(n) if not is_complete_mp4(out / video_path(s, i))] for s, n in sizes.items()}


def _check_room(out: Path, todo: int, videos: int, difficulty: Difficulty, max_bytes: int) -> None:
    whole, need = estimate_bytes(videos, difficulty), estimate_bytes(todo, difficulty)
    if whole > max_bytes:
        message = f"{videos} videos may take {whole / 1e9:.1f} GB"
        raise ValueError(f"{message}, more than max_bytes = {max_bytes / 1e9:.1f} GB")
    free = shutil.disk_usage(out).free
    if todo and need + RESERVE_BYTES > free:
        message = f"{todo} videos may take {need / 1e6:.0f} MB, only {free / 1e6:.0f} MB free"
        raise OSError(errno.ENOSPC, message, str(out))


@contextlib.contextmanager
def _lock(out: Path):
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another build is at work here", str(out)) from None
        yield


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value) -> None:
    part = path.with_name(_HIDDEN + path.name)
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _render_chunk(out: Path, seed: int, split: str, indices: list[int], difficulty: Difficulty) -> int:
    for i in indices:
        events = latents(seed, split, i, difficulty)
        noise_rng = video_rng(seed, split, i, 1) if difficulty.noise else None
        frames = scenes.render(events, difficulty.size, noise=difficulty.noise, rng=noise_rng)
        write_video(out / video_path(split, i), frames, difficulty.fps)
    return len(indices)


def _render_split(out, seed, split, size, missing, difficulty, workers, progress) -> None:
    done = size - len(missing)
    report = progress or (lambda *_: None)
    report(split, done, size)
    chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
    if workers <= 0 or len(chunks) <= 1:
        for chunk in chunks:
            done += _render_chunk(out, seed, split, chunk, difficulty)
            report(split, done, size)
        return
    context = multiprocessing.get_context("spawn")  # the parent may hold threads of an accelerator runtime
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            jobs = [pool.submit(_render_chunk, out, seed, split, chunk, difficulty) for chunk in chunks]
            for job in concurrent.futures.as_completed(jobs):
                done += job.result()
                report(split, done, size)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for split, size in (("train", 4096), ("val", 256), ("test", 1024)):
        parser.add_argument(f"--{split}", type=int, default=size, help="videos")
    parser.add_argument("--questions-per-video", type=int, default=1)
    parser.add_argument("--events", type=int, nargs=2, default=Difficulty.events, metavar=("LOW", "HIGH"))
    parser.add_argument("--patches", type=int, nargs=2, default=Difficulty.patches, metavar=("LOW", "HIGH"))
    parser.add_argument("--types", nargs="+", default=Difficulty.types, metavar="TYPE", help="questions asked, in turn")
    parser.add_argument("--options", choices=("fixed", "shuffled"), default="fixed")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)

    def progress(split, done, total):
        if done == total or sys.stdout.isatty():
            print(f"\r{split}: {done}/{total} videos", end="\n" if done == total else "", flush=True)

    try:
        difficulty = Difficulty(
            events=tuple(args.events),
            patches=tuple(args.patches),
            types=tuple(args.types),
            options=args.options,
            noise=args.noise,
        )
        build(
            args.out,
            seed=args.seed,
            sizes={s: getattr(args, s) for s in SPLITS},
            difficulty=difficulty,
            questions_per_video=args.questions_per_video,
            workers=args.workers,
            progress=progress,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on")
        return 130
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
