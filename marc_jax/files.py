"""Files that appear whole or not at all."""

import os
import pathlib
import tempfile


def write_whole(path, data: bytes | str) -> None:
    """Writes a file (text as UTF-8) in place of the one that is there, if any; after an OSError that one stays.

    It is flushed to disk under a name of its own before it takes its place, so readers and writers of other processes,
    a kill or a power cut never meet half of it.
    """
    path = pathlib.Path(path)
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
        part = None
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # of the file that was meant
    finally:
        if part is not None:
            pathlib.Path(part).unlink(missing_ok=True)
