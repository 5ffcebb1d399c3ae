"""The memory on disk: what was computed once per video, for every later question.

A memory is a folder of ArrayRecord shards, written once and never changed:

    <folder>/<time_ns>-<random>-<machine>.arrayrecord       complete
    <folder>/<time_ns>-<random>-<machine>.arrayrecord.tmp   being written, or left by a crash: never read

Two records are one video: its head and its tokens (`entry`). The last record of a shard is its JSON index: the
fingerprint and [video id, SHA-256 of the file] in record order. A shard appears by one rename after fsync, so a crash
loses at most what was not flushed, and any number of writers may add to one folder, each into its own shards; the
newest entry of a video counts. A writer holds a lock (flock) on its .tmp file; the next writer on this machine removes
those that nobody holds. The name ends with a mark of the machine, because not every shared file system has locks across
machines: others wait a day.

A memory is valid only for the model, preprocessing and options that made it: their `Fingerprint` is in every shard,
and opening it with another one is an error that names what differs. So is an entry whose video file has changed.

ArrayRecord was chosen by measurement (2 shared cores; write / read all in random order): 1,000 videos of 12 KB took
0.11 / 0.04 s, against 3.3 / 0.27 s for one Zarr 3 array per video and 4.8 s with 1.8 times the bytes for OCDBT with a
commit per video; 32 videos of 0.5 MB took 0.09 / 0.02 s against 0.26 / 0.02 s for Zarr. A shard takes at least
128 KiB: flush every few hundred small videos. Nothing is compressed: that took twice as long to read (random bfloat16).
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import platform
import threading
import time
import uuid
import zlib

import numpy as np
from array_record.python import array_record_module

from marc_jax.memory.entry import VERSION, MemoryEntry, decode, encode

SUFFIX = ".arrayrecord"
MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
OPEN_SHARDS = 64  # files a reader holds open: a large memory has more shards than a process may have
AGAIN = "index the videos again, into a new folder"


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
      tokens: "keep" the dtype given, or "bfloat16", "float32", "int8" (a float32 scale per token, max |x| / 127).
      flush_bytes: a shard is completed when it has grown to this size; `flush()` does it at any time.
      reader: a MemoryReader of it, where there is one: only shards that it has not seen are opened.

    Attributes:
      bytes: what was added, as stored.
      flushed: when (time.monotonic) `flush` was last called.
    """

    def __init__(self, path, fingerprint: Fingerprint, *, tokens="keep", flush_bytes: int = 1 << 28, reader=None):
        if tokens not in ("keep", "bfloat16", "float32", "int8"):
            raise ValueError(f"tokens must be 'keep', 'bfloat16', 'float32' or 'int8', not {tokens!r}")
        self.path, self.fingerprint = pathlib.Path(path), fingerprint
        self.tokens, self.flush_bytes = tokens, flush_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        reader = MemoryReader(path, fingerprint) if reader is None else reader
        reader.refresh()
        self._done = reader.contents()
        self._known = {sha256: video for video, sha256 in self._done.items()}
        remove_leftovers(self.path)
        self._writer, self._lock, self._name, self._added, self._size = None, None, None, [], 0
        self.bytes, self.flushed = 0, time.monotonic()

    def __contains__(self, video_id: str) -> bool:
        """True if the video was there when the writer was made, or has been added since."""
        return video_id in self._done

    def same_content(self, video_sha256: str) -> str | None:
        """The id under which a file of this content is there; None: nowhere. May be asked in threads."""
        video = self._known.get(video_sha256)
        return video if self._done.get(video) == video_sha256 else None

    def add(self, video_id: str, entry: MemoryEntry) -> None:
        """Adds one video; durable after the next flush. An id may be added again: the newest entry counts."""
        records = encode(video_id, entry, self.tokens)
        if self._writer is None:
            self._name = self.path / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}-{MACHINE}{SUFFIX}"
            self._lock = _locked(f"{self._name}.tmp")
            self._writer = array_record_module.ArrayRecordWriter(f"{self._name}.tmp", "group_size:1,uncompressed")
        for record in records:
            self._writer.write(record)
            self._size += len(record)
            self.bytes += len(record)
        self._added.append([video_id, entry.video_sha256])
        self._done[video_id] = entry.video_sha256
        self._known[entry.video_sha256] = video_id
        if self._size >= self.flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Completes the open shard: after this, what was added survives a crash and readers see it."""
        self.flushed = time.monotonic()
        if self._writer is None:
            return
        writer, lock, videos, temporary = self._writer, self._lock, self._added, pathlib.Path(f"{self._name}.tmp")
        self._writer, self._lock, self._added, self._size = None, None, [], 0
        index = {"version": VERSION, "fingerprint": self.fingerprint.parts, "videos": videos}
        try:
            writer.write(json.dumps(index).encode())
            writer.close()
            if _open(temporary).num_records() != 2 * len(videos) + 1:
                raise StoreError(temporary, "the shard is shorter than what was written (is the disk full?)")
            _fsync(temporary)
            os.rename(temporary, self._name)
            _fsync(self.path)
        except BaseException:
            for video, _ in videos:
                self._done.pop(video, None)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(lock)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flush()


class MemoryReader:
    """Read access by video id: `reader[video_id]`, `in`, `len`, iteration over ids. `shards`: how many were seen."""

    def __init__(self, path, fingerprint: Fingerprint | None, keep_bytes: int = 0):
        """Args:
        fingerprint: None reads any memory (to inspect it); entries are then not known to fit any model.
        keep_bytes: entries read last that stay in the machine's memory: a container reads about 0.4 GB/s.
        """
        folder, self.fingerprint = pathlib.Path(path), fingerprint
        self.path, self._shards, self.shards = folder, {}, 0  # {name: the videos of its index}
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda name: _open(folder / name))  # without self: no cycle
        self._where: dict[str, tuple[str, int, str]] = {}
        self._kept, self._keep_bytes, self._lock = collections.OrderedDict(), keep_bytes, threading.Lock()
        self.refresh()

    def refresh(self) -> bool:
        """Sees shards completed since; True if there were any."""
        if not self.path.is_dir():
            raise StoreError(self.path, "no such memory folder")
        for shard in sorted(self.path.glob(f"*{SUFFIX}")):
            if shard.name in self._shards:
                continue
            index = _index(shard, self._open(shard.name))
            found = Fingerprint(tuple((name, value) for name, value in index["fingerprint"]))
            if self.fingerprint is not None and found != self.fingerprint:
                reason = f"made by another model or other settings ({self.fingerprint.differences(found)}); {AGAIN}"
                raise StaleMemory(self.path, reason)
            self._shards[shard.name] = index["videos"]
        if len(self._shards) == self.shards:
            return False
        self.shards = len(self._shards)
        where = {}
        for name in sorted(self._shards):  # oldest first: the newest entry of a video wins
            where.update({video: (name, i, sha256) for i, (video, sha256) in enumerate(self._shards[name])})
        self._where = where
        return True

    def contents(self) -> dict[str, str]:
        """{video id: SHA-256 of its file} of everything in the memory; reads nothing."""
        return {video: sha256 for video, (_, _, sha256) in self._where.items()}

    def head(self, video_id: str) -> MemoryEntry:
        """The entry without its tokens, which are not read: an empty array [0]."""
        return self._read(video_id, (0,))

    def __getitem__(self, video_id: str) -> MemoryEntry:
        with self._lock:
            place = self._where.get(video_id)  # of the newest entry: one that was replaced is not found again
            entry = self._kept.pop(place, None) or self._read(video_id, (0, 1))
            self._kept[place] = entry
            while sum(kept.nbytes for kept in self._kept.values()) > self._keep_bytes:
                self._kept.popitem(last=False)
        return entry

    def _read(self, video_id: str, which: tuple[int, ...]) -> MemoryEntry:
        if video_id not in self._where:
            raise KeyError(f"{video_id!r} is not in the memory {self.path} ({len(self)} videos)")
        name, i, _ = self._where[video_id]
        try:
            return decode(self._open(name).read([2 * i + part for part in which]))
        except Exception as error:
            raise StoreError(self.path / name, f"video {i} ({video_id}) cannot be read: {error}") from error

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
    if not reader.num_records():
        raise StoreError(path, "damaged or cut short; remove it and index its videos again")
    try:
        index = json.loads(reader.read([reader.num_records() - 1])[0])
        version = index["version"]
    except Exception as error:
        raise StoreError(path, f"the shard's index cannot be read: {error}") from error
    if version != VERSION:
        raise StaleMemory(path, f"format version {version}, this program reads {VERSION}; {AGAIN}")
    return index


def remove_leftovers(folder) -> list[str]:
    """Removes the .tmp files of writers that are gone (a living one holds a lock; another machine's is a day old)."""
    removed = []
    for path in pathlib.Path(folder).glob(f"*{SUFFIX}.tmp"):
        mark = path.name.removesuffix(f"{SUFFIX}.tmp").split("-")[2:]
        with contextlib.suppress(OSError):  # another writer was faster, or the file system has no locks: leave it
            if mark not in ([], [MACHINE]) and time.time() - path.stat().st_mtime < 86400:
                continue
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(handle)
    return removed


def _locked(path: str) -> int:
    """A descriptor that holds the lock on a new file of this name; closing it gives the lock back."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes anything either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)  # removed between the two calls by a writer that was clearing up


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value) -> str:
    return "nothing" if value is None else value if len(value) <= 40 else f"{value[:37]}..."
