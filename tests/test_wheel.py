"""The built wheel works from any folder, without the source tree."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_wheel_answers_from_a_foreign_folder(repo, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(repo), str(source)], check=True)
    made = [*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)]
    built = subprocess.run(made, capture_output=True, text=True)
    if "No matching distribution" in built.stderr or "No module named pip" in built.stderr:
        pytest.skip("needs pip, and a registry that has setuptools")
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("marc_jax-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    (tmp_path / "elsewhere").mkdir()
    for entry, words in (("train", "--config"), ("index", "--memory"), ("doctor", "decoding")):
        command = [sys.executable, "-m", f"marc_jax.{entry}", *([] if entry == "doctor" else ["--help"])]
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        run = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
        assert run.returncode == 0 and words in run.stdout, (entry, run.stderr[-1000:])
