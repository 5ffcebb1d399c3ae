"""TransNetV2 against the authors' port (its answers in a file; the port itself where TRANSNETV2_PORT names it)."""

import os

import jax
import numpy as np
import pytest
from make_golden_transnetv2 import FILE, LENGTHS, SMALL, answers, clip, port, weights

from marc_jax.models import transnetv2
from marc_jax.paths import flatten


def ours(cfg, params, frames, dtype=np.float32):
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, x: transnetv2.bind(cfg, p, dtype=dtype)(x))
        return np.stack(jax.device_get(run(params, frames)))


@pytest.fixture(scope="module")
def small():
    return transnetv2.assemble(SMALL, weights(SMALL))


@pytest.fixture(scope="module")
def authors():
    """The path of the authors' port."""
    pytest.importorskip("torch")
    if "TRANSNETV2_PORT" not in os.environ:
        pytest.skip("TRANSNETV2_PORT does not name the authors' transnetv2_pytorch.py")
    return os.environ["TRANSNETV2_PORT"]


@pytest.mark.parametrize("length", LENGTHS)
def test_golden_answers(small, length):
    golden = np.load(FILE)[f"t{length}"]
    assert golden.std() > 0.05  # the weights are large enough for the test to see the input
    np.testing.assert_allclose(ours(SMALL, small, clip(length)), golden, atol=1e-5)


def test_published_size_equals_the_port(authors):
    cfg = transnetv2.Config()
    tensors, frames = weights(cfg), clip(30)
    theirs = answers(port(authors, cfg, tensors), frames)
    np.testing.assert_allclose(ours(cfg, transnetv2.assemble(cfg, tensors), frames), theirs, atol=2e-5)


def test_training_equals_the_port_without_dropout(authors, small):
    tensors, frames = weights(SMALL), clip(30)
    model = port(authors, SMALL, tensors).train()
    model.dropout.p = 0.0
    theirs = answers(model, frames)
    with jax.default_matmul_precision("highest"):
        net, seen = transnetv2.bind(SMALL, small), {}
        mine = np.stack(jax.device_get(net._heads(net._features(jax.numpy.asarray(frames), seen))))
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
    running = model.state_dict()["SDDCNN.1.DDCNN.0.bn.running_var"].numpy()
    before = tensors["SDDCNN.1.DDCNN.0.bn.running_var"]
    np.testing.assert_allclose(0.9 * before + 0.1 * np.asarray(seen["stack1"]["cell0"]["var"]), running, rtol=1e-4)


