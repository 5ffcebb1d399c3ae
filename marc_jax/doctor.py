"""Is this installation sound? `python -m marc_jax.doctor` prints what it found; exit code 1 if something is wrong.

Versions against what marc_jax asks for, devices, which OpenCV, which Scenic, and a video written and decoded again.
"""

import importlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import sys
import tempfile
from collections.abc import Callable

import numpy as np

PYTHON = ((3, 11), (3, 13))
FRAMES, SIZE, BITS = 32, (96, 128), 8


class Problem(Exception):
    """What is wrong, and what to do about it."""


def check_python() -> str:
    """The interpreter is one that is tested."""
    text = f"Python {platform.python_version()}, {platform.platform()}"
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        raise Problem(f"{text}: marc_jax needs 3.11 or 3.12")
    return text


def check_versions() -> str:
    """Every requirement of the base is installed in its range."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("marc_jax") or []
    except importlib.metadata.PackageNotFoundError:
        raise Problem("marc_jax is not installed here: pip install -e . (or run `make quickstart`)") from None
    found, wrong = [], []
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None and requirement.name == "opencv-python-headless" and _version("opencv-python"):
            continue  # The other wheel brings the same cv2; check_opencv reports it.
        found.append(f"{requirement.name} {version}")
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version or 'absent'}, needs {requirement.specifier}")
    if wrong:
        raise Problem("; ".join(wrong) + ". Install with the file requirements/constraints-py3*.txt of your Python")
    return ", ".join(found)


def check_devices() -> str:
    """JAX starts and computes."""
    import jax

    try:
        devices = jax.devices()
        total = int(jax.jit(lambda x: x.sum())(np.arange(5)))
    except Exception as e:
        raise Problem(f"jax cannot use its backend: {' '.join(str(e).split())[:300]}") from None
    if total != 10:
        raise Problem(f"sum(0..4) gave {total} on {devices[0]}")
    kinds = {kind: sum(d.device_kind == kind for d in devices) for kind in sorted({d.device_kind for d in devices})}
    return ", ".join(f"{n} x {kind}" for kind, n in kinds.items()) + f" ({jax.default_backend()})"


def check_opencv() -> str:
    """One OpenCV wheel, one that decodes what it opens."""
    names = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
    wheels = {name: _version(name) for name in names if _version(name)}
    if len(wheels) > 1:
        both = ", ".join(f"{name} {version}" for name, version in wheels.items())
        raise Problem(
            f"several OpenCV wheels own the one folder cv2 ({both}): removing either breaks the other. "
            f"pip uninstall -y {' '.join(wheels)} && pip install 'opencv-python-headless>=4.11,<5'"
        )
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as e:
        raise Problem(
            f"import cv2 failed: {e}. pip install --force-reinstall 'opencv-python-headless>=4.11,<5'"
        ) from None
    text = f"{next(iter(wheels), 'cv2')} {cv2.__version__}"
    if int(cv2.__version__.split(".")[0]) >= 5:
        raise Problem(
            f"{text}: 5.0 opens AV1 files and returns no frame. pip install 'opencv-python-headless>=4.11,<5'"
        )
    return text


def check_scenic() -> str:
    """Not the other Scenic: the name on PyPI is a scenario language of Berkeley's."""
    if importlib.util.find_spec("scenic") is None:
        return "not installed (optional)"
    if importlib.util.find_spec("scenic.syntax") is not None:
        raise Problem(
            "the installed `scenic` is the Berkeley scenario language, not google-research/scenic. "
            'pip uninstall scenic; pip install --no-deps "scenic @ git+https://github.com/google-research/scenic@4a38d47"'
        )
    return "google-research/scenic"


def check_decoding() -> str:
    """A video written here comes back frame for frame from both decoders."""
    import av
    import cv2

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "selftest.mp4"
        _write_video(path)
        with av.open(str(path)) as container:
            pyav = [_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        capture, opencv = cv2.VideoCapture(str(path)), []
        while capture.grab():
            opencv.append(_number(capture.retrieve()[1]))
        capture.release()
    for name, numbers in (("PyAV", pyav), ("OpenCV", opencv)):
        if numbers != list(range(FRAMES)):
            raise Problem(f"{name} decoded frames {numbers} of {FRAMES} written")
    return f"{FRAMES} frames, right with PyAV {av.__version__} and OpenCV {cv2.__version__}"


CHECKS: dict[str, Callable[[], str]] = {
    "python": check_python,
    "packages": check_versions,
    "devices": check_devices,
    "opencv": check_opencv,
    "scenic": check_scenic,
    "decoding": check_decoding,
}


def diagnose(checks: dict[str, Callable[[], str]] = CHECKS) -> dict[str, tuple[bool, str]]:
    """name -> (sound, text) of every check; a check that fails unexpectedly is a problem too."""
    results = {}
    for name, check in checks.items():
        try:
            results[name] = (True, check())
        except Problem as e:
            results[name] = (False, str(e))
        except Exception as e:
            results[name] = (False, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
    return results


def _write_video(path: pathlib.Path) -> None:
    """Frames with their number painted as black and white bars, most significant bit left."""
    import cv2

    height, width = SIZE
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (width, height))
    if not writer.isOpened():
        raise Problem("OpenCV cannot write mp4 files")
    for number in range(FRAMES):
        bits = [(number >> bit) & 1 for bit in reversed(range(BITS))]
        row = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
        writer.write(np.ascontiguousarray(np.broadcast_to(row[None, :, None], (height, width, 3))))
    writer.release()


def _number(frame: np.ndarray) -> int:
    bars = frame.mean(axis=(0, 2)).reshape(BITS, -1).mean(axis=1) > 127
    return int("".join("1" if bar else "0" for bar in bars), 2)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(re.sub(r"[-_.]+", "-", name))
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Prints one line per check; 0 if all are sound."""
    results = diagnose()
    for name, (sound, text) in results.items():
        print(f"{'ok   ' if sound else 'WRONG'}  {name:<9} {text}")
    return 0 if all(sound for sound, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
