"""Shrunk patches are the patches of shrunk frames."""

import numpy as np
import pytest

from data_pipelines.patches import frames_to_pixel_patches
from marc_jax.baselines.lower_resolution import shrink


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_patches_of_frames_shrunk_by_area(factor):
    frames = np.random.default_rng(0).integers(0, 256, (4, 168, 84 * 2, 3), np.uint8)
    patches, (_, *grid) = frames_to_pixel_patches(frames)
    got, small = shrink(patches[None], tuple(grid), factor)
    means = frames.reshape(4, 168 // factor, factor, 168 // factor, factor, 3).mean((2, 4))
    want, (_, *want_grid) = frames_to_pixel_patches(np.rint(means).astype(np.uint8))
    assert list(small) == want_grid and got.dtype == np.uint8
    assert np.abs(np.asarray(got[0], int) - want).max() <= 1  # a mean on a half may round either way
    assert np.mean(np.asarray(got[0]) != want) < 1e-3


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="no multiple of 4"):
        shrink(np.zeros((1, 1, 36, 1176), np.uint8), (6, 6), 2)
