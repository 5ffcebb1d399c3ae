"""How long calls take on this device: after a warm-up, each waited for; several take turns."""

import statistics
import time
from collections.abc import Callable, Mapping


def seconds_in_turn(
    calls: Mapping[str, Callable], repeats: int, *, warmup: int = 1, wait: Callable | None = None
) -> dict[str, list[float]]:
    """Name -> seconds of `repeats` calls, host dispatch included; in turn, so a busy machine slows all of them alike.

    Args:
      warmup: calls of each before, not timed.
      wait: called with what a call returns, until its device is done; default jax.block_until_ready.
    """
    if wait is None:
        import jax  # here: some benchmarks choose their CPU cores before jax is loaded

        wait = jax.block_until_ready
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            wait(call())
            if turn >= warmup:
                spent[name].append(time.perf_counter() - begun)
    return spent


def milliseconds(call: Callable, repeats: int, **how) -> list[float]:
    """Of every call of one function; arguments as `seconds_in_turn`."""
    return [1e3 * seconds for seconds in seconds_in_turn({"": call}, repeats, **how)[""]]


def median_ms(call: Callable, repeats: int, **how) -> float:
    """The median of `milliseconds`."""
    return statistics.median(milliseconds(call, repeats, **how))
