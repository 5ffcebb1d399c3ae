"""A folder that appears whole or not at all, also when the process that makes it is killed."""

import contextlib
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator

from marc_jax import locks
from marc_jax.models.safetensors_io import WeightsError


@contextlib.contextmanager
def whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty folder to fill; at the end it becomes `out`, after an error it is removed.

    SIGTERM counts as an error. The folder lies beside `out` under one hidden name, locked: what a killed process left
    there is removed by the next one, and two at once are an error.

    Raises:
      WeightsError: `out` is there already, or somebody is writing it now.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out}: exists and is not empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch, lock = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.lock")
    with _sigterm_is_an_exception(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(lock, str(out)))
        except locks.LockedError as e:
            raise WeightsError(str(e)) from None
        try:
            if scratch.exists():
                print(f"removing {scratch}, left by a run that was killed", file=sys.stderr)
                shutil.rmtree(scratch)
            scratch.mkdir()
            yield scratch
            if out.exists():
                out.rmdir()
            scratch.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _sigterm_is_an_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, where signals can be handled (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
