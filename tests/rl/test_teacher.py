"""The teacher's cached accuracies survive restarts, kills and other teachers in the same file."""

import dataclasses

import numpy as np
import pytest

from marc_jax.rl.rollout import Sampling
from marc_jax.rl.teacher import TeacherCache, weights_hash

SETTINGS = {"temperature": 1.0, "g": 2}


def test_what_was_added_is_found_again(tmp_path):
    path = tmp_path / "deep" / "a_full.jsonl"
    cache = TeacherCache(path, "w", SETTINGS)
    cache.add(["a", 7], [[1, 0], [1, 1]])
    again = TeacherCache(path, "w", SETTINGS)
    np.testing.assert_array_equal(again.a_full([7, "a", "b"]), [1.0, 0.5, np.nan])
    assert len(again) == 2 and "a" in again and again.missing(["b", "a", "b"]) == ["b"]


def test_other_weights_or_settings_are_other_entries(tmp_path):
    path = tmp_path / "a.jsonl"
    TeacherCache(path, "w", SETTINGS).add(["a"], [[1, 1]])
    TeacherCache(path, "v", SETTINGS).add(["a"], [[0, 0]])
    assert TeacherCache(path, "w", SETTINGS).a_full(["a"]) == [1.0]
    assert TeacherCache(path, "v", SETTINGS).a_full(["a"]) == [0.0]
    assert TeacherCache(path, "w", SETTINGS | {"g": 4}).missing(["a"]) == ["a"]


def test_settings_may_be_the_samplers(tmp_path):
    how = Sampling(max_new=4, stop_ids=(1, 2), pad_id=0)
    TeacherCache(tmp_path / "a", "w", how).add(["a"], [[1.0]])
    assert "a" in TeacherCache(tmp_path / "a", "w", how)
    assert "a" not in TeacherCache(tmp_path / "a", "w", dataclasses.replace(how, temperature=0.5))


def test_a_line_cut_short_is_computed_again(tmp_path):
    path = tmp_path / "a.jsonl"
    cache = TeacherCache(path, "w", SETTINGS)
    cache.add(["a"], [[1, 0]])
    cache.add(["b"], [[1, 1]])
    path.write_bytes(path.read_bytes()[:-9])
    torn = TeacherCache(path, "w", SETTINGS)
    assert torn.skipped_lines == 1 and torn.missing(["a", "b"]) == ["b"]
    torn.add(["b", "c"], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(TeacherCache(path, "w", SETTINGS).a_full(["a", "b", "c"]), [0.5, 0.5, 0.0])


def test_fill_computes_only_what_is_missing_and_keeps_each_batch(tmp_path):
    cache = TeacherCache(tmp_path / "a", "w", SETTINGS)
    asked = []

    def compute(ids):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(list(ids))
        return np.ones((len(ids), 2))

    with pytest.raises(KeyboardInterrupt):
        cache.fill(list("abcdef"), compute, batch=2)
    again = TeacherCache(tmp_path / "a", "w", SETTINGS)
    assert again.missing(list("abcdef")) == ["e", "f"]
    np.testing.assert_array_equal(again.fill(list("abef"), lambda ids: np.zeros((len(ids), 2))), [1, 1, 0, 0])


@pytest.mark.parametrize("bad", [[[np.nan, 1.0]], [[2.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [1.0]])
def test_impossible_accuracies_are_refused_and_not_written(tmp_path, bad):
    cache = TeacherCache(tmp_path / "a", "w", SETTINGS)
    with pytest.raises(ValueError):
        cache.add(["a"], bad)
    assert not (tmp_path / "a").exists()


def test_the_hash_sees_values_names_and_types_but_not_nesting():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    base = weights_hash({"a": {"b": x}, "c": x})
    assert base == weights_hash({"c": x, "a/b": x})
    assert len({base, weights_hash({"a": {"b": x + 1}, "c": x}), weights_hash({"a": {"d": x}, "c": x}),
                weights_hash({"a": {"b": x.T}, "c": x}), weights_hash({"a": {"b": x.astype(np.float16)}, "c": x})}) == 5
