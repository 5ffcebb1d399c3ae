"""Which files are videos: those that are named, and those in folders by the endings of their names."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset(
    ".3g2 .3gp .avi .flv .gif .h264 .h265 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


class Found(NamedTuple):
    """Video files, and {place: reason} of the places that give none."""

    files: list[str]
    failed: dict[str, str]

    @property
    def total(self) -> int:
        return len(self.files) + len(self.failed)


def find_videos(places: Iterable) -> Found:
    """Files as they are, whatever their names; folders searched by `SUFFIXES`, sorted. A file counts once."""
    files, failed = [], {}
    for place in map(str, places):
        if not os.path.isdir(place):
            files.append(place)
            continue
        found = []
        for folder, inside, names in os.walk(place):
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            known = (name for name in names if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
            found += [os.path.join(folder, name) for name in sorted(known)]
        files += found
        if not found:
            failed[place] = f"no video in this folder (files ending in {' '.join(sorted(SUFFIXES))})"
    once: dict[str, str] = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    return Found(list(once.values()), failed)
