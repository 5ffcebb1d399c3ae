"""Checkpoints that are whole or absent: Orbax arrays, a SHA-256 manifest, restore onto any mesh.

One step is one folder:

    <directory>/step_00000040/tree/           arrays, an ordinary Orbax checkpoint (nested dicts of the paths)
                              meta.json       what else must resume together: data position, config, ...
                              manifest.json   size and SHA-256 of every file above, shape and dtype of every array

It is written under a hidden name, hashed, and renamed in one move, so a killed run leaves nothing that looks like a
step. Orbax itself has no checksum (8 bit flips per file in its data files: 15 of 16 restored silently wrong), hence the
manifest. A hash finds damage; it is no signature. Directories are local or shared file systems (mount a bucket).
"""

import contextlib
import errno
import functools
import json
import math
import os
import pathlib
import re
import shutil
import sys
from asyncio.log import logger as asyncio_log
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from marc_jax import manifest, streamed
from marc_jax.config import UserError
from marc_jax.paths import unflatten
from marc_jax.pending import Pending

_LARGEST_LIST = 5
_SLOWEST_SAVE = 4 * 3600  # seconds; Orbax's 20 minutes are short for 100 GB on a slow disk, now that nobody waits
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_KEY_KINDS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


# What Orbax raises is said in one line by whoever calls. Its threads would log the same with a long stack trace each,
# and asyncio those of writes that failed beside the first.
logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
asyncio_log.addFilter(lambda record: not (record.exc_info and "orbax" in record.getMessage()))


def _but_late_results(hook):
    """`hook` for all but what TensorStore's threads bring to an event loop that Orbax left at the first error."""

    def heard(told):
        if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
            hook(told)

    return heard


sys.unraisablehook = _but_late_results(sys.unraisablehook)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, trusted, or does not fit. One line for the user."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class DamagedError(CheckpointError):
    """There are steps, and none of those asked for is what was written."""


def save(
    directory, step: int, tree: Any, meta: Mapping | None = None, *, keep: int | None = 3, wait: bool = True
) -> Pending | None:
    """Writes one step; returns when it is committed, or at once with `wait=False`.

    Args:
      directory: holds the steps; made if absent.
      step: its number; an existing step of this number is replaced.
      tree: any pytree of arrays; typed PRNG keys are welcome. Copied to the host before this returns, so the caller may
        donate its buffers. `streamed.Streamed` leaves are read part by part while they are written.
      meta: JSON-serialisable; comes back from `restore`.
      keep: how many newest steps stay; None keeps all. Older ones go only after this one is committed.
      wait: with False the result is a `Pending`; wait for it before the next save and at the end. With several
        processes its end says nothing about the others': process 0 commits last.

    Raises:
      CheckpointError: disk full, directory not writable; earlier steps are untouched.
    """
    directory = _directory(directory)
    final, partial = directory / _name(step), directory / f".{_name(step)}.partial"
    leaves = _leaves(tree)
    text = json.dumps(dict(meta or {}), indent=1, sort_keys=True)
    shapes = {path: [list(np.shape(x)), str(_dtype(x))] for path, x in leaves.items()}
    with _Failure(directory, step, partial):
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / "meta.json").write_text(text, encoding="utf-8")
        _barrier(f"checkpoint_{step}_begin")
        lazy = [x for x in leaves.values() if isinstance(x, streamed.Streamed)]
        handler = streamed.handler() if lazy else ocp.PyTreeCheckpointHandler()
        writer = ocp.AsyncCheckpointer(handler, timeout_secs=_SLOWEST_SAVE)
        nested = unflatten({path: _raw(x) for path, x in leaves.items()})
        writer.save(partial / "tree", args=ocp.args.PyTreeSave(nested))

    def finish():
        with _Failure(directory, step, partial):
            with contextlib.closing(writer):
                writer.wait_until_finished()
            if jax.process_index() == 0:
                if not all(x.complete for x in lazy):
                    raise RuntimeError("Orbax did not write a streamed array chunk by chunk: unknown version")
                manifest.write(partial, {"step": step, "leaves": shapes})
                _commit(partial, final)
                _forget(directory, keep)

    pending = Pending(finish)
    if not wait:
        return pending
    pending.wait()
    _barrier(f"checkpoint_{step}_end")
    return None


