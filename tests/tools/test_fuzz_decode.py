"""Damaged videos: no crash, no hang, no unforeseen error, and nothing wrong behind a hash."""

import collections
import os

import numpy as np
import pytest

from tools import fuzz_decode


def check(videos, count, seed, most_unseen):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else None
    counts, notes = fuzz_decode.fuzz(videos, count, seed, workers=2, seconds=30.0)
    print(fuzz_decode.table(counts))
    outcomes = collections.Counter()
    for (_, outcome), n in counts.items():
        outcomes[outcome] += n
    assert sum(outcomes.values()) == count  # every file has its answer
    assert not any(outcomes[bad] for bad in ("failed", "unseen+hash", "hung")), notes
    assert outcomes["refused"] > count / 2 and outcomes["unseen"] <= most_unseen * count
    if before is not None:
        assert set(os.listdir("/dev/shm")) <= before


def test_a_hundred_damaged_videos(test_data):
    check(test_data / "videos", 144, seed=0, most_unseen=0.15)  # 8 kinds of damage x 18 files


@pytest.mark.slow
def test_two_thousand_damaged_videos(test_data):
    check(test_data / "videos", 2000, seed=1, most_unseen=0.12)


def test_damage_is_reproducible_and_never_nothing(tmp_path):
    data = np.random.default_rng(0).bytes(300) + (200).to_bytes(4, "big") + b"moov" + bytes(range(192))
    (tmp_path / "a.mp4").write_bytes(data)
    runs = []
    for run in range(2):
        folder = tmp_path / str(run)
        folder.mkdir()
        made = list(fuzz_decode.mutants([tmp_path / "a.mp4"], 64, 5, folder))
        assert {kind for _, _, kind in made} == set(fuzz_decode.KINDS)
        runs.append([target.read_bytes() for target, _, _ in made])
    assert runs[0] == runs[1] and data not in runs[0]
    assert fuzz_decode.header(data) == (304, 500)
