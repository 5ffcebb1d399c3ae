"""The files: they show what the latents say, appear whole or not at all, and a stopped build goes on."""

import collections
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from data_pipelines.synthetic import build, recompose, scenes

DIFFICULTY = scenes.Difficulty()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("set"), sizes={"train": 40, "val": 7, "test": 7}, questions_per_video=2)


def read_with_opencv(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        ok, frame = capture.read()
        if not ok:
            return np.array(frames)[..., ::-1]
        frames.append(frame)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2))


def test_records_follow_the_schema(folder):
    records = json.loads((folder / "train.json").read_text())
    assert len(records) == 80 and len({r["problem_id"] for r in records}) == 80
    per_type = collections.Counter(r["question_type"] for r in records)
    assert set(per_type) == set(DIFFICULTY.types)
    assert max(per_type.values()) - min(per_type.values()) <= 1
    for r in records:
        assert r["data_type"] == "video" and r["path"].startswith("./videos/")
        assert (folder / r["path"]).is_file()
        assert r["problem_type"] in ("multiple choice", "numerical")
        assert all(option.startswith(f"{letter}. ") for letter, option in zip("ABCD", r["options"], strict=False))
        assert r["solution"].startswith("<answer>") and r["process"].startswith("<think>")
        assert all(0 <= i < len(r["events"]) for i in r["needed_events"])
        last = r["events"][-1]
        assert r["events"][0]["start_patch"] == 0 and last["end_seconds"] == last["end_patch"] * 0.5
    assert not {r["video_id"] for r in records} & {
        r["video_id"] for r in json.loads((folder / "test.json").read_text())
    }
    pool, places = recompose.pool_from_records(records)
    assert len(pool.events) == len(places) == sum(len(r["events"]) for r in records) // 2


def test_files_ask_the_types_of_their_difficulty_in_turn(tmp_path, capsys):
    difficulty = scenes.Difficulty(events=(1, 2), types=("happens", "count", "shape"))
    build.build(tmp_path / "a", sizes={"val": 4}, difficulty=difficulty, questions_per_video=2)
    records = json.loads((tmp_path / "a" / "val.json").read_text())
    assert [r["question_type"] for r in records] == (["happens", "count", "shape"] * 3)[:8]
    with pytest.raises(ValueError, match="another set .*difficulty"):
        build.build(tmp_path / "a", sizes={"val": 4}, difficulty=dataclasses.replace(difficulty, types=("count",)))
    common = ["--train=0", "--val=2", "--test=0", "--workers=0"]
    assert build.main([f"--out={tmp_path / 'b'}", *common, "--types", "happened", "order"]) == 0
    records = json.loads((tmp_path / "b" / "val.json").read_text())
    assert [r["question_type"] for r in records] == ["happened", "order"]
    assert build.main([f"--out={tmp_path / 'c'}", *common, "--types", "weight"]) == 2
    assert "error: types must be different names out of colour, " in capsys.readouterr().out
    assert not (tmp_path / "c").exists()


def test_decoded_videos_match_the_rendered_ones(folder):
    for i in range(20):
        drawn = scenes.render(build.latents(0, "train", i, DIFFICULTY))
        read = read_with_opencv(folder / build.video_path("train", i))
        assert read.shape == drawn.shape
        assert psnr(read, drawn) > 24
        assert psnr(read.mean(-1), drawn.mean(-1)) > 30  # the loss is in colour resolution, not in shape


def test_timestamps_are_four_frames_a_second(folder):
    path = folder / build.video_path("train", 0)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(len(times)) / 4, atol=1e-3)


def test_the_projects_reader_returns_every_frame_once(folder):
    video = pytest.importorskip("data_pipelines.video", reason="the video reader is not here yet")
    drawn = scenes.render(build.latents(0, "train", 3, DIFFICULTY))
    clip = video.read_frames(str(folder / build.video_path("train", 3)), fps=4.0, max_frames=64)
    assert clip.frames.shape == drawn.shape and psnr(clip.frames, drawn) > 24
    np.testing.assert_allclose(clip.seconds, np.arange(len(drawn)) / 4, atol=1e-3)


