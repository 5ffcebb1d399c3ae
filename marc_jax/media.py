"""The media of records, each read once into a memory on disk: decoded, divided into events, through the frozen tower.

Files are decoded in child processes. Of several processes of a run each reads its share on its own devices.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from data_pipelines import frames, loader, sandbox, sources, video
from marc_jax import distributed, metrics
from marc_jax.checkpoint import CheckpointError
from marc_jax.config import ConfigError
from marc_jax.memory import indexer, store
from marc_jax.memory.shots import Shots
from marc_jax.run import Run

FLUSH = 256  # files after which the memory's shard is completed
FOLDER_RATE = 3.0  # pictures per second of a folder that does not say; TVQA's in MVBench


def media_key(record: sources.Record) -> str:
    """What the memory knows a record's medium by: its path, and the part of the video where the question is of one."""
    clip = clip_of(record)
    return record.path if clip is None else f"{record.path}#t={clip[0]:g},{clip[1]:g}"


def clip_of(record: sources.Record) -> tuple[float, float] | None:
    """(start, end) in seconds, of `data_pipelines.benchmarks.published`; a file's own field "clip" is no tuple."""
    clip = record.extra.get("clip")
    return clip if isinstance(clip, tuple) else None


def open_indexer(run: Run, params: dict, encoder, pool: str, shots: str, option: str) -> indexer.Indexer:
    """Args:
    params: of the model whose tower is run; `encoder`, `pool`: of `chosen_encoder`.
    shots: folder of TransNetV2 or "", and the `option` that named it. Raises ConfigError where it cannot be read.
    """
    try:
        divider = Shots.load(shots) if shots else None
    except CheckpointError as e:
        raise ConfigError(f"{option}: {e}") from None
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    split = indexer.Indexer.CHUNK % ways == 0
    place = run.split if split else run.whole
    return indexer.Indexer(
        run.cfg, params, run.retriever, run.sampling, encoder=encoder, pool=pool, shots=divider, place=place,
        dtype=jnp.dtype(run.config.model.dtype),
    )  # fmt: skip


def remember(run: Run, worker: indexer.Indexer, records) -> tuple[store.MemoryReader, dict[str, str]]:
    """The memory of the records' media, and {key: reason} of those that cannot be read.

    A file whose size or time has changed since is read anew. A run that is killed loses FLUSH files at most. Several
    processes share the work; `worker` is then one of this process's devices alone. Raises ConfigError: they do not see
    one folder.
    """
    parts, part = jax.process_count(), jax.process_index()
    root, folder = run.config.data.root, Path(run.config.data.memory or run.workdir / "memory")
    keys = {media_key(record): record for record in records}
    media = list(keys.values())[part::parts]
    pool = sandbox.Pool(max(1, run.config.data.workers), run.config.data.decode_seconds)
    try:
        kept = frames.Frames(run.config.data.frames, pool.read_frames) if run.config.data.frames else None
    except OSError as error:
        raise ConfigError(f"config.data.frames = {run.config.data.frames!r}: {error.strerror}") from None
    decode, broken = functools.partial(_decode, worker, root, pool.read_frames, kept), {}
    with (
        store.MemoryWriter(folder, worker.fingerprint, tokens=run.config.data.tokens) as writer,
        metrics.Progress("memory", len(media)) as bar,
    ):
        memory = store.MemoryReader(folder, worker.fingerprint)
        todo = [record for record in media if not _current(memory, root, record)]
        work = loader.decode_ahead(todo, decode, pool.workers)
        with contextlib.closing(work), pool:  # stopped, the pool ends first: no thread waits for a file then
            for done, (record, decoded, bad) in enumerate(work, 1):
                if bad is not None:
                    broken[media_key(record)] = bad["reason"]
                else:
                    entry, stamp = worker.encode(decoded), _stamp(root, record.path)
                    writer.add(media_key(record), dataclasses.replace(entry, extra=entry.extra | stamp))
                if done % FLUSH == 0:
                    writer.flush()
                bar.update(len(media) - len(todo) + done, failed=len(broken))
    broken = functools.reduce(operator.or_, distributed.exchanged(broken))
    memory.refresh()
    if unseen := [key for key in keys if key not in memory and key not in broken]:
        raise ConfigError(f"{folder} lacks {unseen[0]!r}, which another process has added: all need to see one folder")
    return memory, broken


def _decode(
    worker: indexer.Indexer, root: str, read: Callable, kept: frames.Frames | None, record: sources.Record
) -> indexer.Decoded:
    start, end = clip_of(record) or (None, None)
    if record.data_type == "frame" and os.path.isdir(folder := sources.confined_path(root, record.path)):
        told = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(folder))
        sha256 = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        rate = float(record.extra.get("fps") or FOLDER_RATE)
        return worker.decode(folder, sha256, functools.partial(video.read_folder, rate=rate, start=start, end=end))
    path = sources.media_path(root, record.path)
    if record.data_type == "image":
        return worker.decode_image(path)
    sha256, read = (None, read) if kept is None else (kept.sha256(path), kept.read)
    return worker.decode(path, sha256, functools.partial(read, start=start, end=end))


def _stamp(root: str, path: str) -> dict:
    stat = os.stat(sources.confined_path(root, path))
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _current(memory: store.MemoryReader, root: str, record: sources.Record) -> bool:
    """Whether the memory holds this file as it is now; a file that cannot be looked at is for `_decode` to report."""
    try:
        stamp = _stamp(root, record.path)
    except (OSError, ValueError):
        return False
    key = media_key(record)
    return key in memory and stamp.items() <= memory.head(key).extra.items()
