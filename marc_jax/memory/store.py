"""The memory on disk: what was computed once per video, for every later question.

A memory is a folder of ArrayRecord shards, written once and never changed:

    <folder>/<time_ns>-<random>.arrayrecord       complete
    <folder>/<time_ns>-<random>.arrayrecord.tmp   being written, or left by a crash: never read

Each record is one video: 4 bytes little-endian header length, a JSON header (format version, video id, array names,
dtypes, shapes), then the arrays' raw bytes. The last record of a shard is its JSON index: the fingerprint and the
video ids in record order. A shard appears by one rename after fsync, so a crash loses at most what was not flushed,
and any number of writers may add to one folder, each into its own shards; the newest entry of a video counts.

A memory is valid only for the model, preprocessing and options that made it: their `Fingerprint` is in every shard,
and opening it with another one is an error that names what differs. So is an entry whose video file has changed.

ArrayRecord was chosen by measurement (2 shared cores; write / read all in random order): 1,000 videos of 12 KB took
0.11 / 0.04 s, against 3.3 / 0.27 s for one Zarr 3 array per video and 4.8 s with 1.8 times the bytes for OCDBT with a
commit per video; 32 videos of 0.5 MB took 0.09 / 0.02 s against 0.26 / 0.02 s for Zarr. A shard takes at least
128 KiB, so flush every few hundred small videos, not after each.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
import uuid

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
import numpy as np
from array_record.python import array_record_module

VERSION = 1
SUFFIX = ".arrayrecord"


class StoreError(Exception):
    """A memory that cannot be read or written: `<path>: <reason>`."""

    exit_code = 2  # the user's to mend: one line, no traceback (`config.run_main`)

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


class StaleMemory(StoreError):
    """A memory made by another model, other preprocessing or from another video file."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a memory depends on, as sorted (name, value) pairs of text; see `fingerprint`."""

    parts: tuple[tuple[str, str], ...]

    def differences(self, other: "Fingerprint") -> str:
        mine, theirs = dict(self.parts), dict(other.parts)
        names = [n for n in sorted({*mine, *theirs}) if mine.get(n) != theirs.get(n)]
        return "; ".join(f"{n}: {_short(theirs.get(n))} in the memory, {_short(mine.get(n))} wanted" for n in names)


@dataclasses.dataclass(frozen=True)
class MemoryEntry:
    """One video's memory.

    Attributes:
      video_sha256: of the file's bytes (`file_sha256`).
      seconds: float64 [T], timestamp of the first frame of each temporal patch.
      event_spans: int32 [E, 2], start and end (exclusive) in temporal patches; patches of a transition lie between two.
      event_seconds: float64 [E, 2], when the span starts and ends.
      event_embeddings: float32 [E, d], L2-normalised.
      tokens: [T, p, D] visual tokens (or [T, n, V] tower features), in the dtype they were stored in; int8 stores
        come back as float32.
      grid: (h, w) of one temporal patch in the units of `tokens`, h * w = p.
      extra: anything JSON can hold.
    """

    video_sha256: str
    seconds: np.ndarray
    event_spans: np.ndarray
    event_seconds: np.ndarray
    event_embeddings: np.ndarray
    tokens: np.ndarray
    grid: tuple[int, int]
    extra: dict = dataclasses.field(default_factory=dict)


ARRAYS = ("seconds", "event_spans", "event_seconds", "event_embeddings", "tokens")


def fingerprint(**parts) -> Fingerprint:
    """Fingerprint of named parts (model="<sha256>", preprocessing={...}, ...); dicts and lists as canonical JSON."""
    text = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in parts.items()}
    return Fingerprint(tuple(sorted(text.items())))


def file_sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tree_sha256(tree: dict) -> str:
    """Hash of a nested dict of arrays: names, dtypes, shapes and bytes, independent of insertion order."""
    digest = hashlib.sha256()

    def visit(name, node):
        if isinstance(node, dict):
            for key in sorted(node):
                visit(f"{name}/{key}", node[key])
        else:
            array = np.ascontiguousarray(node)
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())

    visit("", tree)
    return digest.hexdigest()