def test_colours_survive_the_codec(folder):
    """Nearest palette colour of the pixels in the middle of every object, last frame of every event."""
    names = list(scenes.COLOURS) + [f"{hue}{i}" for hue in scenes.HUES for i in range(2)]
    palette = np.array(list(scenes.COLOURS.values()) + [tone for pair in scenes.HUES.values() for tone in pair])
    for i in range(40):
        events = build.latents(0, "train", i, DIFFICULTY)
        read = read_with_opencv(folder / build.video_path("train", i))
        for event, (_, end) in zip(events, scenes.patch_spans(events), strict=True):
            frame = read[2 * end - 1].astype(np.float64)
            nearest = np.argmin(((frame[:, :, None] - palette) ** 2).sum(-1), axis=-1)
            held = np.bincount(nearest.ravel(), minlength=len(names))
            assert names[int(np.argmax(held[: len(scenes.COLOURS)]))] == event.colour
            assert names[len(scenes.COLOURS) + int(np.argmax(held[len(scenes.COLOURS) :]))][:-1] == event.hue


def test_shapes_directions_and_colours_survive_the_codec(folder):
    """Of all scenes that differ in colour, shape or direction only, the decoded one is nearest to the one drawn."""
    for i in range(6):
        events = build.latents(0, "train", i, DIFFICULTY)
        read = read_with_opencv(folder / build.video_path("train", i)).astype(np.float64)
        for event, (_, end) in zip(events, scenes.patch_spans(events), strict=True):
            error = {}
            for what in itertools.product(scenes.COLOURS, scenes.SHAPES, scenes.DIRECTIONS):
                other = dataclasses.replace(event, colour=what[0], shape=what[1], direction=what[2])
                drawn = scenes.render_event(other, 56, 2, start=2 * event.patches - 2)
                error[what] = ((drawn - read[2 * end - 2 : 2 * end]) ** 2).mean()
            first, second = sorted(error.values())[:2]
            assert min(error, key=error.get) == (event.colour, event.shape, event.direction)
            assert second > 1.3 * first


def test_motion_goes_where_it_should():
    for direction, (down, right) in scenes.DIRECTIONS.items():
        event = scenes.Event("blue", "plain", "white", "disc", direction, 1, 2, speed=4, lanes=(1,), phases=(20,))
        frames = scenes.render([event])
        lit = [np.argwhere(frame.min(-1) > 200).mean(0) for frame in frames]
        np.testing.assert_allclose(np.diff(lit, axis=0), np.tile([4.0 * down, 4.0 * right], (3, 1)), atol=0.01)


def test_objects_are_counted_by_lane_and_every_event_has_a_clean_patch():
    rng = np.random.default_rng(0)
    difficulty = scenes.Difficulty(p_dissolve=1.0, patches=(1, 3))
    dissolved = 0
    for _ in range(20):
        events = scenes.sample_video(rng, difficulty)
        frames = scenes.render(events)
        for event, (start, end) in zip(events, scenes.patch_spans(events), strict=True):
            alone = scenes.render_event(event, 56, 2 * event.patches)
            dissolved += event.dissolve
            np.testing.assert_array_equal(frames[2 * start + 2 * event.dissolve : 2 * end], alone[2 * event.dissolve :])
            assert end - start > event.dissolve
            assert len(set(event.lanes)) == len(event.lanes) == len(event.phases) == event.count
    assert dissolved > 20


@pytest.mark.parametrize("size", [28, 84, 112])
def test_other_frame_sizes_render(size):
    events = scenes.sample_video(np.random.default_rng(1), scenes.Difficulty(size=size, patches=(1, 8)))
    frames = scenes.render(events, size)
    assert frames.shape == (2 * sum(e.patches for e in events), size, size, 3)


