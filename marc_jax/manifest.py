"""Is this folder what was written? Size and SHA-256 of every file, kept in the folder's own manifest.json."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

NAME = "manifest.json"
FORMAT = 1
LEVELS = ("full", "size", "off")


def write(folder: pathlib.Path, contents: Mapping) -> None:
    """Hashes every file of `folder` and writes the manifest, all of it flushed to disk.

    Args:
      folder: nothing in it may change from now on.
      contents: JSON-serialisable facts that the manifest also protects; `read` returns them.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    hashes = _hashes(folder, names, flush=True)
    files = {name: [(folder / name).stat().st_size, hashes[name]] for name in names}
    body = json.dumps({**contents, "format": FORMAT, "files": files}, indent=1)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(f"{body}\n{_digest(body)}")
        file.flush()
        os.fsync(file.fileno())
    for path in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        flush_folder(path)


def read(folder: pathlib.Path) -> dict | str:
    """The manifest as a dict, or, as a str, what is wrong with it."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        body, _, digest = text.rpartition("\n")
        if _digest(body) != digest:
            return f"{NAME} has changed (SHA-256 differs)"
        manifest = json.loads(body)
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError) as e:
        return f"{NAME} cannot be read: {e}"
    if manifest["format"] != FORMAT:
        return f"{NAME} has format {manifest['format']}, this version reads {FORMAT}"
    return manifest


def problem(folder: pathlib.Path, verify: str = "full") -> str | None:
    """What is wrong with the folder, naming the file, or None.

    Args:
      folder: where `write` wrote.
      verify: "full" hashes every file, "size" compares sizes, "off" reads the manifest only.
    """
    if verify not in LEVELS:
        raise ValueError(f"verify={verify!r}: expected one of {', '.join(LEVELS)}")
    if not folder.is_dir():
        return "does not exist"
    manifest = read(folder)
    if isinstance(manifest, str):
        return manifest
    if verify == "off":
        return None
    for name, (size, _) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    if verify == "full":
        try:
            hashes = _hashes(folder, list(manifest["files"]))
        except OSError as e:
            return f"{e.filename} cannot be read: {e.strerror}"
        for name, (_, digest) in manifest["files"].items():
            if hashes[name] != digest:
                return f"{name} has changed (SHA-256 differs)"
    return None


def flush_folder(folder: pathlib.Path) -> None:
    """Makes renames inside `folder` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # Some network file systems cannot.
        pass
    finally:
        os.close(descriptor)


def _hashes(folder: pathlib.Path, names: list[str], flush: bool = False) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            if flush:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    # Hashing releases the interpreter lock: about 1 GB/s per core.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
