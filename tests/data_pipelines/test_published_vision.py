"""Frames, sizes and patches against qwen-vl-utils 0.0.14 and transformers' Qwen2VL processors ([parity] extra).

The same rules against committed answers, without torch: test_golden_vision.py.
"""

import cv2
import numpy as np
import pytest

from data_pipelines import media, patches, video

LEVEL = 1 / 255 / patches.STD.min()  # one level of a pixel, normalised


@pytest.fixture
def processors(qwen_vl_utils):
    """transformers' image and video processors with the published limits, which leave qwen-vl-utils' sizes alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is the [parity] extra")
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    return transformers.Qwen2VLImageProcessor(size=size), transformers.Qwen2VLVideoProcessor(size=size)


def published_indices(module, total, rate, element):
    import torch

    first, last, count = module.calculate_video_frame_range(element, total, rate)
    n = module.smart_nframes(element, total_frames=count, video_fps=rate)
    return torch.linspace(first, last, n).round().long().tolist()


@pytest.mark.parametrize("rate", [7.5, 10.0, 23.976, 25.0, 30000 / 1001, 60.0])
def test_the_same_frames_are_taken(qwen_vl_utils, rate):
    for total in (2, 3, 4, 5, 7, 9, 30, 64, 125, 250, 491, 1090, 3001, 20_000):
        times = np.arange(total) / rate
        for fps in (0.3, 1.0, 2.0, 3.3, 30.0):
            for low, high in ((4, 768), (4, 64), (4, 63), (5, 16), (16, 32), (2, 2)):
                element = {"fps": fps, "min_frames": low, "max_frames": high}
                got = video.sample_indices(times, rate, fps=fps, min_frames=low, max_frames=high)
                assert got.tolist() == published_indices(qwen_vl_utils, total, rate, element), (total, element)
            default = video.sample_indices(times, rate, fps=fps, max_frames=768)
            assert default.tolist() == published_indices(qwen_vl_utils, total, rate, {"fps": fps})


@pytest.mark.parametrize("rate", [10.0, 25.0, 30000 / 1001])
def test_the_same_part_of_a_video_is_taken(qwen_vl_utils, rate):
    rng = np.random.default_rng(0)
    for _ in range(200):
        total = int(rng.integers(20, 2000))
        start, end = np.sort(rng.uniform(-1, total / rate + 1, 2))
        if end - start < 3 / rate or start > (total - 3) / rate or end < 3 / rate:
            continue
        got = video.sample_indices(np.arange(total) / rate, rate, start=start, end=end, max_frames=768)
        theirs = published_indices(qwen_vl_utils, total, rate, {"video_start": start, "video_end": end})
        assert got.tolist() == theirs, (total, start, end)


def test_the_same_sizes_of_images(qwen_vl_utils):
    rng = np.random.default_rng(1)
    for _ in range(5000):
        h, w = (int(x) for x in np.exp(rng.uniform(np.log(4), np.log(6000), 2)))
        low, high = (int(x) for x in np.sort(np.exp(rng.uniform(np.log(784), np.log(2e7), 2))))
        if max(h, w) > 200 * min(h, w):
            continue
        theirs = qwen_vl_utils.smart_resize(h, w, 28, low, high)
        if min(theirs) > 0:  # theirs cuts a long side down to nothing where ours keeps 28 pixels
            assert patches.smart_resize(h, w, 28, low, high) == theirs, (h, w, low, high)


def test_the_same_sizes_of_videos(qwen_vl_utils, monkeypatch):
    """Every budget: none given, a strict max_pixels, total_pixels, min_pixels whose 1.05 goes before the others."""
    import torch

    rng, sizes = np.random.default_rng(2), []
    resize = lambda picture, size, **_: sizes.append(tuple(size)) or picture[..., :1, :1]  # noqa: E731
    monkeypatch.setattr(qwen_vl_utils.transforms.functional, "resize", resize)
    for _ in range(2000):
        n = int(rng.integers(1, 385)) * 2
        h, w = (int(x) for x in rng.integers(30, 2200, 2))
        element = {"video": "any"}
        if rng.random() < 0.5:
            element["min_pixels"] = int(rng.integers(4 * 784, 200 * 784))
        if rng.random() < 0.5:
            element["total_pixels"] = int(rng.integers(784, 10**8))
        if rng.random() < 0.5:
            element["max_pixels"] = int(rng.integers(element.get("min_pixels", 128 * 784), 1000 * 784))
        given = {k: v for k, v in element.items() if k != "video"}
        reader = lambda _, n=n, h=h, w=w: (torch.zeros(1).expand(n, 3, h, w), {}, 2.0)  # noqa: E731
        monkeypatch.setitem(qwen_vl_utils.VIDEO_READER_BACKENDS, "pyav", reader)
        qwen_vl_utils.fetch_video(element)
        if min(sizes[-1]) > 0:
            assert patches.VideoBudget(**given).size(h, w, n) == sizes[-1], (h, w, n, given)
    assert len(sizes) == 2000


def assert_levels(got, theirs, most, share):
    """Equal up to `most` levels, and off by any in no more than `share` of the values."""
    assert got.shape == theirs.shape
    levels = np.abs(got - theirs) / LEVEL
    assert levels.max() < most + 0.1 and (levels > 0.1).mean() <= share, (levels.max(), (levels > 0.1).mean())


@pytest.mark.parametrize(
    ("name", "element", "share"),
    [
        ("bikes.mp4", {"fps": 2.0, "max_frames": 8}, 1e-3),
        ("counter.mp4", {"nframes": 5, "min_pixels": 3136, "max_pixels": 100352}, 1e-3),
        ("dog.mp4", {"nframes": 7}, 5e-3),
        ("charades.mp4", {"fps": 1.0, "video_start": 3.0, "video_end": 9.5, "max_frames": 6}, 1e-3),
        ("demo.mp4", {"nframes": 4, "total_pixels": 50_000}, 1e-3),
        ("chaplin.mp4", {"nframes": 2, "resized_height": 100, "resized_width": 150}, 1e-3),
    ],
)
def test_patches_of_a_real_file(qwen_vl_utils, processors, test_data, name, element, share):
    element = {"type": "video", "video": str(test_data / "videos" / name), **element}
    (frames, metadata), sample_fps = qwen_vl_utils.fetch_video(
        element, return_video_sample_fps=True, return_video_metadata=True
    )
    theirs = processors[1](videos=[frames], do_sample_frames=False, return_tensors="np")
    got = media.load(element)
    assert got.grid == tuple(theirs["video_grid_thw"][0])
    assert got.second_per_grid == pytest.approx(2 / sample_fps, rel=1e-12)
    assert len(got.seconds) == len(metadata["frames_indices"])
    assert_levels(patches.normalise_patches(got.patches).reshape(-1, 1176), theirs["pixel_values_videos"], 1, share)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("limits", [{}, {"max_pixels": 100_000}, {"min_pixels": 500_000}])
def test_patches_of_an_image(qwen_vl_utils, processors, tmp_path, suffix, limits):
    picture = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 256, (271, 401, 3), np.uint8), (9, 9), 3)
    cv2.imwrite(str(tmp_path / f"a{suffix}"), picture)
    element = {"type": "image", "image": str(tmp_path / f"a{suffix}"), **limits}
    theirs = processors[0](images=[qwen_vl_utils.fetch_image(element)], return_tensors="np")
    got = media.load(element)
    assert got.grid == tuple(theirs["image_grid_thw"][0])
    assert_levels(patches.normalise_patches(got.patches).reshape(-1, 1176), theirs["pixel_values"], 1, 5e-3)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_what_is_transparent_becomes_white(qwen_vl_utils, tmp_path, suffix):
    image = pytest.importorskip("PIL.Image")
    rgba = np.random.default_rng(4).integers(0, 256, (56, 84, 4), np.uint8)
    image.fromarray(rgba).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    theirs = np.asarray(qwen_vl_utils.fetch_image({"image": str(tmp_path / f"a{suffix}")}))
    assert (video.read_image(tmp_path / f"a{suffix}") == theirs).all()


def test_opencv_would_not_do(qwen_vl_utils, test_data):
    """The measured difference of OpenCV's plain bicubic, and of ours, from torchvision's antialiased one."""
    import torch

    frames = video.read_frames(test_data / "videos" / "counter.mp4", num_frames=2).frames
    functional = qwen_vl_utils.transforms.functional
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    bicubic = qwen_vl_utils.InterpolationMode.BICUBIC
    theirs = functional.resize(planes, [224, 420], interpolation=bicubic, antialias=True)
    theirs = theirs.permute(0, 2, 3, 1).numpy().astype(int)
    plain = np.stack([cv2.resize(f, (420, 224), interpolation=cv2.INTER_CUBIC) for f in frames])
    ours = patches.resize_frames(frames, 224, 420)
    assert np.abs(plain - theirs).max() > 50
    assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 1e-3
