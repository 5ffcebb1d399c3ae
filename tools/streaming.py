"""Published weights -> step 0 of a checkpoint, chunk by chunk: what the converters of large models share."""

import contextlib
import pathlib
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def save(
    folder: pathlib.Path, assemble: Callable, meta: dict, dtype: str, *, layered: Callable[[str], bool],
    release: Callable[[], None] = lambda: None, progress: Callable = lambda path, done, total: None,
) -> int:  # fmt: skip
    """Saves {"params": ...} as step 0 of checkpoint `folder`; returns the number of parameters.

    Args:
      assemble: (make) -> nested dict of leaves make(path, shape, piece), e.g. `weights.assemble`.
      meta: of the checkpoint, see `checkpoint.save`.
      dtype: of the result, one of `DTYPES`.
      layered: whether a path's axis 0 is layers.
      release: called after each part; lets go of the source's pages.
      progress: called after each part with (parameter, parameters written so far, all).
    Raises CheckpointError as `checkpoint.save`; interrupted, it returns when the writer is at rest.
    """
    from marc_jax import checkpoint
    from marc_jax.streamed import Streamed

    done, total, stopped = 0, 0, False

    def stream(path, shape, piece):
        def part(index):
            nonlocal done
            if stopped:
                raise InterruptedError(f"{folder}: interrupted")
            numbers = piece(index).astype(DTYPES[dtype])
            release()
            done += numbers.size
            progress(path, done, total)
            return numbers

        return Streamed(shape, DTYPES[dtype], part, layered=layered(path))

    params = assemble(stream)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    pending = checkpoint.save(folder, 0, {"params": params}, meta, wait=False)
    try:
        pending.wait()
    except BaseException:
        stopped = True  # the writer must be at rest before its folder is removed
        with contextlib.suppress(BaseException):
            pending.wait()
        raise
    return done
