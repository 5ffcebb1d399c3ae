"""Joining a run of several processes: what cannot be is said at once. How they end is in tests/tools/test_faults.py."""

import subprocess
import sys

import pytest

from marc_jax import distributed
from marc_jax.config import ConfigError


def test_one_process_needs_nothing():
    with distributed.joined(""):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", 2, 0), "need --coordinator"),
        (("here", 2, 0), "--coordinator=here: HOST:PORT"),
        ((":80", 2, 0), "HOST:PORT"),
        (("here:http", 2, 0), "HOST:PORT"),
        (("here:80", 2, 2), "--process=2 of --processes=2"),
        (("here:80", 0, -1), "--process=-1 of --processes=0"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, words):
    with pytest.raises(ConfigError, match=words) as e:
        with distributed.joined(*arguments):
            pass
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_without_end(repo, process):
    code = (
        "from marc_jax import distributed\ndistributed.JOIN = 2.0\n"
        f"with distributed.joined('127.0.0.1:1', 2, {process}): pass"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "not all processes came to 127.0.0.1:1 within 2 s" in run.stderr, run.stderr
