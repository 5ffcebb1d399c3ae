import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from marc_jax import doctor


def pretend(monkeypatch, **versions):
    """Only these distributions are installed (underscores for dashes)."""

    def version(name):
        if (key := name.replace("-", "_")) in versions:
            return versions[key]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_sound_installation_decodes_its_own_video():
    results = doctor.diagnose({name: doctor.CHECKS[name] for name in ("python", "devices", "opencv", "decoding")})
    assert all(sound for sound, _ in results.values()), results
    assert "8 x cpu" in results["devices"][1]
    assert "32 frames, right with PyAV" in results["decoding"][1]


def test_two_opencv_wheels_are_named_with_the_cure(monkeypatch):
    pretend(monkeypatch, opencv_python="4.14.0.94", opencv_python_headless="4.14.0.94")
    with pytest.raises(doctor.Problem, match="pip uninstall -y opencv-python opencv-python-headless && pip install"):
        doctor.check_opencv()


def test_an_opencv_without_av1_is_named(monkeypatch):
    monkeypatch.setattr("cv2.__version__", "5.0.0")
    with pytest.raises(doctor.Problem, match="5.0.0: 5.0 opens AV1 files and returns no frame"):
        doctor.check_opencv()


def test_the_other_scenic_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(doctor.Problem, match="Berkeley scenario language.*google-research/scenic@"):
        doctor.check_scenic()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "scenic" else None)
    assert doctor.check_scenic() == "google-research/scenic"


def test_absent_and_outdated_packages_are_named(monkeypatch):
    asked = [
        "jax>=0.10.2,<0.13",
        "av>=16",
        "rich>=13",
        'torch>=2; extra == "parity"',
        "opencv-python-headless>=4.11,<5",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    pretend(monkeypatch, jax="0.9.0", rich="15.0.0", opencv_python="4.14.0.94")
    with pytest.raises(doctor.Problem) as e:
        doctor.check_versions()
    assert "jax is 0.9.0, needs <0.13,>=0.10.2; av is absent, needs >=16" in str(e.value)
    assert "rich" not in str(e.value) and "torch" not in str(e.value) and "opencv" not in str(e.value)


def test_a_check_that_breaks_is_a_finding_not_a_crash():
    assert doctor.diagnose({"odd": lambda: 1 / 0}) == {"odd": (False, "ZeroDivisionError: division by zero")}


def test_the_command_prints_a_line_per_check(repo):
    done = subprocess.run([sys.executable, "-m", "marc_jax.doctor"], cwd=repo, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(doctor.CHECKS) and "Traceback" not in done.stderr
    assert done.returncode == ("WRONG" in done.stdout)