def restore(
    directory, abstract: Any, step: int | None = None, *, verify: str = "full", partial: bool = False,
    cast: bool = False, config=None,
) -> tuple[Any, dict]:  # fmt: skip
    """Reads (tree, meta) of a step, placed as `abstract` says.

    Args:
      directory: as given to `save`.
      abstract: pytree of `jax.ShapeDtypeStruct` (or arrays) of the same paths; a leaf's `.sharding` says where it goes,
        whatever the mesh it was saved from; a leaf without one becomes an uncommitted array on the default device.
      step: None takes the newest step that verifies, and logs a warning for each newer one that does not.
      verify: "full" hashes every file, "size" compares sizes, "off" trusts the disk.
      partial: with True, arrays of the checkpoint that `abstract` lacks are left unread (e.g. {"params": ...} alone).
      cast: with True, floating-point arrays of another precision are converted to that of `abstract` as they are read.
      config: this run's config as a nested dict; compared with meta["config"] when the arrays do not fit.

    Raises:
      DamagedError: no step that verifies, or the step asked for does not (names the file).
      CheckpointError: no step at all, or another tree (names the first paths that differ).
    """
    directory = _directory(directory)
    candidates = [step] if step is not None else steps(directory)[::-1]
    problems = []
    for number in candidates:
        problem = check(directory, number, verify)
        if problem is None:
            try:
                return _read(directory, number, abstract, partial, cast, config)
            except CheckpointError:
                raise
            except Exception as e:  # Orbax raises many kinds on damaged files.
                problem = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        problems.append(f"step {number}: {problem}")
        if step is None:
            logging.warning("checkpoint %s is damaged, trying an older one: %s", directory, problems[-1])
    if not problems:
        raise CheckpointError(f"no checkpoint in {directory}")
    raise DamagedError(f"no usable checkpoint in {directory}: {'; '.join(problems)}")


def steps(directory) -> list[int]:
    """Numbers of the committed steps, ascending; empty where the directory is absent. Nothing is verified."""
    directory = _directory(directory)
    names = os.listdir(directory) if directory.is_dir() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def latest(directory, verify: str = "full") -> int | None:
    """The newest step that verifies, or None. Warns of newer ones that do not."""
    for step in steps(directory)[::-1]:
        problem = check(directory, step, verify)
        if problem is None:
            return step
        logging.warning("checkpoint %s is damaged: step %d: %s", directory, step, problem)
    return None


def check(directory, step: int, verify: str = "full") -> str | None:
    """What is wrong with a step, naming the file, or None. `verify`: "full", "size" or "off"."""
    folder = _directory(directory) / _name(step)
    problem = manifest.problem(folder, verify)
    if problem is None and manifest.read(folder)["step"] != step:
        return f"manifest.json is that of step {manifest.read(folder)['step']}"
    return problem


