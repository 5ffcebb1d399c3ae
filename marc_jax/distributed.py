"""Several processes as one run: how they join, and how each learns at once that another has died.

    python -m marc_jax.train ... --coordinator=HOST:PORT --processes=2 --process=0     # and --process=1 elsewhere
    python -m marc_jax.train ... --coordinator=auto                                    # TPU pod, Slurm, Open MPI, ...

A process that dies leaves the others inside a collective that never ends; jax notices after 100 s and aborts with a
stack trace. Here every process keeps a connection to process 0: when one closes without a word, or is silent for
`timeout` seconds, everybody ends with one line and exit code 1. Steps that were saved stay; the same commands resume.
"""

import atexit
import contextlib
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from marc_jax.config import ConfigError, Stopped, UserError

BEAT = 1.0  # seconds between two signs of life
JOIN = 300.0  # seconds until all processes must have come
_ALIVE, _BYE, _GONE = b"a", b"b", b"g"  # one byte; after _GONE comes the process's number in two


@contextlib.contextmanager
def joined(coordinator: str, processes: int = 0, process: int = -1, *, timeout: float = 30.0) -> Iterator[None]:
    """Joins this process to the run until the block ends; call before anything else touches jax.

    Args:
      coordinator: "HOST:PORT" of process 0, which must be free there; "auto" where the cluster says it all; "" for a
        run of one process, which changes nothing.
      processes, process: how many there are, and which one this is, from 0. Unused with "auto".
      timeout: how long another process may be silent before it counts as dead.

    Raises:
      ConfigError: arguments that cannot be. Where the others do not come within JOIN seconds the process ends.
    """
    if not coordinator:
        if processes or process != -1:
            raise ConfigError("--processes and --process need --coordinator=HOST:PORT")
        yield
        return
    _initialize(coordinator, processes, process)
    with _Watch(coordinator, timeout) as watch:
        try:
            yield
        except Stopped:  # all of them stop, after the same step
            watch.leave()
            raise
        except BaseException as error:
            # A dead process breaks the collectives of the others: then it is what this error should be about.
            if not isinstance(error, UserError):
                time.sleep(2 * BEAT)
            code = getattr(error, "exit_code", 1)
            atexit.register(_leave, code if isinstance(code, int) else 1)
            raise
        watch.leave()


def _initialize(coordinator: str, processes: int, process: int) -> None:
    # Set whatever the platform is: only a CPU's collectives read it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator == "auto":
        told = {}
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"--coordinator={coordinator}: HOST:PORT of process 0, or auto")
        if not 0 <= process < processes:
            raise ConfigError(f"--process={process} of --processes={processes}: from 0 to one below their number")
        told = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    # jax itself would abort with a stack trace.
    late = threading.Timer(JOIN, _never, [f"not all processes came to {coordinator} within {JOIN:g} s"])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**told, initialization_timeout=int(JOIN) + 60)
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ConfigError(f"--coordinator={coordinator}: cannot join the run: {reason}") from None
    finally:
        late.cancel()


def _never(why: str) -> None:
    os.write(2, f"error: --coordinator: {why}; is the same command running for every --process?\n".encode())
    _leave(2)


def _leave(code: int) -> None:
    """Ends the process before jax waits for the others, of which this one will not hear again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exchanged(value) -> list:
    """The JSON value of each process, by process. A collective: every process waits here for all others."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size))
    rows = multihost_utils.process_allgather(np.pad(own, (0, sizes.max() - own.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


class _Watch:
    """A thread per process that beats, listens, and ends the process when another is gone."""

    def __init__(self, coordinator: str, timeout: float):
        self.timeout, self.me, self.all = timeout, jax.process_index(), jax.process_count()
        self.peers: dict[int, socket.socket] = {}
        self.left = False
        if self.all == 1:
            return
        host = socket.gethostname() if coordinator == "auto" else coordinator.rpartition(":")[0]
        with socket.create_server(("", 0), backlog=self.all) as server:  # only that of process 0 is used
            told = (*_address(host), server.getsockname()[1], secrets.randbits(31))
            *address, port, token = multihost_utils.broadcast_one_to_all(np.array(told, np.int32)).tolist()
            if self.me == 0:
                self._accept(server, token)
            else:
                peer = socket.create_connection((".".join(map(str, address)), port), timeout=self.timeout)
                peer.sendall(np.array([token, self.me], np.int32).tobytes())
                self.peers[0] = peer
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def _accept(self, server: socket.socket, token: int) -> None:
        server.settimeout(self.timeout)
        while len(self.peers) < self.all - 1:
            try:
                peer, _ = server.accept()
                peer.settimeout(self.timeout)
                said, who = np.frombuffer(peer.recv(8, socket.MSG_WAITALL), np.int32)
            except (OSError, ValueError):
                absent = sorted({*range(1, self.all)} - {*self.peers})
                raise ConfigError(f"process {absent[0]} of {self.all} did not come within {self.timeout:g} s") from None
            if said == token:
                self.peers[int(who)] = peer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True

    def leave(self) -> None:
        """This process is done, and well."""
        self.left = True
        for peer in list(self.peers.values()):  # the thread takes out those that have left
            _send(peer, _BYE)

    def _run(self) -> None:
        heard = dict.fromkeys(self.peers, time.monotonic())
        beaten = 0.0
        while self.peers and not self.left:
            if time.monotonic() - beaten >= BEAT:
                beaten = time.monotonic()
                for peer in self.peers.values():
                    _send(peer, _ALIVE)
            ready = select.select(list(self.peers.values()), [], [], BEAT / 2)[0]
            for who, peer in list(self.peers.items()):
                said = _receive(peer) if peer in ready else None
                if said is None:
                    if time.monotonic() - heard[who] > self.timeout:
                        self._end(who, f"gave no sign of life for {self.timeout:g} s")
                elif _GONE in said:
                    at = said.index(_GONE)
                    self._end(int.from_bytes(said[at + 1 : at + 3], "big"), "is gone, says process 0")
                elif _BYE in said:
                    del self.peers[who]
                elif not said:
                    self._end(who, "is gone")
                else:
                    heard[who] = time.monotonic()

    def _end(self, who: int, how: str) -> None:
        if self.left:
            return
        for other, peer in self.peers.items():
            if other != who:
                _send(peer, _GONE + who.to_bytes(2, "big"))
        line = f"\nerror: process {who} of {self.all} {how}; its own output says why. Process {self.me} stops: steps "
        line += "that were saved are complete, and the same command in every process resumes from the newest\n"
        os.write(2, line.encode())
        _leave(1)


def _address(host: str) -> list[int]:
    try:
        return [int(part) for part in socket.gethostbyname(host).split(".")]
    except OSError as e:
        raise ConfigError(f"--coordinator: no address of {host}: {e.strerror}") from None


def _send(peer: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):  # what is wrong with it shows when it is read
        peer.sendall(message)


def _receive(peer: socket.socket) -> bytes:
    """What was said; b"" when the connection is gone."""
    try:
        return peer.recv(4096)
    except OSError:
        return b""
