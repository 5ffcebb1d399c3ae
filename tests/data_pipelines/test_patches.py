"""Sizes, resizing and patch order against PIL, torch and the written rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import patches

SMALL = dict(min_pixels=128 * 784, max_pixels=int(1.05 * 128 * 784))


@pytest.mark.parametrize(
    ("source", "limits", "expected"),
    [
        ((1080, 1920), SMALL, (224, 420)),
        ((360, 640), SMALL, (224, 420)),
        ((480, 640), SMALL, (280, 364)),
        ((240, 320), SMALL, (280, 392)),
        ((336, 336), SMALL, (308, 308)),
        ((720, 1280), dict(min_pixels=3136, max_pixels=256 * 784), (336, 588)),
        ((720, 1280), {}, (560, 1008)),
        ((42, 70), dict(min_pixels=784, max_pixels=10**6), (56, 56)),  # 1.5 and 2.5 round to the even 2
        ((1, 1), dict(min_pixels=784, max_pixels=10**6), (28, 28)),
    ],
)
def test_smart_resize_gives_the_published_sizes(source, limits, expected):
    assert patches.smart_resize(*source, **limits) == expected


def test_smart_resize_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="aspect ratio"):
        patches.smart_resize(1, 201)
    assert patches.smart_resize(10, 2000)[0] >= 28
    for bad in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="no picture"):
            patches.smart_resize(*bad)
    with pytest.raises(ValueError, match="above max_pixels"):
        patches.smart_resize(9, 9, min_pixels=9, max_pixels=8)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_smart_resize_keeps_its_promises(height, width):
    if max(height, width) > 200 * min(height, width):
        return
    h, w = patches.smart_resize(height, width)
    assert h % 28 == w % 28 == 0 and h >= 28 and w >= 28 and h * w >= patches.VIDEO_MIN_PIXELS * 0.5
    if patches.VIDEO_MIN_PIXELS <= h * w <= patches.VIDEO_MAX_PIXELS:
        assert patches.smart_resize(h, w) == (h, w)


def test_a_video_shares_its_budget():
    budget = patches.VideoBudget()
    assert budget.size(1080, 1920, 64) == (560, 1008)
    few, many = budget.size(1080, 1920, 300), budget.size(1080, 1920, 768)
    assert few == (560, 1008) and many[0] * many[1] <= 90_316_800 / 768 * 2 < few[0] * few[1]


def test_the_limit_of_the_library_is_stretched_by_a_twentieth_and_the_users_is_not():
    assert patches.VIDEO_R1_BUDGET.size(480, 640, 64) == (280, 364)
    assert patches.VideoBudget(max_pixels=128 * 784).size(480, 640, 64) == (252, 364)
    assert patches.VideoBudget(total_pixels=1).size(480, 640, 64) == (280, 364)
    with pytest.raises(ValueError, match="min_pixels 100352 is above max_pixels 50000"):
        patches.VideoBudget(max_pixels=50_000).size(480, 640, 64)


@pytest.mark.parametrize("size", [(224, 420, 720, 1280), (280, 392, 240, 320), (28, 84, 56, 57), (112, 56, 33, 91)])
def test_resizing_is_pils_bicubic(size):
    image = pytest.importorskip("PIL.Image")
    new_h, new_w, h, w = size
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(h) * 255 // h, np.arange(w) * 90 // w).astype(np.uint8)
    frames = np.stack([rng.integers(0, 256, (h, w, 3), np.uint8), np.repeat(smooth[..., None], 3, -1)])
    ours = patches.resize_frames(frames, new_h, new_w, like="pillow").astype(int)
    # Recent Pillow goes height first for some sizes; the reference here is width first, as it always went before.
    wide = [image.fromarray(f).resize((new_w, h), image.Resampling.BICUBIC) for f in frames]
    theirs = np.stack([np.asarray(f.resize((new_w, new_h), image.Resampling.BICUBIC), int) for f in wide])
    differ = np.abs(ours - theirs)
    assert differ.max() <= 1 and (differ > 0).mean() < 2e-3  # measured: 3e-5 to 9e-4 of the values, by 1


def test_resizing_is_torchs_antialiased_bicubic():
    torch = pytest.importorskip("torch")
    frames = np.random.default_rng(1).integers(0, 256, (1, 90, 160, 3), np.uint8)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    theirs = torch.nn.functional.interpolate(planes, (56, 196), mode="bicubic", antialias=True)
    theirs = theirs.clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    differ = np.abs(patches.resize_frames(frames, 56, 196).astype(int) - theirs)
    assert differ.max() <= 1 and (differ > 0).mean() < 1e-3


def test_resizing_keeps_flat_and_equal_sizes():
    flat = np.full((2, 30, 50, 3), 201, np.uint8)
    assert (patches.resize_frames(flat, 28, 84) == 201).all()
    assert patches.resize_frames(flat, 30, 50) is flat
    with pytest.raises(ValueError, match="uint8"):
        patches.resize_frames(flat.astype(float), 28, 28)


def test_other_pixels_need_another_name():
    """Memories are told apart by `patches.RESIZE`: where these numbers change, it must change too."""
    y, x = np.mgrid[0:37, 0:53]
    frame = np.stack([(7 * x + 3 * y) % 256, (x * y) % 256, 255 * ((x // 5 + y // 7) % 2)], -1).astype(np.uint8)
    small = [[[6, 0, 0], [191, 24, 255]], [[69, 11, 244], [160, 69, 0]]]
    large = [[[0, 0, 0], [211, 0, 0]], [[63, 0, 251], [18, 121, 255]]]
    for got, want in (
        (patches.resize_frames(frame[None], 14, 28)[0, ::8, ::14], small),
        (patches.resize_frames(frame[None], 56, 70)[0, ::32, ::40], large),
    ):
        assert np.abs(got.astype(int) - want).max() <= 1
    assert patches.RESIZE == "antialiased bicubic -0.5, rounded once"


def slow_patches(frames):
    """The rule in words: t, block row, block column, row in block, column in block; then C, frame, y, x."""
    rows = []
    for t in range(0, len(frames), 2):
        for by in range(0, frames.shape[1], 28):
            for bx in range(0, frames.shape[2], 28):
                for y in (by, by + 14):
                    for x in (bx, bx + 14):
                        cube = frames[t : t + 2, y : y + 14, x : x + 14]
                        rows.append(cube.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(rows)


def test_patch_order_and_values():
    frames = np.random.default_rng(2).integers(0, 256, (4, 56, 84, 3), np.uint8)
    got, grid = patches.frames_to_pixel_patches(frames)
    assert grid == (2, 4, 6) and got.shape == (2, 24, 1176) and got.dtype == np.uint8
    assert (got.reshape(-1, 1176) == slow_patches(frames)).all()
    scaled, same_grid = patches.frames_to_patches(frames)
    reference = slow_patches((frames / 255.0 - patches.MEAN.astype(float)) / patches.STD.astype(float))
    assert same_grid == grid and scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.reshape(-1, 1176), reference, atol=2e-6)
    by_vectors = (got.astype(np.float32) / 255 - patches.PATCH_MEAN) / patches.PATCH_STD
    np.testing.assert_allclose(scaled, by_vectors, atol=2e-6)


def test_an_odd_frame_is_doubled_and_bad_shapes_are_named():
    frames = np.random.default_rng(3).integers(0, 256, (3, 28, 28, 3), np.uint8)
    odd, grid = patches.frames_to_pixel_patches(frames)
    even, _ = patches.frames_to_pixel_patches(frames[[0, 1, 2, 2]])
    assert grid == (2, 2, 2) and (odd == even).all()
    for bad in (frames[:, :14], frames[..., :1], frames[:0], frames.astype(np.float32)):
        with pytest.raises(ValueError):
            patches.frames_to_pixel_patches(bad)


def test_threads_change_no_pixel():
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), np.uint8)
    for like in ("torchvision", "pillow"):
        one, many = (patches.resize_frames(frames, 28, 56, like, threads=n) for n in (1, 3))
        assert (one == many).all()
    assert (patches.squash(frames, 32, threads=3) == patches.squash(frames, 32)).all()