def test_training_drops_half_of_the_hidden_layer_by_its_key(small):
    net, frames = transnetv2.bind(SMALL, small), jax.numpy.asarray(clip(7))
    first, again, other = (net.train(frames, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_bfloat16_is_near(small):
    exact, rough = ours(SMALL, small, clip(7)), ours(SMALL, small, clip(7), jax.numpy.bfloat16)
    assert np.linalg.norm(rough - exact) < 3e-2 * np.linalg.norm(exact)


def test_parameters_of_the_published_model():
    flat = flatten(transnetv2.describe(transnetv2.Config()))
    trained = [w.size for path, w in flat.items() if not path.endswith(("norm/mean", "norm/var"))]
    assert len(flat) == 84 and sum(trained) == 7_616_258
    params = transnetv2.init(SMALL, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), transnetv2.abstract(SMALL)
    )


def test_a_black_frame_falls_into_one_bin_and_every_pixel_is_counted():
    counts = np.asarray(transnetv2.colour_histograms(clip(7)))
    assert (counts[:, 2, 0] == 27 * 48).all() and (counts.sum(-1) == 27 * 48).all()
    red = np.zeros((1, 1, 27, 48, 3), np.uint8) + np.array([255, 32, 64], np.uint8)
    assert np.asarray(transnetv2.colour_histograms(red))[0, 0, (7 << 6) + (1 << 3) + 2] == 27 * 48


@pytest.mark.parametrize("length", [1, 7, 50, 51, 130])
def test_band_is_the_diagonal_neighbourhood(length):
    square = np.random.default_rng(0).normal(size=(2, length, length)).astype(np.float32)
    want = np.zeros((2, length, 101), np.float32)
    for t in range(length):
        for k in range(101):
            if 0 <= t + k - 50 < length:
                want[:, t, k] = square[:, t, t + k - 50]
    np.testing.assert_array_equal(transnetv2.band(jax.numpy.asarray(square), 101), want)


@pytest.mark.parametrize("n", [1, 49, 50, 51, 100, 101])
def test_windows_cover_a_video_of_any_length(small, n):
    """Against windows cut one by one from the video continued by its end frames."""
    frames = clip(101, batch=1)[0][:n]
    after = 25 + (-n % 50)
    padded = np.concatenate([np.repeat(frames[:1], 25, 0), frames, np.repeat(frames[-1:], after, 0)])
    windows = np.stack([padded[i : i + 100] for i in range(0, len(padded) - 99, 50)])
    assert len(windows) == -(-n // 50)
    want = 1 / (1 + np.exp(-ours(SMALL, small, windows)[:, :, 25:75].reshape(2, -1)[:, :n]))
    for batch in (1, 2):
        got = transnetv2.predict(SMALL, small, frames, batch=batch)
        np.testing.assert_allclose(np.stack(got), want, atol=1e-5)


@pytest.mark.parametrize(
    "high, want",
    [
        ("00100", [[0, 2], [3, 4]]),
        ("001100", [[0, 2], [4, 5]]),
        ("10010", [[1, 3], [4, 4]]),
        ("0001", [[0, 3]]),
        ("111", [[0, 2]]),
        ("000", [[0, 2]]),
        ("0", [[0, 0]]),
        ("0110110", [[0, 1], [3, 4], [6, 6]]),
    ],
)
def test_scene_rule(high, want):
    assert transnetv2.scenes(np.array([0.51 if c == "1" else 0.5 for c in high])).tolist() == want


def test_the_original_names_lead_to_the_same_parameters(small):
    table = zip(*(transnetv2.names(SMALL, kind).items() for kind in ("torch", "tensorflow")), strict=True)
    theirs, tensors = weights(SMALL), {}
    for (path, torch), (same, tensorflow) in table:
        assert path == same
        scope = "TransNet/FrameSimilarity/" if path.startswith("similarity") else "TransNet/"
        tensor = theirs[torch]
        tensor = tensor.transpose(2, 3, 4, 1, 0) if tensor.ndim == 5 else tensor.T
        tensors[f"{scope}{tensorflow}:0"] = tensor
    jax.tree.map(np.testing.assert_array_equal, transnetv2.assemble(SMALL, tensors), small)


def test_weights_that_do_not_fit_are_named():
    tensors = weights(SMALL) | {"SDDCNN.0.DDCNN.0.bn.num_batches_tracked": np.array(3)}
    transnetv2.assemble(SMALL, tensors)
    kernel = tensors.pop("fc1.weight")
    with pytest.raises(transnetv2.WeightsError, match="x.pth: 1 tensors missing: fc1.weight"):
        transnetv2.assemble(SMALL, tensors, "x.pth")
    with pytest.raises(transnetv2.WeightsError, match="1 tensors left over: extra"):
        transnetv2.assemble(SMALL, tensors | {"fc1.weight": kernel, "extra": kernel})
    with pytest.raises(transnetv2.WeightsError, match="fc1.weight of shape"):
        transnetv2.assemble(SMALL, tensors | {"fc1.weight": kernel[:, 1:]})


def test_frames_of_another_size_are_refused(small):
    with pytest.raises(ValueError, match=r"uint8 \[B, T, 27, 48, 3\]"):
        transnetv2.bind(SMALL, small)(np.zeros((1, 3, 48, 27, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \[n >= 1, 27, 48, 3\]"):
        transnetv2.predict(SMALL, small, np.zeros((0, 27, 48, 3), np.uint8))
