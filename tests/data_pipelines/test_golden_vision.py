"""qwen-vl-utils' and transformers' answers kept in a file, for where torch is not installed."""

import numpy as np
import pytest
from make_golden_vision import FILE, IMAGE_HW, IMAGES, SAMPLED, VIDEO_HW, VIDEOS, answers, frames

from data_pipelines import patches, video


@pytest.fixture(scope="module")
def golden():
    return np.load(FILE)


def test_frames_and_sizes_are_the_golden_ones(golden):
    got = [
        video.sample_indices(np.arange(total) / rate, rate, fps=fps, min_frames=min(low, total), max_frames=high)
        for total, rate, fps, low, high in SAMPLED
    ]
    assert [len(i) for i in got] == golden["counts"].tolist()
    assert np.concatenate(got).tolist() == golden["indices"].tolist()
    sizes = [patches.smart_resize(h, w, 28, low, high) for h, w, low, high in IMAGES]
    assert sizes == [tuple(size) for size in golden["sizes"]]
    for (h, w, n, low, high, total), size in zip(VIDEOS, golden["video_sizes"], strict=True):
        assert patches.VideoBudget(low, high or None, total).size(h, w, n) == tuple(size)


def test_pixels_and_patches_are_the_golden_ones(golden):
    for got, want in (
        (patches.resize_frames(frames()[[0, 1, 2, 2]], *VIDEO_HW), golden["video"]),
        (patches.resize_frames(frames()[2:], *IMAGE_HW, like="pillow")[0], golden["image"]),
    ):
        levels = np.abs(got.astype(int) - want)
        assert levels.max() <= 1 and (levels > 0).mean() < 5e-3
    rows, grid = patches.frames_to_patches(golden["video"][:3])  # the last frame is repeated
    assert grid == (2, 4, 6)
    np.testing.assert_allclose(rows.reshape(-1, 1176)[5], golden["row"], atol=2e-6)
    np.testing.assert_allclose(rows.reshape(-1, 1176).sum(1), golden["row_sums"], atol=2e-3)


def test_the_golden_file_is_what_the_library_answers(golden, qwen_vl_utils, monkeypatch):
    monkeypatch.setitem(qwen_vl_utils.VIDEO_READER_BACKENDS, "pyav", None)  # restored afterwards
    for name, value in answers(qwen_vl_utils).items():
        np.testing.assert_allclose(value, golden[name], atol=1e-3 if name == "row_sums" else 1, err_msg=name)
