"""Reading videos: the right frames at the right times, and an error that says why for everything else."""

import json
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import decoders, stretches, video
from data_pipelines.video import Limits, VideoError, probe, read_frames, read_image, sample_indices

BACKENDS = ["pyav", "opencv"]


def picture(number, height=64, width=96):
    """A frame that carries its number as ten black or white bars."""
    bits = [(number >> i & 1) * 220 + 16 for i in range(10)]
    row = np.repeat(np.array(bits, np.uint8), -(-width // 10))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def numbers(frames):
    """Reads the bars back."""
    width = frames.shape[2]
    columns = [min(width - 1, int((i + 0.5) * -(-width // 10))) for i in range(10)]
    levels = frames.mean(axis=(1, 3))[:, columns]
    return ((levels > 126) << np.arange(10)).sum(1)


def encode(path, count, *, codec="libx264", rate=25, times=None, gop=12, audio=False, **options):
    """Writes frames 0 .. count-1; `times` in milliseconds for a variable rate."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as out:
        if count:
            stream = out.add_stream(codec, rate=1000 if times is not None else rate, options={"g": str(gop), **options})
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        sound = out.add_stream("aac", rate=16000) if audio else None
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        if count:
            out.mux(stream.encode())
        if sound:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 16000, 0
            out.mux(sound.encode(noise))
            out.mux(sound.encode())
    return path


# ---------------------------------------------------------------- which frames


def published_rule(total, video_fps, fps, low, high):
    """qwen-vl-utils 0.0.14 in words: count, then round(linspace) over all frames."""
    n = total / video_fps * fps
    n = min(min(max(n, -(-low // 2) * 2), high // 2 * 2), total)
    return int(n // 2 * 2)


@pytest.mark.parametrize("fps", [0.5, 2.0, 3.3, 30.0])
@pytest.mark.parametrize("rate", [10.0, 24.0, 30000 / 1001])
def test_constant_rate_follows_the_published_rule(fps, rate):
    for total in (2, 3, 4, 5, 7, 30, 31, 64, 125, 250, 491, 1090, 3001):
        for high in (4, 16, 63, 64, 768):
            index = sample_indices(np.arange(total) / rate, rate, fps=fps, max_frames=high)
            n = published_rule(total, rate, fps, 4, high)
            assert len(index) == n and n % 2 == 0
            assert (index == video._spread(0, total - 1, n)).all() and index[0] == 0 and index[-1] == total - 1


def test_rounding_is_torchs_linspace():
    torch = pytest.importorskip("torch")
    for total in [*range(2, 300), 491, 1179, 7200, 108000]:
        for n in (2, 4, 6, 16, 32, 64, 768):
            if n <= total:
                theirs = torch.linspace(0, total - 1, n).round().long().numpy()
                assert (video._spread(0, total - 1, n) == theirs).all(), (total, n)


def test_counts_bounds_and_repeats():
    times = np.arange(100) / 10
    assert sample_indices(times, 10, num_frames=5).tolist() == [0, 25, 50, 74, 99]
    assert len(sample_indices(times, 10, num_frames=300)) == 300
    assert sample_indices([0.0], 25).tolist() == [0] and sample_indices([0.0], 25, num_frames=4).tolist() == [0] * 4
    assert sample_indices(times, 10, fps=None).tolist() == list(range(100))
    inside = sample_indices(times, 10, start=2.0, end=4.05)  # frames ceil(2.0 * 10) .. floor(4.05 * 10)
    assert inside[0] == 20 and inside[-1] == 40
    for bad in (
        dict(start=11),
        dict(start=3, end=2),
        dict(num_frames=0),
        dict(fps=0),
        dict(min_frames=8, max_frames=4),
    ):
        with pytest.raises(ValueError):
            sample_indices(times, 10, **bad)


def test_variable_rate_is_sampled_by_time():
    times = np.concatenate([np.arange(50) / 50, 1 + np.arange(9) / 2])  # one busy second, then 2 frames per second
    index = sample_indices(times, len(times) / 5.5, num_frames=6)
    assert np.abs(times[index] - np.linspace(0, 5, 6)).max() < 1e-9


# ---------------------------------------------------------------- made files


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}),
        ("a.mkv", "libx264", {}),
        ("a.mp4", "mpeg4", {}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("a.ts", "libx264", {"bf": "2"}),
        ("a.mov", "mjpeg", {}),
    ],
)
def test_every_container_returns_the_frames_asked_for(tmp_path, backend, name, codec, options):
    if codec == "mjpeg":
        options = {"strict": "unofficial"}
    encode(tmp_path / name, 61, codec=codec, **options)
    clip = read_frames(tmp_path / name, backend=backend, fps=None)
    assert clip.info.num_frames == 61 and len(clip.frames) == 62 and clip.info.fps == pytest.approx(25, rel=0.01)
    assert numbers(clip.frames).tolist() == [*range(61), 60]
    assert np.abs(clip.seconds[:61] - np.arange(61) / 25).max() < 2e-3
    clip = read_frames(tmp_path / name, backend=backend, fps=5.0, max_frames=8, start=0.39, end=2.01)
    assert numbers(clip.frames).tolist() == clip.index.tolist() == (10 + video._spread(0, 40, 8)).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_rate_file_gives_the_frames_nearest_in_time(tmp_path, backend):
    times = np.cumsum(np.random.default_rng(0).choice([20, 40, 200], 80)) - 20
    encode(tmp_path / "v.mkv", 80, times=times, bf="0")
    clip = read_frames(tmp_path / "v.mkv", backend=backend, num_frames=12)
    seconds = (times - times[0]) / 1000
    nearest = [np.abs(seconds - t).argmin() for t in np.linspace(0, seconds[-1], 12)]
    assert numbers(clip.frames).tolist() == nearest
    np.testing.assert_allclose(clip.seconds, seconds[nearest], atol=2e-3)


def test_rare_cases_of_length(tmp_path):
    one = read_frames(encode(tmp_path / "one.mp4", 1))
    assert one.frames.shape == (2, 64, 96, 3) and (one.frames[0] == one.frames[1]).all() and one.info.num_frames == 1
    assert read_frames(tmp_path / "one.mp4", num_frames=6).frames.shape[0] == 6
    three = read_frames(encode(tmp_path / "three.mp4", 3), fps=None)
    assert numbers(three.frames).tolist() == [0, 1, 2, 2] and three.seconds_per_patch == pytest.approx(2 * 3 / 25 / 4)
    with pytest.raises(VideoError, match=r"one.mp4: no frame between 5 and None"):
        read_frames(tmp_path / "one.mp4", start=5)


def test_resizing_while_reading(tmp_path):
    from data_pipelines.patches import resize_frames, smart_resize

    path = encode(tmp_path / "a.mp4", 6)
    whole = read_frames(path, fps=None)
    small = read_frames(path, fps=None, resize=(28, 56))
    assert (small.frames == resize_frames(whole.frames, 28, 56)).all()
    assert read_frames(path, fps=None, resize=smart_resize).frames.shape[1:3] == smart_resize(64, 96)


def test_a_small_video_is_quick(tmp_path):
    """24 tiny frames take 1 to 2 ms on an idle core; the bound leaves room for a busy machine."""
    import time

    path = encode(tmp_path / "a.mp4", 24)
    took = []
    for _ in range(20):
        begin = time.perf_counter()
        read_frames(path, fps=None)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.02


def test_files_too_large_to_keep_are_read_twice(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", 30)
    kept = read_frames(path)
    monkeypatch.setattr(decoders, "_KEEP_PACKETS_BELOW", 0)
    again = read_frames(path)
    assert (kept.frames == again.frames).all() and (kept.index == again.index).all()


def test_a_reader_can_decode_again(tmp_path):
    with decoders.open_reader(encode(tmp_path / "a.mp4", 20)) as reader:
        first, second = ([i for i, _ in reader.decode(range(3, 20, 4))] for _ in range(2))
        assert first == second == [3, 7, 11, 15, 19]


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "no such file"),
        ("empty.mp4", "the file is empty"),
        ("folder", "a directory"),
        ("text.mp4", "a text file"),
        ("page.mp4", "a text file"),
        ("noise.mp4", "not a video file"),
        ("list.mp4", "a text file"),
        ("hls.mp4", "a text file"),
        ("head.mp4", "no video stream|cannot be opened"),
        ("cut.mp4", "damaged|truncated|cannot be"),
        ("sound.mp4", "no video stream|cannot be opened"),
        ("zero.mp4", "no video stream|cannot be opened"),
        ("cut.mkv", "truncated"),
        ("cut.avi", "truncated"),
        ("hole.mp4", "of 61 frames decoded"),
        ("picture.mp4", "not a video file"),
        ("nul\0.mp4", "NUL"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, backend, name, reason):
    good = encode(tmp_path / "good.mp4", 61, bf="0").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.mp4").write_text("hello\nthis is no video\n")
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/good.mp4'\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\ngood.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "head.mp4").write_bytes(good[:40])
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    hole = bytearray(good)
    middle = good.index(b"mdat") + (len(good) - good.index(b"mdat")) // 2
    hole[middle:] = bytes(len(good) - middle)
    (tmp_path / "hole.mp4").write_bytes(hole)
    encode(tmp_path / "sound.mp4", 0, audio=True)
    (tmp_path / "zero.mp4").write_bytes(good[:32] + (8).to_bytes(4, "big") + b"mdat")
    (tmp_path / "picture.mp4").write_bytes(cv2.imencode(".png", picture(3))[1].tobytes())
    for kind, codec in (("mkv", "libx264"), ("avi", "mpeg4")):
        whole = encode(tmp_path / f"whole.{kind}", 61, codec=codec).read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[:-100])
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(tmp_path / name, backend=backend)
    assert caught.value.path == str(tmp_path / name) and str(caught.value).startswith(str(tmp_path / name) + ": ")
    assert "\n" not in str(caught.value) and len(caught.value.reason) > 8


@pytest.mark.parametrize(
    "path", ["concat:{0}|{0}", "subfile,,start,0,end,999,,:{0}", "file:{0}", "pipe:0", "http://127.0.0.1/a.mp4"]
)
def test_protocols_are_plain_names(tmp_path, path):
    good = encode(tmp_path / "good.mp4", 3)
    for backend in BACKENDS:
        with pytest.raises(VideoError, match="no such file"):
            read_frames(path.format(good), backend=backend)


def test_limits(tmp_path):
    path = encode(tmp_path / "a.mp4", 50)
    for limits, reason in [
        (Limits(max_pixels=100), "pixels"),
        (Limits(max_seconds=1), "limit of 1 s"),
        (Limits(max_frames=20), "20 frames"),
        (Limits(max_bytes=1000), "bytes"),
        (Limits(decode_seconds=-1), "took longer"),
    ]:
        for backend in BACKENDS:
            with pytest.raises(VideoError, match=reason):
                read_frames(path, backend=backend, limits=limits)
    with pytest.raises(ValueError, match="backend"):
        read_frames(path, backend="decord")


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "a.mp4: is empty")


def test_images(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(picture(5), cv2.COLOR_RGB2BGR))
    assert (read_image(tmp_path / "a.png") == picture(5)).all()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    (tmp_path / "c.jpg").write_text("no")
    for name in ("b.png", "c.jpg", "absent.png", "."):
        with pytest.raises(VideoError):
            read_image(tmp_path / name)


# ---------------------------------------------------------------- real files


def test_every_real_file_as_its_manifest_says(test_data):
    folder = test_data / "videos"
    manifest = json.loads((folder / "manifest.json").read_text())["videos"]
    for name, facts in manifest.items():
        if "decode_error" in facts:
            with pytest.raises(VideoError, match="damaged"):
                read_frames(folder / name)
            continue
        info = probe(folder / name)
        turned = facts["rotation"] % 180 != 0
        assert info.num_frames == facts["decoded_frames"], name
        assert [info.width, info.height] == facts["size"][:: -1 if turned else 1], name
        assert info.rotation == facts["rotation"] % 360, name
        if "last_pts_s" in facts:
            span = facts["last_pts_s"] - facts["first_pts_s"]
            assert info.duration - 1 / info.fps == pytest.approx(span, abs=1e-3), name


SMALL_FILES = [
    "h265_video.mp4",
    "av1_video.mkv",
    "big_buck_bunny.mpg",
    "big_buck_bunny.h265",
    "dog.mp4",
    "test.avi",
    "nasa_13013.mp4",
    "newtonscradle.gif",
    "unordered.mov",
    "video_90.mov",
    "kryp-2.ts",
    "testsrc2_mpeg4.mp4",
    "fire2.mp4",
]


@pytest.mark.parametrize("name", SMALL_FILES)
def test_both_decoders_return_the_same_pictures(test_data, name):
    a, b = (read_frames(test_data / "videos" / name, backend=backend) for backend in BACKENDS)
    assert (a.index == b.index).all() and (a.frames == b.frames).all()


def test_frames_are_those_of_a_plain_sequential_read(test_data):
    path = test_data / "videos" / "counter.mp4"
    capture, every = cv2.VideoCapture(str(path)), []
    while (got := capture.read())[0]:
        every.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
    clip = read_frames(path, num_frames=6)
    assert clip.index.tolist() == [0, 6, 12, 17, 23, 29] and clip.seconds.tolist() == pytest.approx(
        (clip.index / 10).tolist()
    )
    assert all((frame == every[i]).all() for frame, i in zip(clip.frames, clip.index, strict=True))


def test_upstream_timestamps(test_data):
    truth = json.loads((test_data / "videos" / "nasa_13013.mp4.stream0.all_frames_info.json").read_text())
    seconds = [float(frame["pts_time"]) for frame in truth]
    with decoders.open_reader(test_data / "videos" / "nasa_13013.mp4") as reader:
        np.testing.assert_allclose(reader.times, np.array(seconds) - seconds[0], atol=1e-5)


def test_rotation_is_applied_once(test_data):
    for name in ("video_0.mov", "video_90.mov", "fire2.mp4"):
        capture = cv2.VideoCapture(str(test_data / "videos" / name))  # turns by itself
        upright = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        for backend in BACKENDS:
            clip = read_frames(test_data / "videos" / name, backend=backend)
            assert (clip.frames[0] == upright).all()
    assert read_frames(test_data / "videos" / "video_90.mov").frames.shape[1:3] == (568, 320)


def test_damage_tells_how_far_it_got(test_data):
    for backend in BACKENDS:
        with pytest.raises(VideoError, match="28 of 50 frames decoded"):
            read_frames(test_data / "videos" / "corrupted.mp4", backend=backend)
        with pytest.raises(VideoError, match="no_timescale.mp4: damaged"):
            read_frames(test_data / "videos" / "no_timescale.mp4", backend=backend)


def test_a_folder_of_pictures_is_a_video(tmp_path):
    import cv2

    for number in range(1, 31):
        cv2.imwrite(str(tmp_path / f"{number:05d}.png"), np.full((40, 60, 3), 8 * number, np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "00031.png").symlink_to(tmp_path / "00001.png")
    clip = video.read_folder(tmp_path, rate=3.0, fps=1.0, start=2.0, end=8.0, resize=(20, 30))
    assert clip.frames.shape == (6, 20, 30, 3) and clip.info.num_frames == 30 and clip.info.duration == 10.0
    assert clip.seconds[0] == 2.0 and clip.seconds[-1] == 8.0
    assert (clip.frames[:, 0, 0, 0] == 8 * (clip.index + 1)).all()
    cv2.imwrite(str(tmp_path / "00010.png"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(video.VideoError, match="00010.png.*10x10, the first picture 60x40"):
        video.read_folder(tmp_path, rate=3.0, fps=None)
    for place in (tmp_path / "gone", tmp_path / "notes.txt"):
        with pytest.raises(video.VideoError, match="no folder"):
            video.read_folder(place, rate=3.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(video.VideoError, match="holds no pictures"):
        video.read_folder(tmp_path / "empty", rate=3.0)
    with pytest.raises(video.VideoError, match="no frame between"):
        video.read_folder(tmp_path, rate=3.0, start=20.0, end=30.0)


# ---------------------------------------------------------------- in stretches


@given(st.sets(st.integers(0, 300), min_size=1), st.sets(st.integers(0, 300)), st.integers(1, 20))
def test_stretches_hold_every_frame_once_and_begin_at_different_key_frames(wanted, starts, parts):
    wanted, starts = np.array(sorted(wanted)), np.array(sorted(starts | {0}))
    shares = stretches.cut(starts.tolist(), wanted, parts)
    assert len(shares) <= parts and np.concatenate([wanted[s] for s in shares]).tolist() == wanted.tolist()
    entries = [set((np.searchsorted(starts, wanted[s], side="right") - 1).tolist()) for s in shares]
    assert sum(map(len, entries)) == len(set.union(*entries))  # no key frame is decoded from twice


def test_stretches_are_about_equal():
    shares = stretches.cut(list(range(0, 768, 12)), np.rint(np.linspace(0, 767, 64)).astype(int), 16)
    assert len(shares) == 16 and {s.stop - s.start for s in shares} <= {2, 3, 4, 5, 6}
    assert stretches.cut([0], np.arange(40), 8) == [slice(0, 40)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"gop": 12}, {"gop": 500}, {"gop": 12, "times": np.cumsum([33, 47] * 50)}])
def test_frames_are_the_same_in_any_number_of_parts(tmp_path, backend, options):
    path = encode(tmp_path / "a.mkv", 100, **options)
    for how in ({"num_frames": 17}, {"fps": None}, {"num_frames": 150}, {"fps": 4.0, "start": 1.0, "resize": (28, 56)}):
        one, many = (read_frames(path, backend=backend, parts=parts, **how) for parts in (1, 4))
        assert (one.frames == many.frames).all() and (one.index == many.index).all()


@pytest.mark.parametrize("name", ["charades.mp4", "unordered.mov", "kryp-2.ts", "corrupted.mp4", "h265_video.mp4"])
def test_real_files_are_the_same_in_parts(test_data, name):
    def frames(parts):
        try:
            return read_frames(test_data / "videos" / name, num_frames=8, resize=(56, 56), parts=parts).frames.tolist()
        except VideoError as error:
            return str(error)

    assert frames(3) == frames(1)
