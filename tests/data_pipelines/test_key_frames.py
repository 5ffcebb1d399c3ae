"""A first look at key frames, and rows of the sampled frames read later: the same frames as ever."""

import dataclasses
import os

import numpy as np
import pytest
from test_video import encode

from data_pipelines import decoders, patches, sandbox, stretches
from data_pipelines.decoders import open_reader
from data_pipelines.video import VideoError, read_frames

BACKENDS = ["pyav", "opencv"]
FILES = [
    "VID00003-20100701-2204.3GP", "big_buck_bunny.h265", "big_buck_bunny.mjpg.avi", "big_buck_bunny.mpg", "bikes.mp4",
    "demo.mp4", "fades.mp4", "flipping_a_pancake.mkv", "h265_video.mp4", "kryp-2.ts", "test.avi", "video_90.mov",
    "testsrc2_vp9.webm",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_rows_are_those_of_the_whole(tmp_path, backend, parts):
    path = encode(tmp_path / "a.mp4", 100, gop=12)
    how = {"backend": backend, "fps": 5.0, "resize": patches.FrameBudget(28 * 28, frame_limit=28 * 28 * 4, most=6)}
    whole = read_frames(path, **how)
    for rows in ([0], [3, 4, 11], np.arange(len(whole.index)), [len(whole.index) - 1]):
        some = read_frames(path, rows=rows, parts=parts, **how)
        assert (some.frames == whole.frames[rows]).all() and (some.index == whole.index[rows]).all()
        assert (some.seconds == whole.seconds[rows]).all()
    with pytest.raises(VideoError, match=f"row 99 is asked for, {len(whole.index)} frames are taken"):
        read_frames(path, rows=[99], **how)
    for rows in ([], [2, 1], [1, 1], [-1]):
        with pytest.raises(ValueError, match="rows are not numbers that increase"):
            read_frames(path, rows=rows, **how)


@pytest.mark.parametrize("parts", [1, 3])
def test_key_frames_stand_for_the_frames_after_them(tmp_path, parts):
    path = encode(tmp_path / "a.mp4", 100, gop=12)
    usual = read_frames(path, fps=8.0)
    look = read_frames(path, fps=8.0, keys_within=1.0, keys_side=28, parts=parts)
    assert (look.index == usual.index).all() and (look.seconds == usual.seconds).all() and usual.shown is None
    assert look.seconds_per_patch == usual.seconds_per_patch
    every = read_frames(path, fps=None).frames
    with open_reader(path) as reader:
        starts = np.asarray(reader.starts)
    assert (look.shown == [starts[starts <= i].max() for i in look.index]).all()
    assert (look.frames == patches.squash(every[look.shown], 28)).all()


@pytest.mark.parametrize("how", [{"backend": "opencv"}, {"keys_within": 0.1}, {"num_frames": 2}, {"fps": 2.0}])
def test_where_key_frames_are_too_sparse_or_too_many_nothing_changes(tmp_path, how):
    path = encode(tmp_path / "a.mp4", 100, gop=12)
    usual = {"fps": 8.0} | {name: value for name, value in how.items() if name != "keys_within"}
    look, clip = read_frames(path, **{"keys_within": 5.0, "fps": 8.0} | how), read_frames(path, **usual)
    assert look.shown is None and (look.frames == clip.frames).all()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_file_that_was_looked_at_is_not_scanned_again_unless_it_changed(tmp_path, parts, monkeypatch):
    path, scans = encode(tmp_path / "a.mp4", 100, gop=12), []
    scan = decoders.PyAVReader._scan
    monkeypatch.setattr(decoders.PyAVReader, "_scan", lambda self, keep: scans.append(1) or scan(self, keep))
    usual, how = read_frames(path, fps=8.0).frames, {"fps": 8.0, "parts": parts}
    scans.clear()
    for _ in range(2):
        read_frames(path, keys_within=5.0, **how)
        assert (read_frames(path, rows=[1, 2, 9], **how).frames == usual[[1, 2, 9]]).all()
    assert len(scans) == 2
    read_frames(path, keys_within=5.0, **how)
    other = encode(tmp_path / "b.mp4", 60, gop=12)
    os.replace(other, path)
    assert read_frames(path, rows=[0], **how).info.num_frames == 60 and len(scans) == 4


@pytest.mark.parametrize("name", FILES)
def test_a_key_frame_decoded_alone_is_the_one_decoded_in_passing(test_data, name):
    with open_reader(test_data / "videos" / name) as reader:
        wanted = reader.starts[:6]
        passing = dict(reader.decode(range(wanted[-1] + 1)))
        with reader.fork(1) as other:
            alone = dict(other.decode_starts(wanted))
        assert list(alone) == list(wanted) and all((alone[i] == passing[i]).all() for i in wanted)
        again = dict(reader.decode_starts(wanted))
        assert all((again[i] == passing[i]).all() for i in wanted)


def test_a_child_process_tells_which_key_frames_it_shows(tmp_path):
    path = encode(tmp_path / "a.mp4", 100, gop=12)
    with sandbox.Pool(1) as pool:
        for how in ({"fps": 8.0, "keys_within": 5.0, "keys_side": 28}, {"rows": np.array([1, 4])}, {}):
            here, there = read_frames(path, **how), pool.read_frames(path, **how)
            for field in dataclasses.fields(here):
                if field.name not in ("info", "warnings"):
                    assert np.array_equal(getattr(here, field.name), getattr(there, field.name)), field.name


def test_pictures_are_counted_up_to_the_last_wanted_of_each_stretch():
    assert stretches.pictures([0, 10, 20], np.array([3, 12, 15])) == 4 + 6
    assert stretches.pictures([0], np.array([0, 99])) == 100
