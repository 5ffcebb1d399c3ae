"""Torch checkpoints (`pytorch_model.bin`, its shards, `.pt`, `.pth`) as files of tensors, for conversion only.

A pickle can run code when it is read. Here only torch's weights_only loading reads it, which builds tensors and plain
containers and refuses everything else; a run never reads one at all.
"""

import pathlib
import pickle

import ml_dtypes
import numpy as np

from marc_jax.models import safetensors_io
from marc_jax.models.safetensors_io import WeightsError

# What trainers leave beside the weights; these hold more than tensors.
_OTHER = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
INDEX = "pytorch_model.bin.index.json"


def load(path: pathlib.Path, *, mmap: bool = True) -> dict:
    """The table of a pickle: name -> torch tensor (or other plain content, which `File` refuses).

    It may lie under "state_dict" or "weights", as trainers write it.

    Args:
      mmap: map the file; needs torch >= 1.6's format.
    Raises:
      WeightsError: no torch, more than tensors in it, damaged, or no table.
    """
    torch = _torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        reason = " ".join(str(e).split("\n\n")[0].split())[:200]
        raise WeightsError(f"{path}: refused, it is more than tensors ({reason})") from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise WeightsError(f"{path}: not a torch checkpoint of torch >= 1.6, or damaged ({reason})") from None
    for key in ("state_dict", "weights"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds {type(state).__name__}, not a table of tensors")
    return state


class File:
    """One pickle, memory-mapped; the interface of `safetensors_io.File`.

    Attributes:
      path: the file.
      tensors: name -> (dtype, shape).
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._torch = _torch(path)
        self._dtypes = {
            self._torch.float64: np.dtype(np.float64),
            self._torch.float32: np.dtype(np.float32),
            self._torch.float16: np.dtype(np.float16),
            self._torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
        }
        self._state = {str(name): self._checked(name, tensor) for name, tensor in load(path).items()}
        self.tensors = {name: (self._dtypes[t.dtype], tuple(t.shape)) for name, t in self._state.items()}

    def _checked(self, name, tensor):
        if not isinstance(tensor, self._torch.Tensor):
            raise WeightsError(f"{self.path}: {name} is {type(tensor).__name__}, not a tensor")
        if tensor.layout != self._torch.strided or tensor.dtype not in self._dtypes:
            kind = tensor.dtype if tensor.layout == self._torch.strided else tensor.layout
            raise WeightsError(f"{self.path}: tensor {name} has dtype {str(kind).removeprefix('torch.')}")
        return tensor.detach()

    def read(self, name: str) -> np.ndarray:
        """One tensor; a view of the file where torch has it so."""
        tensor, dtype = self._state[name].contiguous(), self.tensors[name][0]
        if dtype == ml_dtypes.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(dtype)
        return tensor.numpy()

    def release(self) -> None:
        """Pages belong to torch's map; the system takes them back under pressure."""


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path}: a torch pickle, and torch is not installed; install torch, or take the safetensors of this model"
        ) from None
    return torch


def open_folder(folder: pathlib.Path) -> dict[str, File]:
    """Tensor name -> file, for a folder with one pickle, or an index and shards; errors as for safetensors."""
    where = None
    if (folder / INDEX).exists():
        where = safetensors_io.read_index(folder / INDEX)
        paths = [folder / name for name in sorted(set(where.values()))]
    else:
        found = safetensors_io.pickles(folder)
        paths = [path for path in found if path.name.startswith("pytorch_model")]
        paths = paths or [path for path in found if not path.name.startswith(_OTHER)] or found
    return safetensors_io.merged((File(path) for path in paths), where)
