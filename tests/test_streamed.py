"""Streamed leaves: the same checkpoint as from whole arrays, one chunk at a time."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax import checkpoint
from marc_jax.streamed import Streamed, chunk_shape, indices


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(4, 400), st.booleans())
def test_chunks_cover_every_number_once_and_keep_the_limit(shape, limit, layered):
    leaf = Streamed(tuple(shape), np.float32, lambda index: None, layered)
    chunk = chunk_shape(leaf, limit)
    assert np.prod(chunk) * 4 <= limit
    assert not layered or chunk[0] == 1
    seen = np.zeros(shape, int)
    for index in indices(leaf.shape, chunk):
        seen[index] += 1
    assert (seen == 1).all()


def test_a_streamed_leaf_is_saved_as_if_it_were_whole(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((5, 300, 700)).astype(np.float32)
    asked = []

    def part(index):
        asked.append(numbers[index].nbytes)
        return numbers[index]

    tree = {"a": Streamed(numbers.shape, np.float32, part, layered=True), "b": numbers[0], "c": jax.numpy.ones(3)}
    tree["d"] = Streamed((), np.float32, lambda index: np.float32(7))
    checkpoint.save(tmp_path, 0, tree)
    read, _ = checkpoint.restore(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
    np.testing.assert_array_equal(read["a"], numbers)
    np.testing.assert_array_equal(read["b"], numbers[0])
    assert read["d"].shape == () and read["d"] == 7
    assert asked == [numbers[0].nbytes] * 5


def test_a_part_that_fails_leaves_no_step(tmp_path):
    def part(index):
        if index[0].start:
            raise OSError(5, "Input/output error")
        return np.zeros((1, 4), np.float32)

    with pytest.raises(checkpoint.CheckpointError, match="was not saved: Input/output error"):
        checkpoint.save(tmp_path, 0, {"a": Streamed((2, 4), np.float32, part, layered=True)})
    assert list(tmp_path.iterdir()) == []
