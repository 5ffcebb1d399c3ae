"""Published TransNetV2 weights in every form -> one checkpoint; what cannot be read is one clear line."""

import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from marc_jax import checkpoint
from marc_jax.models import transnetv2
from marc_jax.paths import flatten
from tools import convert_transnetv2

CFG = transnetv2.Config(filters=2, width=16)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), transnetv2.describe(CFG))


def published(params, kind):
    flat = flatten(params)
    out = {}
    for path, name in transnetv2.names(CFG, kind).items():
        tensor = flat[path]
        if kind == "torch":
            tensor = tensor.transpose(4, 3, 0, 1, 2) if tensor.ndim == 5 else tensor.T
        out[name if kind == "torch" else f"TransNet/{name}:0"] = np.ascontiguousarray(tensor)
    return out


def check(out, params):
    tree, meta = checkpoint.restore(out, {"params": transnetv2.abstract(CFG)})
    jax.tree.map(np.testing.assert_array_equal, tree["params"], params)
    assert transnetv2.Config(**{k: v for k, v in meta["model"].items() if k != "model_type"}) == CFG


def test_safetensors_and_npz(tmp_path, params):
    tensors = published(params, "torch")
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **tensors)
    for name in ("a.safetensors", "a.npz"):
        assert convert_transnetv2.main([f"--source={tmp_path / name}", f"--out={tmp_path / 'out' / name}"]) == 0
        check(tmp_path / "out" / name, params)


def test_pth(tmp_path, params):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(t) for name, t in published(params, "torch").items()}
    state["SDDCNN.0.DDCNN.0.bn.num_batches_tracked"] = torch.tensor(5)
    torch.save(state, tmp_path / "w.pth")
    convert_transnetv2.convert(tmp_path / "w.pth", tmp_path / "out")
    check(tmp_path / "out", params)


def test_a_pth_that_holds_code_is_not_run(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"fc1.weight": torch.nn.Linear(2, 2)}, tmp_path / "w.pth")
    assert convert_transnetv2.main([f"--source={tmp_path / 'w.pth'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "w.pth: refused, it is more than tensors" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def saved_model(tmp_path):
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"graph")
    (tmp_path / "saved" / "variables" / "variables.data-00000-of-00001").write_bytes(b"numbers")
    return tmp_path / "saved"


def test_saved_model(tmp_path, params, saved_model, monkeypatch):
    """The variables as TensorFlow lists them; TensorFlow itself is stood in for."""
    variables = [
        types.SimpleNamespace(name=name, numpy=lambda t=t: t) for name, t in published(params, "tensorflow").items()
    ]
    fake = types.ModuleType("tensorflow")
    fake.saved_model = types.SimpleNamespace(load=lambda path: types.SimpleNamespace(variables=variables))
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    convert_transnetv2.convert(saved_model, tmp_path / "out")
    check(tmp_path / "out", params)


def test_without_tensorflow_the_way_out_is_named(saved_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(transnetv2.WeightsError, match="needs tensorflow; install tensorflow-cpu, or convert the .pth"):
        convert_transnetv2.read(saved_model)


def test_bad_sources(tmp_path, saved_model):
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (saved_model / "variables" / "variables.data-00000-of-00001").write_bytes(pointer)
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    for source, reason in (
        (tmp_path / "absent.pth", "no such file"),
        (tmp_path, "not a SavedModel"),
        (saved_model, "git-lfs pointer"),
        (tmp_path / "other.npz", "no tensor of TransNetV2 in it"),
        (tmp_path / "broken.npz", "not a readable .npz"),
    ):
        with pytest.raises(transnetv2.WeightsError, match=f"{source.name}.*{reason}"):
            convert_transnetv2.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path, params):
    np.savez(tmp_path / "a.npz", **published(params, "torch"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(transnetv2.WeightsError, match="exists and is not empty"):
        convert_transnetv2.convert(tmp_path / "a.npz", tmp_path / "out")
