"""One video's memory, and the two records that it is on disk (`store`).

A record is 4 bytes little-endian header length, a JSON header (format version, video id, array names, dtypes, shapes),
then the arrays' raw bytes. The first holds everything but the tokens, so that events are searched without reading one.
"""

import dataclasses
import json

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16")
import numpy as np

VERSION = 2  # 1: one record per video, no content hashes in the index


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

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in ARRAYS)


HEAD = ("seconds", "event_spans", "event_seconds", "event_embeddings")
ARRAYS = (*HEAD, "tokens")


def encode(video_id, entry: MemoryEntry, tokens: str) -> tuple[bytes, bytes]:
    """The two records of a video."""
    spans, t = np.asarray(entry.event_spans), len(entry.tokens)
    if len(entry.seconds) != t or spans.shape[1:] != (2,) or (spans.size and (spans.min() < 0 or spans.max() > t)):
        raise ValueError(f"{video_id}: {t} patches of tokens, {len(entry.seconds)} seconds, spans {spans.tolist()}")
    if not len(entry.event_embeddings) == len(entry.event_seconds) == len(spans):
        raise ValueError(f"{video_id}: {len(spans)} events, {len(entry.event_embeddings)} embeddings")
    arrays = {name: np.ascontiguousarray(getattr(entry, name)) for name in ARRAYS}
    stored = {"tokens": arrays.pop("tokens")}
    if tokens == "int8":
        value = stored["tokens"].astype(np.float32)
        scale = np.max(np.abs(value), axis=-1, keepdims=True) / 127
        stored["tokens"] = np.rint(value / np.maximum(scale, 1e-30)).astype(np.int8)
        stored["scale"] = scale.astype(np.float32)
    elif tokens != "keep":
        stored["tokens"] = stored["tokens"].astype(tokens)
    about = {"version": VERSION, "video": video_id}
    rest = {"video_sha256": entry.video_sha256, "grid": list(entry.grid), "extra": entry.extra}
    return _pack(about | rest, arrays), _pack(about, stored)


def _pack(header: dict, arrays: dict) -> bytes:
    head = json.dumps(header | {"arrays": [[name, a.dtype.name, a.shape] for name, a in arrays.items()]}).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *(a.tobytes() for a in arrays.values())])


def _unpack(record: bytes) -> tuple[dict, dict]:
    start = 4 + int.from_bytes(record[:4], "little")
    header, arrays = json.loads(record[4:start]), {}
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(record, np.dtype(dtype), count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return header, arrays


def decode(records: list[bytes]) -> MemoryEntry:
    """From the first record of a video, or from both."""
    header, arrays = _unpack(records[0])
    for record in records[1:]:
        arrays |= _unpack(record)[1]
    scale = arrays.pop("scale", None)
    if scale is not None:
        arrays["tokens"] = arrays["tokens"].astype(np.float32) * scale
    return MemoryEntry(header["video_sha256"], grid=tuple(header["grid"]), extra=header["extra"],
                       **{"tokens": np.zeros(0, np.float32)} | arrays)  # fmt: skip
