"""Checkpoints in and out: every naming generation, sharded or not, damage of every kind, and back to transformers."""

import json
import shutil

import jax
import numpy as np
import pytest

from marc_jax.models import qwen25_vl, weights
from marc_jax.models.safetensors_io import INDEX, WeightsError, open_folder, write_folder
from tools import convert_weights, export_weights


def _random(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), qwen25_vl.describe(cfg))


def _write(folder, cfg, params, rename=lambda n: n, shard_bytes=10**9, drop=(), extra=()):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg)))
    tensors = [(rename(n), t) for n, t in weights.published(cfg, params, np.float32) if n not in drop]
    tensors += [(n, np.zeros(s, np.float32)) for n, s in extra]
    write_folder(folder, [(n, t.dtype, t.shape) for n, t in tensors], iter(tensors), shard_bytes)
    return folder


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _in_memory(name):
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def _older(name):
    return name if name.startswith("visual.") else "language_model." + name


@pytest.mark.parametrize("rename", [lambda n: n, _in_memory, _older], ids=["published", "in-memory", "older"])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_form_of_a_checkpoint_loads(tmp_path, rename, shard_bytes, tied):
    cfg = qwen25_vl.tiny(tie_word_embeddings=tied, num_layers=3)
    params = _random(cfg)
    folder = _write(tmp_path / "model", cfg, params, rename, shard_bytes)
    assert (folder / INDEX).exists() == (shard_bytes < 10**9)
    read = qwen25_vl.config_from_hf(folder)
    assert read == cfg
    _same(weights.load(folder, read, qwen25_vl.abstract(read)), params)


def test_loading_onto_a_mesh_gives_the_same_numbers(tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    from marc_jax import sharding

    cfg = qwen25_vl.tiny(num_heads=8)
    params = _random(cfg)
    folder = _write(tmp_path / "model", cfg, params)
    abstract = qwen25_vl.abstract(cfg, mesh=sharding.make_mesh(2, 2, 2))
    loaded = weights.load(folder, cfg, abstract)
    _same(loaded, params)
    jax.tree.map(lambda x, a: None if x.sharding == a.sharding else pytest.fail(str(a)), loaded, abstract)


def test_names_and_sizes_of_the_published_models():
    for size, tensors, total in (("3b", 824, 3754622976), ("7b", 729, 8292166656), ("72b", 1353, 73410777344)):
        shapes = weights.published_shapes(qwen25_vl.qwen25_vl(size))
        assert len(shapes) == tensors
        assert sum(int(np.prod(s)) for s in shapes.values()) == total
    assert len(weights.published_shapes(qwen25_vl.qwen25_vl("32b"))) == 1161


def test_a_tied_models_spare_head_must_equal_the_embedding(tmp_path):
    cfg = qwen25_vl.tiny(tie_word_embeddings=True)
    folder = _write(tmp_path / "model", cfg, _random(cfg), extra=[("lm_head.weight", (320, 64))])
    with pytest.raises(WeightsError, match="lm_head.weight differs from model.embed_tokens.weight"):
        weights.load(folder, cfg, qwen25_vl.abstract(cfg))


def test_rotary_buffers_are_ignored(tmp_path):
    cfg = qwen25_vl.tiny()
    folder = _write(tmp_path / "m", cfg, _random(cfg), extra=[("model.layers.0.self_attn.rotary_emb.inv_freq", (8,))])
    weights.load(folder, cfg, qwen25_vl.abstract(cfg))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!")


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _no_field(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["vision_config"]["depth"]
    (folder / "config.json").write_text(json.dumps(raw))


def _other_width(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 130}))


DAMAGE = [
    (_truncate, "model.safetensors: truncated: tensor "),
    (_garbage, "model.safetensors: not a safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: truncated or not a safetensors file"),
    (_pickle, "no safetensors here; pytorch_model.bin is a torch pickle"),
    (lambda f: (f / "config.json").unlink(), "config.json: not a readable config.json"),
    (_architecture, "config.json: model_type is 'llama', expected 'qwen2_5_vl'"),
    (_no_field, "config.json: vision_config.depth is missing"),
    (_other_width, "gate_proj.weight has shape (128, 64), expected (130, 64)"),
]


