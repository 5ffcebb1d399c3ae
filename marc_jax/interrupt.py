"""Stop at a step border: the first SIGTERM or Ctrl-C asks, the second insists."""

import os
import signal
import sys
import threading

import numpy as np

from marc_jax.config import Stopped


class Interrupt:
    """Turns signals into a question the training loop asks once per step.

        with Interrupt() as interrupt:
            for step in ...:
                state, metrics = train_step(state, batch)
                if interrupt.requested():
                    checkpoint.save(...)
                    interrupt.stop(step)

    The second signal ends the process at once, whatever the main thread waits for (a compilation, a collective); a save
    that was under way leaves only a hidden folder, the earlier steps stay whole. Outside the main thread nothing is
    installed and nothing is ever requested.
    """

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.signals = signals
        self.received: int | None = None
        self._before: dict = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            heard, self._told = os.pipe()
            os.set_blocking(self._told, False)
            threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
            self._before = {number: signal.signal(number, self._handle) for number in self.signals}
            self._woken = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        os.close(self._told)  # the thread ends

    def requested(self) -> bool:
        """True once a signal has come. With several processes all answer alike in the same call (a collective)."""
        import jax

        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        received = int(np.max(multihost_utils.process_allgather(np.int32(self.received or 0))))
        if received:  # a signal that came since is not forgotten: it is told at the next step
            self.received = received
        return bool(received)

    def stop(self, step: int) -> None:
        """Raises `Stopped` after the state of `step` was saved: exit code 0 after SIGTERM, 130 after Ctrl-C.

        Step 0 is the beginning, of which there is nothing to save.
        """
        where = f"after step {step}, which is saved" if step else "before the first step of a stage"
        raise Stopped(f"stopped {where}", 130 if self.received == signal.SIGINT else 0)

    def _handle(self, number: int, _frame) -> None:
        self.received = self.received or number

    def _listen(self, heard: int) -> None:
        """In a thread: Python runs a handler only when the main thread comes back from what it calls."""
        came = 0
        while number := int.from_bytes(os.read(heard, 1), "big"):
            if number not in self.signals:
                continue
            came += 1
            if came > 1:
                # os._exit: no clean-up handler may hang. The cursor comes back, a progress bar may have hidden it.
                os.write(2, b"\x1b[?25h\nstopped at once\n" if sys.stderr.isatty() else b"\nstopped at once\n")
                os._exit(128 + number)
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        os.close(heard)
