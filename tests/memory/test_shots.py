"""TransNetV2 over files: times of borders, spans in patches, weights from a checkpoint."""

import jax
import numpy as np
import pytest

from data_pipelines.video import VideoError
from marc_jax import checkpoint
from marc_jax.memory import events, shots
from marc_jax.models import transnetv2

CFG = transnetv2.Config(filters=1, width=4)


@pytest.fixture(scope="module")
def params():
    return transnetv2.init(CFG, jax.random.key(0))


def test_transitions_are_divided_in_the_middle():
    scenes = transnetv2.scenes(np.array([float(c) for c in "0010001110"]))  # one frame, then three
    assert scenes.tolist() == [[0, 2], [3, 6], [9, 9]]
    assert shots.middles(scenes).tolist() == [3, 8]
    assert shots.middles(np.array([[0, 7]])).tolist() == []


def test_times_become_patches():
    seconds = np.arange(12) * 0.25
    cuts = lambda *times: np.repeat(times, 3).reshape(-1, 3)  # noqa: E731
    assert shots.spans_of_times(cuts(1.0, 1.9), seconds) == [(0, 2), (2, 4), (4, 6)]
    assert shots.spans_of_times(cuts(), seconds) == [(0, 6)]
    options = events.Options(min_len=2, max_len=3)
    assert shots.spans_of_times(cuts(0.5, 2.5), seconds, options) == [(0, 3), (3, 6)]


def test_patches_of_a_transition_belong_to_no_event():
    seconds = np.arange(12) * 0.25
    assert shots.spans_of_times([[1.25, 0.9, 1.6]], seconds) == [(0, 2), (4, 6)]
    assert shots.spans_of_times([[1.1, 1.1, 1.1]], seconds) == [(0, 2), (3, 6)]  # a cut between a patch's two frames


def test_a_file_has_the_borders_of_its_frames(test_data, params, monkeypatch):
    """What the network says is put in its place: here, that the frames 30 and 75 are transitions of one frame."""
    one_hot = np.isin(np.arange(250), [29, 75]).astype(np.float32)
    asked = []
    monkeypatch.setattr(transnetv2, "predict", lambda cfg, p, frames, batch: (asked.append(frames), one_hot)[1:] * 2)
    found = shots.Shots(CFG, params).borders(test_data / "videos" / "bikes.mp4")
    assert asked[0].shape == (250, 27, 48, 3)
    np.testing.assert_allclose(found, np.repeat([[30 / 25], [76 / 25]], 3, axis=1))


def test_an_odd_number_of_frames_is_not_padded(test_data, params):
    name = test_data / "videos" / "kryp-2.ts"  # 33 frames
    worker = shots.Shots(CFG, params, batch=1)
    assert worker.spans(name, np.arange(10) * 0.125)[-1][1] == 5
    with pytest.raises(VideoError, match="corrupted.mp4"):
        worker.borders(test_data / "videos" / "corrupted.mp4")


def test_weights_come_from_a_checkpoint(tmp_path, params):
    with pytest.raises(checkpoint.CheckpointError, match="make one with tools.convert_transnetv2"):
        shots.Shots.load(tmp_path)
    checkpoint.save(tmp_path / "other", 0, {"params": params}, {"model": {"model_type": "qwen2_5_vl"}})
    with pytest.raises(checkpoint.CheckpointError, match="holds no TransNetV2"):
        shots.Shots.load(tmp_path / "other")
    model = {"model_type": "transnetv2", "filters": 1, "width": 4}
    checkpoint.save(tmp_path / "right", 0, {"params": params}, {"model": model})
    loaded = shots.Shots.load(tmp_path / "right")
    assert loaded.cfg == CFG and loaded.fingerprint == shots.Shots(CFG, params).fingerprint