@pytest.mark.parametrize("damage,reason", DAMAGE, ids=[reason.split(":")[-1].strip()[:30] for _, reason in DAMAGE])
def test_damage_is_one_line_and_leaves_nothing(tmp_path, capsys, damage, reason):
    pytest.importorskip("marc_jax.checkpoint")
    cfg = qwen25_vl.tiny()
    folder = _write(tmp_path / "model", cfg, _random(cfg))
    damage(folder)
    assert convert_weights.main([f"--source={folder}", f"--out={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert reason in err and str(tmp_path) in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_missing_shard_and_a_lying_index(tmp_path):
    cfg = qwen25_vl.tiny()
    folder = _write(tmp_path / "model", cfg, _random(cfg), shard_bytes=50_000)
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (folder / shard).rename(tmp_path / "away")
    with pytest.raises(WeightsError, match=f"{shard}: shard is missing"):
        open_folder(folder)
    shutil.copy(tmp_path / "away", folder / shard)
    index["weight_map"]["model.more.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"{shard}: tensor model.more.weight is missing"):
        open_folder(folder)


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    cfg = qwen25_vl.tiny()
    drop = ("model.norm.weight", "visual.blocks.1.attn.qkv.bias")
    folder = _write(tmp_path / "model", cfg, _random(cfg), drop=drop, extra=[("visual.spare.weight", (2,))])
    with pytest.raises(WeightsError) as error:
        weights.load(folder, cfg, qwen25_vl.abstract(cfg))
    text = str(error.value)
    assert "2 tensors missing: model.norm.weight, visual.blocks.1.attn.qkv.bias" in text
    assert "1 tensors left over: visual.spare.weight" in text


def test_one_tensor_under_two_names_is_an_error(tmp_path):
    cfg = qwen25_vl.tiny()
    extra = [("model.language_model.norm.weight", (64,))]
    folder = _write(tmp_path / "model", cfg, _random(cfg), extra=extra)
    with pytest.raises(WeightsError, match="are the same tensor"):
        weights.load(folder, cfg, qwen25_vl.abstract(cfg))


@pytest.mark.parametrize("tied", [True, False])
def test_convert_and_export_are_inverse(tmp_path, tied):
    pytest.importorskip("marc_jax.checkpoint")
    cfg = qwen25_vl.tiny(tie_word_embeddings=tied)
    params = _random(cfg)
    source = _write(tmp_path / "model", cfg, params, shard_bytes=100_000)
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert convert_weights.main([f"--source={source}", f"--out={orbax}", "--dtype=float32"]) == 0
    assert export_weights.main([f"--checkpoint={orbax}", f"--out={back}", "--dtype=float32"]) == 0
    assert qwen25_vl.config_from_hf(back) == cfg
    _same(weights.load(back, cfg, qwen25_vl.abstract(cfg)), params)
    assert convert_weights.main([f"--source={source}", f"--out={orbax}"]) == 2  # not overwritten
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "orbax"]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_saves_we_load_we_export_transformers_loads(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="torch is the [parity] extra")
    pytest.importorskip("transformers", reason="transformers is the [parity] extra")
    import qwen_reference as reference
    from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    model = reference.hf_model(seed=5, tied=tied)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    cfg = qwen25_vl.config_from_hf(tmp_path / "theirs")
    params = weights.load(tmp_path / "theirs", cfg, qwen25_vl.abstract(cfg))
    _same(params, reference.ours(model)[1])
    export_weights.export(cfg, params, tmp_path / "ours", "float32", shard_bytes=100_000)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    again = again.float().eval()
    tokens = torch.arange(20, 40)[None]
    (pixels,) = reference.patches(np.random.default_rng(0), [(2, 10, 14)])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    before = reference.hf_vision(model, [pixels], [(2, 10, 14)])[0]
    np.testing.assert_array_equal(before, reference.hf_vision(again, [pixels], [(2, 10, 14)])[0])
