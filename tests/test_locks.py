"""One process at a time, in every way a process can end."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from marc_jax import locks

REPO = pathlib.Path(__file__).resolve().parent.parent
HOLD = """
import sys
from marc_jax import locks
with locks.held(sys.argv[1], "the thing"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path):
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_of_the_first(tmp_path):
    process = hold(tmp_path / "stage" / ".lock")
    with pytest.raises(locks.LockedError, match=f"the thing is being written by process {process.pid} on ") as e:
        with locks.held(tmp_path / "stage" / ".lock", "the thing"):
            pass
    assert e.value.exit_code == 2 and "\n" not in str(e.value)
    with locks.held(tmp_path / "other" / ".lock", "another thing"):
        pass
    process.communicate("")
    with locks.held(tmp_path / "stage" / ".lock", "the thing"):
        assert (tmp_path / "stage" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / "stage" / ".lock").read_text() == ""


def test_a_killed_process_holds_nothing(tmp_path):
    process = hold(tmp_path / ".lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locks.held(tmp_path / ".lock", "the thing"):
        pass


def test_who_waits_says_for_whom(tmp_path):
    process = hold(tmp_path / ".lock")
    waiter = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace('"the thing"', '"the thing", wait=True'), str(tmp_path / ".lock")],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiter.stderr.readline().startswith(f"waiting for process {process.pid} on ")
    process.communicate("")
    assert waiter.communicate("")[0] == "held\n" and waiter.returncode == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locks.held(tmp_path / ".lock", "the thing"):
        pass
    assert "no locks on this file system; start the thing only once" in capsys.readouterr().err
