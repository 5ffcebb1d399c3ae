"""What transformers measures beside us, in a process of its own, so that neither holds the other's memory."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable


def measured(module: str, flags: list[str], seconds: float) -> dict:
    """Rows of `python -m module`, which prints after each of them all it has so far as one line of JSON.

    It is stopped after so many seconds; then the rows it has count. None: {} and a line on stderr.
    """
    with subprocess.Popen([sys.executable, "-m", module, *flags], stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        lines = process.stdout.read().strip().splitlines()
        timer.cancel()
    if not lines:
        print("transformers measured nothing; its column stays empty", file=sys.stderr)
    return json.loads(lines[-1]) if lines else {}


def report(rows: Iterable[tuple[str, str, Callable[[], Iterable]]]) -> None:
    """The other side of `measured`: after each row all so far as a line of JSON, and the row on stderr.

    Args:
      rows: (key, title, a function whose results are the row's figures, better ones later). A row that fails keeps
        the figures it has, and the others are measured.
    """
    out = {}
    for key, title, measure in rows:
        try:
            for figures in measure():
                out[key] = figures
                print(f"transformers: {title}: {figures}", file=sys.stderr, flush=True)
                print(json.dumps(out), flush=True)
        except Exception as e:
            print(f"transformers: {title}: {type(e).__name__}: {str(e)[:300]}", file=sys.stderr, flush=True)
