"""Visuals of messages: what they become, and one line that names the file for those that cannot be used."""

import cv2
import numpy as np
import pytest

from data_pipelines import media, patches
from data_pipelines.video import Clip, VideoError, VideoInfo

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 60, 90, 3), np.uint8)


def clip(seconds, index, fps):
    info = VideoInfo(90, 60, fps, 1000, 1000 / fps, "h264")
    return Clip(np.zeros((len(index), 2, 2, 3), np.uint8), np.asarray(seconds, float), info, np.asarray(index))


@pytest.fixture
def picture(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), FRAMES[0][..., ::-1])
    return tmp_path / "a.png"


def test_an_image_file_and_its_pixels_are_the_same_visual(picture):
    from_file = media.load({"type": "image", "image": f"file://{picture}"})
    from_array = media.load({"image": FRAMES[0]})
    assert from_file.kind == "image" and from_file.grid == (1, 4, 6) and from_file.tokens == 6
    assert (from_file.patches == from_array.patches).all() and from_file.name == str(picture)
    for part in (
        {"type": "image", "path": str(picture)},
        {"type": "image", "url": f"file://{picture}"},
        {"type": "image_url", "image_url": {"url": str(picture)}},
        {"image_url": str(picture)},
    ):
        assert (media.load(part).patches == from_array.patches).all()
    size = {"resized_height": 100, "resized_width": 30}
    assert media.load({"image": FRAMES[0], **size}).grid == (1, 8, 2)


def test_frames_are_made_even_and_keep_their_time():
    got = media.load({"video": FRAMES, "sample_fps": 4.0, "min_pixels": 784, "max_pixels": 9 * 784})
    assert got.kind == "video" and got.grid[0] == 3 and got.second_per_grid == 0.5 and got.tokens == 3 * 2 * 3
    assert got.seconds.tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    default = media.load({"video": FRAMES})
    assert default.second_per_grid == 1.0
    assert default.grid[1:] == tuple(s // 14 for s in patches.VideoBudget().size(60, 90, 6))
    r1 = media.load({"video": FRAMES}, budget=patches.VIDEO_R1_BUDGET)
    assert r1.grid[1:] == tuple(s // 14 for s in patches.VIDEO_R1_BUDGET.size(60, 90, 6))


def test_a_file_is_sampled_as_its_dict_says(test_data):
    path = test_data / "videos" / "counter.mp4"  # 30 frames, 10 per second
    small = {"max_pixels": 20_000, "min_pixels": 3136}
    got = media.load({"video": path, "fps": 4.0, "max_frames": 6, **small})
    assert got.grid[0] == 3 and got.seconds.tolist() == pytest.approx([0, 0.6, 1.2, 1.7, 2.3, 2.9])
    assert got.second_per_grid == pytest.approx(2 / (6 / 30 * 10))
    assert media.load({"video": path, "nframes": 5, **small}).grid[0] == 2  # 2.5 pairs, rounded to the even
    part = media.load({"video": path, "video_start": 1.0, "video_end": 2.0, **small})
    assert part.seconds[0] == 1.0 and part.seconds[-1] == 2.0
    with pytest.raises(VideoError, match=r"counter.mp4: nframes 32 is more than the frames there are \(30\)"):
        media.load({"video": path, "nframes": 31, **small})


def test_the_time_of_a_patch_is_the_published_one_at_a_constant_rate():
    index = np.linspace(0, 249, 20).round().astype(int)
    assert clip(index / 25, index, 25.0).seconds_per_patch == 1.0
    rounded = np.round(index / 25, 3) + 4e-4  # the milliseconds of a Matroska file
    assert clip(rounded, index, 25.0).seconds_per_patch == 1.0


def test_the_time_of_a_patch_is_the_true_one_at_a_variable_rate():
    """Frames 0..9 lie 1 s apart in a file whose mean rate is 10 frames per second."""
    assert clip(np.arange(10), np.arange(10), 10.0).seconds_per_patch == pytest.approx(2 * 9.1 / 10)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"image": "a.png", "fps": 2}, "image has the key 'fps'"),
        ({"video": "a.mp4", "max_pixel": 2}, "video has the key 'max_pixel'"),
        ({"video": "a.mp4", "fps": 1, "nframes": 8}, "give fps or nframes"),
        ({"video": FRAMES, "resized_height": 28}, "resized_height and resized_width go together"),
        ({"type": "image"}, "a visual without 'image' or 'video'"),
        ({"text": "no"}, "a visual without 'image' or 'video'"),
    ],
)
def test_malformed_parts_are_named(part, reason):
    with pytest.raises(ValueError, match=reason):
        media.load(part)


def test_broken_files_are_one_line_with_their_name(tmp_path, picture):
    data = picture.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.png").write_bytes(data[:500] + bytes(b ^ 90 for b in data[500:520]) + data[520:])
    (tmp_path / "text.jpg").write_text("no picture")
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((2, 402, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "long.png"), np.zeros((2, 400, 3), np.uint8))
    reasons = {
        "cut.png": "damaged",
        "flipped.png": "damaged",
        "text.jpg": "not a JPEG",
        "thin.png": "the aspect ratio of 402x2 is above 200",
        "none.png": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoError) as error:
            media.load({"image": str(tmp_path / name)})
        assert str(error.value).startswith(f"{tmp_path / name}: ") and reason in str(error.value)
        assert "\n" not in str(error.value)
    assert media.load({"image": str(tmp_path / "long.png")}).grid == (1, 2, 28)


def test_a_thin_video_and_bad_frames_are_named():
    with pytest.raises(VideoError, match="frames given: the aspect ratio of 402x2 is above 200"):
        media.load({"video": np.zeros((2, 2, 402, 3), np.uint8)})
    for bad in (FRAMES[0], FRAMES[:0], FRAMES.astype(float)):
        with pytest.raises(VideoError, match="frames given: frames are"):
            media.load({"video": bad})
    with pytest.raises(VideoError, match="frames given: a picture is"):
        media.load({"image": FRAMES})


def test_a_thin_video_file_is_named(tmp_path):
    import av

    with av.open(str(tmp_path / "thin.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 804, 4, "yuv420p"
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((4, 804, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    with pytest.raises(VideoError, match="thin.mp4: the aspect ratio of 804x4 is above 200"):
        media.load({"video": tmp_path / "thin.mp4"})


def test_paths_stay_under_the_root(picture):
    root = picture.parent
    assert media.load({"image": "a.png"}, root=root).grid == (1, 4, 6)
    for path in ("../a.png", str(picture), "http://host/a.png"):
        with pytest.raises(VideoError, match="root|URL"):
            media.load({"image": path}, root=root)
    with pytest.raises(VideoError, match="a URL, not a file"):
        media.load({"image": "data:image/png;base64,AAAA"})
