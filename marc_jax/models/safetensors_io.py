"""Reading and writing safetensors without loading them: a JSON header, then raw little-endian tensors.

Tensors are read through a memory map, so a slice costs only its own bytes. Every header is checked against the file
before any tensor is handed out.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
_LONGEST_HEADER = 10**8  # bytes; the format's own limit


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file and the tensor or the reason."""

    exit_code = 2


class File:
    """One safetensors file, memory-mapped.

    Attributes:
      path: the file.
      tensors: name -> (dtype, shape, begin, end), byte offsets in the data section.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                    raise WeightsError(f"{path}: truncated or not a safetensors file ({size} bytes)")
                header = json.loads(f.read(length))
            if not isinstance(header, dict):
                raise ValueError("header is not an object")
        except (OSError, ValueError, RecursionError) as e:
            if isinstance(e, WeightsError):
                raise
            raise WeightsError(f"{path}: not a safetensors file ({e})") from None
        header.pop("__metadata__", None)
        self._start, self._map, data = 8 + length, None, size - 8 - length
        self.tensors = {name: self._checked(name, row, data) for name, row in header.items()}
        self._check_layout(data)

    def _checked(self, name: str, row, data: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
        corrupt = WeightsError(f"{self.path}: tensor {name}: corrupt header entry")
        try:
            kind, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise corrupt from None
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
            raise corrupt
        if not isinstance(kind, str) or kind not in DTYPES:
            raise WeightsError(f"{self.path}: tensor {name} has dtype {kind}; known: {', '.join(sorted(DTYPES))}")
        if end > data:
            raise WeightsError(f"{self.path}: truncated: tensor {name} ends at byte {end} of {data}")
        if end - begin != DTYPES[kind].itemsize * math.prod(shape):
            raise WeightsError(f"{self.path}: tensor {name}: {end - begin} bytes do not hold {kind}{list(shape)}")
        return DTYPES[kind], shape, begin, end

    def _check_layout(self, data: int) -> None:
        """Every byte belongs to one tensor: a header that was tampered with, or another file's, has gaps."""
        at, before = 0, "the header"
        for name, (_, _, begin, end) in sorted(self.tensors.items(), key=lambda item: item[1][2:]):
            if begin != at:
                what = "overlaps" if begin < at else f"leaves a gap of {begin - at} bytes to"
                raise WeightsError(f"{self.path}: corrupt header: tensor {name} {what} {before}")
            at, before = end, name
        if at != data:
            raise WeightsError(f"{self.path}: {data - at} bytes after the last tensor ({before}) belong to none")

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor; bytes are fetched when touched."""
        dtype, shape, begin, end = self.tensors[name]
        if begin == end:
            return np.zeros(shape, dtype)
        if self._map is None:
            with open(self.path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8, end - begin, self._start + begin).view(dtype).reshape(shape)

    def release(self) -> None:
        """Lets go of the pages read so far; views stay valid, their bytes are fetched again when touched."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def read_index(index: pathlib.Path) -> dict[str, str]:
    """Tensor name -> shard of a weight index. Raises WeightsError: not an index, or a shard that is not there."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(name, str) for name in where.values()):
            raise ValueError("weight_map is not a table of tensor -> file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(f"{index}: not a weight index ({e!r})") from None
    paths = sorted(set(where.values()))
    for path in paths:
        if pathlib.PurePath(path).name != path:
            raise WeightsError(f"{index}: shard {path!r} is not a file of this folder")
    missing = [path for path in paths if not (index.parent / path).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent / missing[0]}: shard is missing ({len(missing)} of {len(paths)} in {index.name})"
        )
    return where


def pickles(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of a folder that look like torch pickles."""
    return sorted(path for pattern in PICKLES for path in folder.glob(pattern))


def open_folder(folder: str | os.PathLike) -> dict[str, File]:
    """Tensor name -> the file that holds it, for a folder with one file, an index and shards, or shards alone.

    Raises:
      WeightsError: no safetensors (torch pickles are refused), a missing shard, a damaged file, a tensor in two files,
        an index that lies.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if index.exists():
        where = read_index(index)
        paths = sorted(set(where.values()))
    else:
        where, paths = None, sorted(p.name for p in folder.glob("*.safetensors"))
    if not paths:
        hint = "".join(
            f"; {path.name} is a torch pickle, which a run does not read: convert it once with "
            f"python -m tools.convert_weights --source={folder} --out=CHECKPOINT"
            for path in pickles(folder)[:1]
        )
        raise WeightsError(f"{folder}: no safetensors here{hint}")
    return merged((File(folder / p) for p in paths), where)


def merged(files: Iterable, where: dict[str, str] | None) -> dict:
    """Tensor name -> file, of files with `path` and `tensors`; no tensor may be in two, `where` must be true."""
    out: dict = {}
    for file in files:
        for name in file.tensors:
            if name in out:
                raise WeightsError(f"{file.path}: tensor {name} is also in {out[name].path.name}")
            out[name] = file
    for name, path in (where or {}).items():
        if name not in out or out[name].path.name != path:
            folder = next(iter(out.values())).path.parent if out else pathlib.Path()
            raise WeightsError(f"{folder / path}: tensor {name} is missing (the index lists it)")
    return out


def write_file(path: pathlib.Path, tensors: list[tuple[str, np.dtype, tuple[int, ...]]], data: Iterator) -> None:
    """Writes one file; `data` yields (name, array) in the order of `tensors` and is consumed one at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        end = offset + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in tensors:
            got, array = next(data)
            if got != name or array.shape != shape:
                raise WeightsError(f"{path}: expected {name} {shape}, got {got} {array.shape}")
            f.write(np.ascontiguousarray(array, dtype).view(np.uint8).data)


def write_folder(folder: pathlib.Path, tensors: list, data: Iterable, shard_bytes: int = 5 * 10**9) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` with an index, streaming one tensor at a time."""
    shards, sizes = [[]], [0]
    for row in tensors:
        size = np.dtype(row[1]).itemsize * int(np.prod(row[2], dtype=np.int64))
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([]), sizes.append(0)
        shards[-1].append(row)
        sizes[-1] += size
    data, n = iter(data), len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for name, rows in zip(names, shards, strict=True):
        write_file(folder / name, rows, data)
    if n > 1:
        where = {row[0]: name for name, rows in zip(names, shards, strict=True) for row in rows}
        text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": where}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text)
