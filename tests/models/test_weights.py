"""Checkpoints in and out: every naming generation, sharded or not, damage of every kind, and back to transformers."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from marc_jax.models import qwen25_vl, weights
from marc_jax.models.safetensors_io import INDEX, WeightsError, open_folder, write_folder
from marc_jax.paths import flatten
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


# Per size: vocab, hidden, layers, heads, kv heads, MLP, tied, vision MLP; parameters of vision, text, head; tensors.
PUBLISHED = {
    "3b": ((151936, 2048, 36, 16, 2, 11008, True, 3420), (668_684_288, 3_085_938_688, 0), 824),
    "7b": ((152064, 3584, 28, 28, 4, 18944, False, 3420), (676_550_144, 7_070_619_136, 544_997_376), 729),
    "32b": ((152064, 5120, 64, 40, 8, 27648, False, 3456), (688_841_984, 31_985_308_672, 778_567_680), 1161),
    "72b": ((152064, 8192, 80, 64, 8, 29568, False, 3456), (704_573_696, 71_460_495_360, 1_245_708_288), 1353),
}


def _published_config(size, form):
    """config.json as the hub has it ("flat"), or as transformers 5 saves it ("nested")."""
    vocab, width, layers, heads, kv, mlp, tied, vision_mlp = PUBLISHED[size][0]
    text = {
        "hidden_act": "silu", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": mlp, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": 70, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": vision_mlp, "num_heads": 16,
        "out_hidden_size": width, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    ids = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}
    ids |= {"image_token_id": 151655, "video_token_id": 151656, "model_type": "qwen2_5_vl", "tie_word_embeddings": tied}
    if form == "flat":
        rope = {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        return ids | text | rope | {"vision_config": vision | {"in_chans": 3}}
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    vision |= {"in_channels": 3, "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}}
    return ids | {"text_config": text | {"rope_parameters": rope}, "vision_config": vision}


@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_sizes_of_the_published_models(size, form):
    _, parts, tensors = PUBLISHED[size]
    cfg = qwen25_vl.config_from_hf(_published_config(size, form))
    assert cfg == dataclasses.replace(qwen25_vl.qwen25_vl(size), eos_token_ids=(151645,))
    shapes = weights.published_shapes(cfg)
    assert len(shapes) == tensors
    count = lambda begin: sum(math.prod(s) for n, s in shapes.items() if n.startswith(begin))  # noqa: E731
    assert (count("visual."), count("model."), count("lm_head.")) == parts
    abstract = flatten(qwen25_vl.abstract(cfg, jax.numpy.bfloat16))  # nothing is allocated
    assert sum(math.prod(x.shape) for x in abstract.values()) == sum(parts)
    assert weights.match(cfg, {_in_memory(name): shape for name, shape in shapes.items()}).keys() == shapes.keys()
    if form == "flat":
        assert qwen25_vl.config_from_hf(weights.hf_config(cfg)) == cfg


@pytest.mark.parametrize("tied", [True, False])
def test_a_nested_config_loads_like_a_flat_one(tmp_path, tied):
    cfg = qwen25_vl.tiny(tie_word_embeddings=tied)
    params = _random(cfg)
    folder = _write(tmp_path / "model", cfg, params, _in_memory)
    flat = json.loads((folder / "config.json").read_text())
    top = {k: v for k, v in flat.items() if k.endswith("_token_id") or k in ("model_type", "vision_config")}
    text = {k: v for k, v in flat.items() if k not in top and not k.startswith("rope_")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": flat["rope_theta"]} | flat["rope_scaling"]
    top["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    del top["vision_config"]["in_chans"]
    (folder / "config.json").write_text(json.dumps(top | {"text_config": text}))
    read = qwen25_vl.config_from_hf(folder)
    assert read == cfg
    _same(weights.load(folder, read, qwen25_vl.abstract(read)), params)


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


def _trailing(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"abc")


def _changed(**fields):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | fields))

    return damage


def _no_field(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["vision_config"]["depth"]
    (folder / "config.json").write_text(json.dumps(raw))


DAMAGE = [
    (_truncate, "model.safetensors: truncated: tensor "),
    (_garbage, "model.safetensors: not a safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: truncated or not a safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "model: no safetensors here"),
    (_trailing, "model.safetensors: 3 bytes after the last tensor"),
    (lambda f: (f / "config.json").unlink(), "config.json: not a readable config.json"),
    (_changed(model_type="llama"), "config.json: model_type is 'llama', expected 'qwen2_5_vl'"),
    (_changed(model_type="qwen2_vl"), "config.json: model_type is 'qwen2_vl', expected 'qwen2_5_vl'"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list, not an object"),
    (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: not a readable"),
    (_changed(quantization_config={"quant_method": "awq"}), "config.json: quantised weights ('awq') are not read"),
    (_changed(vision_config="large"), "config.json: 'str' object"),
    (_no_field, "config.json: vision_config.depth is missing"),
    (_changed(intermediate_size=130), "gate_proj.weight has shape (128, 64), expected (130, 64)"),
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


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_our_logits_for_what_we_export(tmp_path, tied):
    """Weights that were never transformers': drawn here, sharded, exported, loaded there with nothing newly made."""
    torch = pytest.importorskip("torch", reason="torch is the [parity] extra")
    pytest.importorskip("transformers", reason="transformers is the [parity] extra")
    import qwen_reference as reference
    from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    cfg = reference.ours(reference.hf_model(tied=tied))[0]
    draw = lambda path, x: _drawn(jax.tree_util.keystr(path), x)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(draw, _random(cfg, seed=3))
    export_weights.export(cfg, params, tmp_path / "ours", "float32", shard_bytes=100_000)
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = theirs.float().eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in jax.tree.leaves(params))
    tokens_bl = np.arange(40, 60)[None]
    pos_3bl = np.tile(np.arange(20), (3, 1, 1))
    (pixels,) = reference.patches(np.random.default_rng(0), [(2, 10, 14)])
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens_bl), position_ids=torch.from_numpy(pos_3bl)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        model = qwen25_vl.bind(cfg, params)
        hidden, _ = model.prefill(model.embed(tokens_bl), pos_3bl, np.ones((1, 20), bool))
        got, seen = model.logits(hidden), model.vision(pixels, (10, 14))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(seen, reference.hf_vision(theirs, [pixels], [(2, 10, 14)])[0], atol=1e-5)


def _drawn(path, x):
    """Norms around 1, small biases, matrices that keep the scale: the reference's own draw."""
    if "scale" in path:
        return 1 + 0.2 * x
    return 0.1 * x if "bias" in path else 0.9 * x / x.shape[-2] ** 0.5
