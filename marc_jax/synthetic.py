"""The synthetic set of a run: its files and records, and the training videos decoded into a bank of patches.

`run` is the `marc_jax.run.Run` that they are of; that module imports this one.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

from data_pipelines import loader, sources
from data_pipelines.patches import frames_to_pixel_patches
from data_pipelines.synthetic import build, recompose
from data_pipelines.synthetic.scenes import Difficulty
from marc_jax import files, locks, metrics
from marc_jax.batches import Recomposer
from marc_jax.config import ConfigError

_OWN_FIELDS = {"video_id": str, "question_type": str, "needed_events": list, "events": list}  # of the synthetic set


def difficulty(data) -> Difficulty:
    """config.data as the synthetic set's difficulty."""
    return Difficulty(
        size=data.size, fps=data.fps, events=tuple(data.events), patches=tuple(data.patches),
        p_dissolve=data.dissolve, options=data.options, types=tuple(data.types),
    )  # fmt: skip


def data_folder(config, workdir: Path) -> Path:
    return Path(config.data.path) if config.data.path else workdir / "data"


def build_set(config, folder: Path) -> None:
    """The synthetic set in `folder`, if it is not there. Raises ConfigError as `prepare`."""
    sizes = {"train": config.data.train_videos, "test": config.data.test_videos}
    lock = locks.held(folder / ".prepare.lock", f"the data in {folder}", wait=True)
    with lock, metrics.Progress("data", sum(sizes.values())) as bar:
        done = dict.fromkeys(sizes, 0)

        def progress(split, count, _):
            done[split] = count
            bar.update(sum(done.values()))

        try:
            build.build(
                folder, seed=config.seed, sizes=sizes, difficulty=difficulty(config.data),
                questions_per_video=config.data.questions_per_video, workers=config.data.workers, progress=progress,
            )  # fmt: skip
        except ValueError as e:
            raise ConfigError(f"config.data: {e}") from None


def read_records(folder: Path, split: str) -> list[dict]:
    """The rows of `<folder>/<split>.json`; every medium lies inside `folder` (whether it can be read shows later).

    Raises ConfigError: the first bad row with file, row and field, and how many more there are.
    """
    file, errors, rows = folder / f"{split}.json", [], []
    try:
        records = sources.load_records(file, errors=errors)
    except sources.RecordError as e:
        raise ConfigError(str(e)) from None
    for record in records:
        fields = {name: value for name, value in vars(record).items() if name not in ("extra", "row", "line")}
        rows.append({**record.extra, **fields, "options": list(record.options)})
        for name, kind in _OWN_FIELDS.items():
            if not isinstance(record.extra.get(name), kind):
                reason = "is missing" if name not in record.extra else f"is not a {kind.__name__}"
                errors.append(sources.RecordError(file, record.row, name, reason))
        try:
            sources.confined_path(folder, record.path)
        except ValueError as e:
            errors.append(sources.RecordError(file, record.row, "path", str(e)))
    if errors:
        errors.sort(key=lambda e: e.row)
        raise ConfigError(f"{errors[0]}{f' (and {len(errors) - 1} more such errors)' if len(errors) > 1 else ''}")
    return rows


def report_unreadable(run, errors: list[dict], total: int) -> None:
    """Files that cannot be read are left out, named in `<workdir>/unreadable.jsonl`, and never replaced by others.

    Raises ConfigError beyond one in a hundred: then something else is wrong.
    """
    if not errors:
        return
    path = run.workdir / "unreadable.jsonl"
    files.write_whole(path, "".join(json.dumps(error) + "\n" for error in errors))
    line = f"{len(errors)} of {total} videos cannot be read (all in {path}); first: {errors[0]['reason']}"
    if len(errors) > 0.01 * total:
        raise ConfigError(line)
    print(f"warning: {line}", file=sys.stderr)


def decode_pixels(run, folder: Path, names: list[str], label: str) -> dict[str, np.ndarray]:
    """{name: uint8 patches [t, n, 1176]} of the files that can be read, through the ordinary video reader."""
    with metrics.Progress(label, len(names)) as bar:
        clips, errors = loader.decode_many(
            [folder / name for name in names], run.sampling.read, workers=run.config.data.workers,
            progress=lambda done, _: bar.update(done),
        )  # fmt: skip
    report_unreadable(run, errors, len(names))
    read = zip(names, clips, strict=True)
    return {name: frames_to_pixel_patches(clip.frames)[0] for name, clip in read if clip is not None}


def decoded(run, folder: Path, names: list[str], label: str) -> tuple[np.ndarray, dict[str, int]]:
    """(uint8 patches [N, n, 1176] of these files, one after the other; {name: how many are its}).

    With data.keep_decoded they are kept beside the set, decoded once for all processes and read from the disk's cache.
    """
    if not run.config.data.keep_decoded:
        return _joined(decode_pixels(run, folder, names, label))
    kept = folder / f"decoded_{label}_{zlib.crc32(chr(10).join(names).encode()):08x}.npy"
    told = kept.with_suffix(".json")
    with locks.held(folder / f".decoded_{label}.lock", f"{kept}", wait=True):
        if not told.exists():
            bank, rows = _joined(decode_pixels(run, folder, names, label))
            part = kept.with_suffix(".part.npy")
            np.save(part, bank)
            part.replace(kept)
            files.write_whole(told, json.dumps(rows))
    return np.asarray(np.load(kept, mmap_mode="r")), json.loads(told.read_text(encoding="utf-8"))


def _joined(pixels: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    return bank_of(list(pixels.values())), {name: len(patches) for name, patches in pixels.items()}


def bank_of(parts: list[np.ndarray]) -> np.ndarray:
    """One after the other, filled up by zeros to one of a few lengths: sets alike in size share compiled programs."""
    total = sum(map(len, parts))
    unit = 1 << max(total.bit_length() - 3, 0)
    bank = np.zeros((-(-total // unit) * unit, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=bank[:total])
    return bank


def load_training(run) -> None:
    """Decodes the training videos into the pixel bank and the pool of events that recomposition draws from."""
    folder = data_folder(run.config, run.workdir)
    records = read_records(folder, "train")
    bank, count = decoded(run, folder, list(dict.fromkeys(record["path"] for record in records)), "train")
    pool, places = recompose.pool_from_records([record for record in records if record["path"] in count])
    rows = dict(zip(count, (np.cumsum([0, *count.values()])[:-1]).tolist(), strict=True))
    row_e = np.array([rows[path] + start for path, start, _ in places])
    run.pixels = run.whole(bank)
    run.sources[""] = Recomposer(pool, row_e, run.sizes, run.config.seed, rows)
