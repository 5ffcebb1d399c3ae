"""Where the time of a compiled function goes on the device: its kernels by total time, from a jax.profiler trace."""

import collections
import pathlib
import re
import tempfile

import jax


def kernels(run, calls: int = 1) -> list[tuple[str, float, int]]:
    """Runs `run()` so often under the profiler; -> (kernel, milliseconds per call, launches per call), longest first.

    Kernels that differ by a trailing number count as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(run())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        spent, count = collections.Counter(), collections.Counter()
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for lane in plane.lines:
                if not lane.name.startswith("Stream"):
                    continue
                for event in lane.events:
                    name = re.sub(r"[._]\d+$", "", event.name)
                    spent[name] += event.duration_ns / 1e6
                    count[name] += 1
    return [(name, ms / calls, count[name] // calls) for name, ms in spent.most_common()]


def table(rows, top: int = 12) -> str:
    total = sum(ms for _, ms, _ in rows)
    lines = [f"    {ms:9.3f} ms {ms / total:6.1%} {n:6d} x  {name[:90]}" for name, ms, n in rows[:top]]
    return "\n".join([f"    {total:9.3f} ms in {sum(n for *_, n in rows)} kernels", *lines])
