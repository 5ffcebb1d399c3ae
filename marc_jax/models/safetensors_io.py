"""Reading and writing safetensors without loading them: a JSON header, then raw little-endian tensors.

Tensors are read through a memory map, so a slice costs only its own bytes. Every header is checked against the file
before any tensor is handed out.
"""

import json
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


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit; the message names the file and the tensor or the reason."""


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
                if size < 8 or length > size - 8:
                    raise WeightsError(f"{path}: truncated or not a safetensors file ({size} bytes)")
                header = json.loads(f.read(length))
            if not isinstance(header, dict):
                raise ValueError("header is not an object")
        except (OSError, ValueError, RecursionError) as e:
            if isinstance(e, WeightsError):
                raise
            raise WeightsError(f"{path}: not a safetensors file ({e})") from None
        header.pop("__metadata__", None)
        self._start, data = 8 + length, size - 8 - length
        self.tensors = {name: self._checked(name, row, data) for name, row in header.items()}
        self._bytes = None

    def _checked(self, name: str, row, data: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
        try:
            kind, shape, (begin, end) = row["dtype"], tuple(int(n) for n in row["shape"]), row["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{self.path}: tensor {name}: corrupt header entry") from None
        if kind not in DTYPES:
            raise WeightsError(f"{self.path}: tensor {name} has dtype {kind}; known: {sorted(DTYPES)}")
        if not 0 <= begin <= end or min(shape, default=0) < 0:
            raise WeightsError(f"{self.path}: tensor {name}: corrupt header entry")
        if end > data:
            raise WeightsError(f"{self.path}: truncated: tensor {name} ends at byte {end} of {data}")
        if end - begin != DTYPES[kind].itemsize * int(np.prod(shape, dtype=np.int64)):
            raise WeightsError(f"{self.path}: tensor {name}: {end - begin} bytes do not hold {kind}{list(shape)}")
        return DTYPES[kind], shape, begin, end

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor; bytes are fetched when touched."""
        dtype, shape, begin, end = self.tensors[name]
        if begin == end:
            return np.zeros(shape, dtype)
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        return self._bytes[self._start + begin : self._start + end].view(dtype).reshape(shape)


def open_folder(folder: str | os.PathLike) -> dict[str, File]:
    """Tensor name -> the file that holds it, for a folder with one file, an index and shards, or shards alone.

    Raises:
      WeightsError: no safetensors, a missing shard, a damaged file, a tensor in two files, an index that lies.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if index.exists():
        try:
            where = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise WeightsError(f"{index}: not a weight index ({e!r})") from None
        paths = sorted(set(where.values()))
        missing = [p for p in paths if not (folder / p).is_file()]
        if missing:
            raise WeightsError(f"{folder / missing[0]}: shard is missing ({len(missing)} of {len(paths)} in {INDEX})")
    else:
        where, paths = None, sorted(p.name for p in folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        hint = f"; {pickles[0]} is a torch pickle, which is not read" if pickles else ""
        raise WeightsError(f"{folder}: no safetensors here{hint}")
    out: dict[str, File] = {}
    for file in (File(folder / p) for p in paths):
        for name in file.tensors:
            if name in out:
                raise WeightsError(f"{file.path}: tensor {name} is also in {out[name].path.name}")
            out[name] = file
    if where is not None:
        for name, path in where.items():
            if name not in out or out[name].path.name != path:
                raise WeightsError(f"{folder / path}: tensor {name} is missing (listed in {INDEX})")
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
