"""What transformers measures beside us, in a process of its own, so that neither holds the other's memory."""

import json
import subprocess
import sys
import threading


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