def test_workers_do_not_change_the_files(folder, tmp_path):
    other = build.build(tmp_path, sizes={"train": 40}, questions_per_video=2, workers=2)
    assert (other / "train.json").read_bytes() == (folder / "train.json").read_bytes()
    for i in range(40):
        path = build.video_path("train", i)
        assert (other / path).read_bytes() == (folder / path).read_bytes()


def test_disk_use_stays_under_the_estimate_and_is_checked_first(folder, tmp_path, monkeypatch):
    used = sum(p.stat().st_size for p in (folder / "videos").rglob("*.mp4"))
    assert used < build.estimate_bytes(54, DIFFICULTY)
    with pytest.raises(ValueError, match="max_bytes"):
        build.build(tmp_path / "a", sizes={"train": 100000}, max_bytes=10**8)
    free = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="MB free"):
        build.build(tmp_path / "b", sizes={"train": 10})
    assert not list((tmp_path / "b").rglob("*.mp4"))


def test_a_video_cut_short_while_writing_never_gets_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "is_complete_mp4", lambda _: False)
    frames = scenes.render(build.latents(0, "train", 0, DIFFICULTY))
    with pytest.raises(OSError, match="not written completely"):
        build.write_video(tmp_path / "a.mp4", frames, 4.0)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_noticed_and_made_again(folder, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    whole = (copy / build.video_path("train", 5)).read_bytes()
    for i, data in ((5, whole[: len(whole) // 2]), (6, b""), (7, whole[:-1])):
        (copy / build.video_path("train", i)).write_bytes(data)
    (copy / build.video_path("train", 8)).unlink()
    build.build(copy, sizes={"train": 40}, questions_per_video=2)
    for i in (5, 6, 7, 8):
        path = build.video_path("train", i)
        assert (copy / path).read_bytes() == (folder / path).read_bytes()


def test_another_set_in_the_folder_is_not_overwritten(folder, capsys):
    with pytest.raises(ValueError, match="another set"):
        build.build(folder, seed=1, sizes={"train": 1})
    with pytest.raises(ValueError, match="sizes"):
        build.build(folder, sizes={"dev": 1})
    assert build.main([f"--out={folder}", "--seed=3", "--workers=0"]) == 2
    assert "another set (different seed)" in capsys.readouterr().out


def test_a_killed_build_leaves_whole_files_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "data_pipelines.synthetic.build", f"--out={tmp_path}", "--train=1500"]
    command += ["--val=0", "--test=0", "--workers=0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    videos = tmp_path / "videos" / "train"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (videos.is_dir() and len(list(videos.glob("[0-9]*.mp4"))) > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(videos.glob("[0-9]*.mp4"))
    assert 20 < len(done) < 1500 and not (tmp_path / "train.json").exists()
    for path in done:
        assert build.is_complete_mp4(path)
    assert len(read_with_opencv(done[-1])) == len(scenes.render(build.latents(0, "train", len(done) - 1, DIFFICULTY)))
    seen = []
    size = len(done) + 30
    build.build(tmp_path, sizes={"train": size}, progress=lambda *step: seen.append(step))
    assert seen[0] == ("train", len(done), size) and seen[-1] == ("train", size, size)
    assert not list(tmp_path.rglob(".part-*"))
    assert len(json.loads((tmp_path / "train.json").read_text())) == size


def test_a_whole_set_is_left_alone_unless_something_else_is_asked_of_it(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    sizes = {"train": 40, "val": 7, "test": 7}
    before = (copy / "train.json").stat().st_mtime_ns
    build.build(copy, sizes=sizes, questions_per_video=2)
    assert (copy / "train.json").stat().st_mtime_ns == before
    build.build(copy, sizes=sizes, questions_per_video=1)
    assert len(json.loads((copy / "train.json").read_text())) == 40