def read_meta(directory, step: int) -> dict:
    """meta of a step, without reading arrays or verifying."""
    try:
        return json.loads((_directory(directory) / _name(step) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {directory}, step {step}: meta.json: {e}") from None


def shapes(directory, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every array of a step, as its manifest has them (random keys apart).

    Raises DamagedError: the manifest cannot be trusted.
    """
    if problem := check(directory, step, "off"):
        raise DamagedError(f"checkpoint {directory}, step {step}: {problem}")
    leaves = manifest.read(_directory(directory) / _name(step))["leaves"]
    kinds = {path: kind for path, (_, kind) in leaves.items() if kind not in _KEY_KINDS}
    return {path: jax.ShapeDtypeStruct(tuple(leaves[path][0]), kind) for path, kind in kinds.items()}


def _read(directory: pathlib.Path, step: int, abstract: Any, partial: bool, cast: bool, config) -> tuple[Any, dict]:
    folder = directory / _name(step)
    meta, saved = read_meta(directory, step), manifest.read(folder)["leaves"]
    wanted = _leaves(abstract)
    if problem := _mismatch(saved, wanted, partial, cast):
        keys = _config_difference(meta.get("config"), config)
        raise CheckpointError(f"checkpoint {directory}, step {step}, does not fit: {problem}{keys}")
    items = {path: _target(x) for path, x in wanted.items()}
    args = {path: _restore_args(x) for path, x in items.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_in_flight_gb(items))) as reader:
        tree = reader.restore(
            folder / "tree",
            args=ocp.args.PyTreeRestore(unflatten(items), restore_args=unflatten(args), partial_restore=True),
        )
    values = _leaves(tree)
    placed = [_placed(values[path], x) for path, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed), meta


def _in_flight_gb(items: Mapping) -> int:
    """How much Orbax may read at once: a few of the largest parts that one device takes, so that the host holds little
    beyond the result (its default is 96 GB). Counted in 8-byte numbers: the saved ones may be wider than those wanted.
    """
    parts = [math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) for x in items.values()]
    return 1 + int(2 * 8 * max(parts, default=0) / 1e9)


def _target(x) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding to read; of a PRNG key, those of its raw data."""
    if _is_key(x):
        raw = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.ShapeDtypeStruct(raw.shape, raw.dtype)
    return jax.ShapeDtypeStruct(np.shape(x), _dtype(x), sharding=getattr(x, "sharding", None))


def _restore_args(x: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def _placed(value, x):
    sharding = getattr(x, "sharding", None)
    if _is_key(x):
        return _key_maker(_KEY_KINDS[str(x.dtype)], sharding)(value if sharding is not None else np.asarray(value))
    return value if sharding is not None else jax.numpy.asarray(value)


@functools.cache
def _key_maker(kind: str, sharding):
    wrap = functools.partial(jax.random.wrap_key_data, impl=kind)
    # jit, since device_put cannot place a key on the devices of other processes.
    return wrap if sharding is None else jax.jit(wrap, out_shardings=sharding)


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(_dtype(x), jax.dtypes.prng_key)


def _dtype(x):
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _raw(x):
    if _is_key(x):
        return jax.random.key_data(x)
    return x if isinstance(x, jax.Array | streamed.Streamed) else np.asarray(x)


def _leaves(tree: Any) -> dict[str, Any]:
    """path -> leaf; "params/text/embed/embedding", the same for flat and nested dicts."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
    if len(leaves) != len(flat):
        raise ValueError("two leaves of the tree have the same path")
    return leaves


def _mismatch(saved: Mapping, wanted: Mapping, partial: bool, cast: bool) -> str | None:
    here = {path: [list(np.shape(x)), str(_dtype(x))] for path, x in wanted.items()}
    if cast:
        for path in here.keys() & saved.keys():
            if saved[path][1] in _FLOATS and here[path][1] in _FLOATS:
                here[path][1] = saved[path][1]
    different = [
        f"{path} is {_shape(saved[path])} in the checkpoint, {_shape(here[path])} in this run"
        for path in here
        if path in saved and saved[path] != here[path]
    ]
    absent = [f"{path} is not in the checkpoint" for path in here if path not in saved]
    surplus = [] if partial else [f"{path} is only in the checkpoint" for path in saved if path not in here]
    problems = different + absent + surplus
    if not problems:
        return None
    more = len(problems) - _LARGEST_LIST
    return "; ".join(problems[:_LARGEST_LIST]) + (f"; and {more} more" if more > 0 else "")


def _shape(leaf: list) -> str:
    return f"{leaf[1]}{leaf[0]}"


def _config_difference(saved, here) -> str:
    if not isinstance(saved, Mapping) or here is None:
        return ""
    a, b = _flat(saved), _flat(json.loads(json.dumps(here, default=str)))
    keys = [f"{key} was {a.get(key)!r}, is {b.get(key)!r}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return f". Config keys that differ: {'; '.join(keys[:_LARGEST_LIST])}" if keys else ""


def _flat(config: Mapping, prefix: str = "config.") -> dict:
    values = {}
    for key, value in config.items():
        values.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return values


def _commit(partial: pathlib.Path, final: pathlib.Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    manifest.flush_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _forget(directory: pathlib.Path, keep: int | None) -> None:
    """Removes all but the newest `keep` steps, each under a hidden name first."""
    for step in steps(directory)[:-keep] if keep else []:
        old = directory / f".{_name(step)}.old"
        (directory / _name(step)).rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _directory(directory) -> pathlib.Path:
    if "://" in str(directory):
        raise CheckpointError(f"checkpoint directory {directory}: not a path (mount the bucket and give its path)")
    return pathlib.Path(directory).absolute()


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class _Failure:
    """Turns what goes wrong while saving into one line, and takes the half-written step away."""

    def __init__(self, directory: pathlib.Path, step: int, partial: pathlib.Path):
        self.directory, self.step, self.partial = directory, step, partial

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None:
            return
        gone = not self.partial.exists()
        if jax.process_index() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        number, text = getattr(error, "errno", None), str(error)
        if told := re.search(r"os_error_code='(\d+)'", text):  # of TensorStore, which raises ValueError
            number = int(told[1])
        if number in (errno.ENOSPC, errno.EDQUOT) or "RESOURCE_EXHAUSTED" in text or "No space left" in text:
            reason = "no space left on the disk"
        elif number and number != errno.ENOENT:
            reason = os.strerror(number)
        elif gone and isinstance(error, Exception):
            reason = "its folder was removed while it was written"
        elif isinstance(error, OSError | ValueError):
            reason = " ".join(text.split())[:300]
        else:
            return
        good = steps(self.directory)
        rest = f"step {good[-1]} is intact; run the same command again to resume from it" if good else "no earlier step"
        message = f"checkpoint {self.directory}, step {self.step}, was not saved: {reason}; {rest}"
        raise CheckpointError(message, exit_code=1) from error
