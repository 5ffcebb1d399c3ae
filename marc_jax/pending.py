"""Work in a thread of its own, and its error where it is asked for."""

import threading
from collections.abc import Callable


class Pending:
    """Work under way, e.g. a save: `wait()` returns when it is done, or raises what went wrong."""

    def __init__(self, finish: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(finish,), name="checkpoint")
        self._thread.start()

    def _run(self, finish) -> None:
        try:
            finish()
        except BaseException as e:
            self._error = e

    def check(self) -> None:
        """Raises (once) what went wrong, if it has already; does not wait."""
        if not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Blocks until the work is done; raises (once) what went wrong."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