class MemoryWriter:
    """Adds videos to a memory. A context manager: leaving it flushes; leaving it by an exception keeps what was added.

    Args:
      path: the folder, made if absent.
      fingerprint: must equal that of every shard already there (StaleMemory otherwise).
      tokens: "keep" the dtype given, or store as "bfloat16", "float32" or "int8" (one float32 scale per token,
        max |x| / 127).
      flush_bytes: a shard is completed when it has grown to this size; `flush()` does it at any time.
    """

    def __init__(self, path, fingerprint: Fingerprint, *, tokens: str = "keep", flush_bytes: int = 1 << 28):
        if tokens not in ("keep", "bfloat16", "float32", "int8"):
            raise ValueError(f"tokens must be 'keep', 'bfloat16', 'float32' or 'int8', not {tokens!r}")
        self.path, self.fingerprint = pathlib.Path(path), fingerprint
        self.tokens, self.flush_bytes = tokens, flush_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._done = set(MemoryReader(path, fingerprint))
        self._writer, self._name, self._ids, self._size = None, None, [], 0

    def __contains__(self, video_id: str) -> bool:
        """True if the video was there when the writer was made, or has been added since."""
        return video_id in self._done

    def add(self, video_id: str, entry: MemoryEntry) -> None:
        """Adds one video; durable after the next flush. An id may be added again: the newest entry counts."""
        record = _encode(video_id, entry, self.tokens)
        if self._writer is None:
            self._name = self.path / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}{SUFFIX}"
            self._writer = array_record_module.ArrayRecordWriter(f"{self._name}.tmp", "group_size:1")
        self._writer.write(record)
        self._ids.append(video_id)
        self._done.add(video_id)
        self._size += len(record)
        if self._size >= self.flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Completes the open shard: after this, what was added survives a crash and readers see it."""
        if self._writer is None:
            return
        writer, ids, temporary = self._writer, self._ids, pathlib.Path(f"{self._name}.tmp")
        self._writer, self._ids, self._size = None, [], 0
        index = {"version": VERSION, "fingerprint": self.fingerprint.parts, "videos": ids}
        try:
            writer.write(json.dumps(index).encode())
            writer.close()
            if _open(temporary).num_records() != len(ids) + 1:
                raise StoreError(temporary, "the shard is shorter than what was written (is the disk full?)")
            _fsync(temporary)
            os.rename(temporary, self._name)
            _fsync(self.path)
        except BaseException:
            self._done -= set(ids)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flush()


class MemoryReader:
    """Read access by video id: `reader[video_id]`, `video_id in reader`, `len(reader)`, iteration over ids."""

    def __init__(self, path, fingerprint: Fingerprint | None):
        """fingerprint None reads any memory (to inspect it); entries are then not known to fit any model."""
        self.path, self.fingerprint = pathlib.Path(path), fingerprint
        self._shards: dict[str, object] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Sees shards completed since."""
        if not self.path.is_dir():
            raise StoreError(self.path, "no such memory folder")
        for shard in sorted(self.path.glob(f"*{SUFFIX}")):
            if shard.name in self._shards:
                continue
            reader = _open(shard)
            index = _index(shard, reader)
            found = Fingerprint(tuple((name, value) for name, value in index["fingerprint"]))
            if self.fingerprint is not None and found != self.fingerprint:
                reason = f"made for something else ({self.fingerprint.differences(found)}); index the videos again"
                raise StaleMemory(self.path, reason)
            self._shards[shard.name] = reader
        where = {}
        for name in sorted(self._shards):  # oldest first: the newest entry of a video wins
            index = _index(self.path / name, self._shards[name])
            where.update({video: (name, i) for i, video in enumerate(index["videos"])})
        self._where = where

    def __getitem__(self, video_id: str) -> MemoryEntry:
        if video_id not in self._where:
            raise KeyError(f"{video_id!r} is not in the memory {self.path} ({len(self)} videos)")
        name, i = self._where[video_id]
        try:
            return _decode(self._shards[name].read([i])[0])
        except Exception as error:
            raise StoreError(self.path / name, f"record {i} ({video_id}) cannot be read: {error}") from error

    def get_checked(self, video_id: str, video_sha256: str) -> MemoryEntry:
        """The entry, or StaleMemory if the video file is no longer the one it was made from."""
        entry = self[video_id]
        if entry.video_sha256 != video_sha256:
            change = f"sha256 {_short(entry.video_sha256)} in the memory, {_short(video_sha256)} now"
            raise StaleMemory(self.path, f"the file of video {video_id!r} has changed ({change}); index it again")
        return entry

    def __contains__(self, video_id) -> bool:
        return video_id in self._where

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _open(path):
    try:
        return array_record_module.ArrayRecordReader(
            str(path), "index_storage_option:in_memory,readahead_buffer_size:0"
        )
    except Exception as error:
        raise StoreError(path, f"not a readable shard: {error}") from error


def _index(path, reader) -> dict:
    try:
        index = json.loads(reader.read([reader.num_records() - 1])[0])
        version = index["version"]
    except Exception as error:
        raise StoreError(path, f"the shard's index cannot be read: {error}") from error
    if version != VERSION:
        raise StaleMemory(path, f"format version {version}, this program reads {VERSION}; index the videos again")
    return index


def _encode(video_id, entry: MemoryEntry, tokens: str) -> bytes:
    spans, t = np.asarray(entry.event_spans), len(entry.tokens)
    if len(entry.seconds) != t or spans.shape[1:] != (2,) or (spans.size and (spans.min() < 0 or spans.max() > t)):
        raise ValueError(f"{video_id}: {t} patches of tokens, {len(entry.seconds)} seconds, spans {spans.tolist()}")
    if not len(entry.event_embeddings) == len(entry.event_seconds) == len(spans):
        raise ValueError(f"{video_id}: {len(spans)} events, {len(entry.event_embeddings)} embeddings")
    arrays = {name: np.ascontiguousarray(getattr(entry, name)) for name in ARRAYS}
    if tokens == "int8":
        value = arrays["tokens"].astype(np.float32)
        scale = np.max(np.abs(value), axis=-1, keepdims=True) / 127
        arrays["tokens"] = np.rint(value / np.maximum(scale, 1e-30)).astype(np.int8)
        arrays["scale"] = scale.astype(np.float32)
    elif tokens != "keep":
        arrays["tokens"] = arrays["tokens"].astype(tokens)
    header = {
        "version": VERSION,
        "video": video_id,
        "video_sha256": entry.video_sha256,
        "grid": list(entry.grid),
        "extra": entry.extra,
        "arrays": [[name, a.dtype.name, a.shape] for name, a in arrays.items()],
    }
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *(a.tobytes() for a in arrays.values())])


def _decode(record: bytes) -> MemoryEntry:
    start = 4 + int.from_bytes(record[:4], "little")
    header, arrays = json.loads(record[4:start]), {}
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(record, np.dtype(dtype), count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    scale = arrays.pop("scale", None)
    if scale is not None:
        arrays["tokens"] = arrays["tokens"].astype(np.float32) * scale
    return MemoryEntry(header["video_sha256"], grid=tuple(header["grid"]), extra=header["extra"], **arrays)


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value) -> str:
    return "nothing" if value is None else value if len(value) <= 40 else f"{value[:37]}..."
