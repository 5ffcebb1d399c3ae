"""Frames kept by content: the same bits as decoding, found again, and never a damaged one."""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.frames import Frames
from data_pipelines.patches import FrameBudget

HOW = {"fps": 2.0, "max_frames": 8, "min_frames": 4}


@pytest.fixture
def clip(test_data, tmp_path):
    return pathlib.Path(shutil.copyfile(test_data / "videos" / "demo.mp4", tmp_path / "demo.mp4"))


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, path, **how):
        self.calls += 1
        return video.read_frames(path, **how)


def same(a: video.Clip, b: video.Clip) -> bool:
    fields = [f.name for f in dataclasses.fields(video.Clip)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


def kept(folder) -> list[pathlib.Path]:
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


@pytest.mark.parametrize("resize", [None, (28, 56), FrameBudget(784, frame_limit=8 * 784, most=9)])
def test_what_is_kept_is_what_was_decoded(clip, tmp_path, resize):
    read, want = Counted(), video.read_frames(clip, resize=resize, **HOW)
    assert same(Frames(tmp_path / "f", read).read(clip, resize=resize, **HOW), want)
    assert same(Frames(tmp_path / "f", read).read(clip, resize=resize, **HOW), want) and read.calls == 1


def test_copies_share_and_other_content_or_sampling_does_not(clip, tmp_path):
    read = Counted()
    frames = Frames(tmp_path / "f", read)
    first = frames.read(clip, **HOW)
    assert same(frames.read(shutil.copyfile(clip, tmp_path / "other name.mp4"), **HOW), first) and read.calls == 1
    assert same(frames.read(clip, **HOW, start=None, end=None, num_frames=None), first) and read.calls == 1
    frames.read(clip, **{**HOW, "max_frames": 4})
    frames.read(clip, **HOW, start=1.0)
    assert read.calls == 3
    clip.write_bytes(clip.read_bytes() + b"\0")
    os.utime(clip, ns=(1, 1))
    frames.read(clip, **HOW)
    assert read.calls == 4


def test_smaller_frames_are_made_of_those_in_the_files_own_size(clip, tmp_path):
    read, budget = Counted(), FrameBudget(784, frame_limit=8 * 784, most=9)
    frames = Frames(tmp_path / "f", read)
    frames.read(clip, **HOW)
    assert same(frames.read(clip, resize=budget, **HOW), video.read_frames(clip, resize=budget, **HOW))
    assert same(frames.read(clip, resize=(30, 40), **HOW), video.read_frames(clip, resize=(30, 40), **HOW))
    assert read.calls == 1


def test_a_damaged_entry_is_decoded_anew(clip, tmp_path):
    read = Counted()
    frames = Frames(tmp_path / "f", read)
    want = frames.read(clip, resize=(28, 56), **HOW)
    (entry,) = kept(tmp_path / "f")
    content = bytearray(entry.read_bytes())
    for damage in (b"", bytes(content[: len(content) // 2]), bytes(content[:-9])):
        entry.write_bytes(damage)
        assert same(frames.read(clip, resize=(28, 56), **HOW), want)
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    assert same(frames.read(clip, resize=(28, 56), **HOW), want) and read.calls == 5
    assert kept(tmp_path / "f") == [entry]


def test_a_full_disk_costs_the_cache_and_not_the_run(clip, tmp_path, capsys, monkeypatch):
    frames = Frames(tmp_path / "f")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    for _ in range(2):
        assert same(frames.read(clip, resize=(28, 56), **HOW), video.read_frames(clip, resize=(28, 56), **HOW))
    assert capsys.readouterr().err.count("frames are not kept (No space left on device)") == 1
    assert kept(tmp_path / "f") == []


def test_what_cannot_be_read_is_the_same_error(tmp_path):
    frames = Frames(tmp_path / "f")
    with pytest.raises(video.VideoError, match="No such file"):
        frames.read(tmp_path / "no.mp4", **HOW)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(video.VideoError, match="empty"):
        frames.read(tmp_path / "empty.mp4", **HOW)
    assert kept(tmp_path / "f") == []
