"""One process at a time: a lock file that the kernel lets go of when its holder dies, however it dies."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

from marc_jax.config import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


class LockedError(UserError):
    """Another process is at work there; the message names it."""


@contextlib.contextmanager
def held(path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` (made if absent, never removed) until the block ends.

    Args:
      path: a file that serves nothing else; it names the process that holds it.
      what: what is locked, for the message: "stage 'sft' in runs/quickstart".
      wait: with True, says whom it waits for and waits.

    Raises:
      LockedError: another process holds it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock(file, what, wait)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            print(f"warning: {path}: no locks on this file system; start {what} only once", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file, what: str, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        if not wait:
            raise LockedError(f"{what} is being written by {holder}; wait for it or stop it") from None
        print(f"waiting for {holder}, which writes {what}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
