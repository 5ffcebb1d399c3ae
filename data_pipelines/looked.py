"""Files that were looked at a moment ago: the frames chosen then are read without scanning the file again."""

import collections
import os
import threading

_MOST_FILES, _MOST_BYTES = 16, 64 << 20  # that wait to be read on; the oldest go

_lock, _waiting = threading.Lock(), collections.deque()  # of (key, bytes, reader)


def _key(path, backend: str, limits) -> tuple:
    """Differs where the file has changed."""
    stat = os.stat(path)
    return os.path.abspath(path), backend, limits, stat.st_size, stat.st_mtime_ns, stat.st_ino


def keep(reader, path, backend: str, limits) -> None:
    """Remembers what an open reader knows; the reader itself may be closed."""
    size = os.path.getsize(path)
    if size > _MOST_BYTES:
        return
    with _lock:
        _waiting.append((_key(path, backend, limits), size, reader.facts()))
        while len(_waiting) > _MOST_FILES or sum(bytes for _, bytes, _ in _waiting) > _MOST_BYTES:
            _waiting.popleft()


def take(path, backend: str, limits):
    """A reader to `fork`, once for each that was kept; None where there is none, or the file is another now."""
    try:
        key = _key(path, backend, limits)
    except OSError:
        return None
    with _lock:
        for place, (known, _, reader) in enumerate(_waiting):
            if known == key:
                del _waiting[place]
                return reader.facts()
    return None
