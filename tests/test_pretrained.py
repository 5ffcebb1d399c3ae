"""Starting from weights: either form, onto the shardings asked for; another model, size or tokenizer is one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from data_pipelines.synthetic.vocabulary import make_tokenizer
from marc_jax import checkpoint, optim, pretrained, run, settings, sharding, stages
from marc_jax.checkpoint import CheckpointError
from marc_jax.config import ConfigError as SettingsError
from marc_jax.models import qwen25_vl, weights
from marc_jax.models.qwen25_vl import ConfigError
from marc_jax.models.safetensors_io import WeightsError
from marc_jax.tokenizer import Tokenizer, TokenizerError
from tools import convert_weights, export_weights

CFG = qwen25_vl.tiny(num_heads=8)
FORMS = ("safetensors", "orbax", "stage")


def _random(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), qwen25_vl.describe(cfg))


def _write(folder, cfg, form, dtype="float32"):
    """Random weights in one of the three forms -> (where, parameters)."""
    params = _random(cfg)
    if form == "stage":
        flat = optim.flatten(params)
        trained = [path for path in flat if path.startswith("text")]
        tree = {"params": {path: flat[path] for path in trained}}
        tree["frozen"] = {path: flat[path] for path in flat if path not in trained}
        checkpoint.save(folder / "checkpoints", 7, tree, {"trainable": trained, "model": weights.hf_config(cfg)})
        return folder, params
    export_weights.export(cfg, params, folder / "safetensors", dtype)
    if form == "orbax":
        convert_weights.convert(folder / "safetensors", folder / "orbax", dtype)
    return folder / form, params


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=["fsdp", "2x2x2"])
def test_every_form_goes_onto_the_target_shardings(tmp_path, form, mesh):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    source, params = _write(tmp_path, CFG, form)
    assert pretrained.config(source) == CFG
    target = qwen25_vl.abstract(CFG, mesh=sharding.make_mesh(*mesh))
    loaded = pretrained.load(source, CFG, target)
    _same(loaded, params)
    jax.tree.map(lambda x, a: None if x.sharding == a.sharding else pytest.fail(str(a)), loaded, target)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("saved,wanted", [("bfloat16", jnp.float32), ("float32", jnp.bfloat16)])
def test_every_form_takes_the_target_dtype(tmp_path, form, saved, wanted):
    source, params = _write(tmp_path, CFG, form, saved)
    loaded = pretrained.load(source, CFG, qwen25_vl.abstract(CFG, wanted, sharding.make_mesh()))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}
    through = jnp.bfloat16 if form != "stage" or wanted == jnp.bfloat16 else jnp.float32
    _same(loaded, jax.tree.map(lambda x: x.astype(through).astype(wanted), params))


def test_precision_is_converted_only_where_asked(tmp_path):
    source, _ = _write(tmp_path, CFG, "orbax", "bfloat16")
    with pytest.raises(CheckpointError, match="is bfloat16.* in the checkpoint, float32.* in this run"):
        checkpoint.restore(source, {"params": qwen25_vl.abstract(CFG)}, partial=True)


def test_a_leaf_larger_than_a_chunk_comes_back_whole(tmp_path, monkeypatch):
    from marc_jax import streamed

    monkeypatch.setattr(streamed.chunk_shape, "__defaults__", (20_000,))
    source, params = _write(tmp_path, CFG, "orbax")
    _same(pretrained.load(source, CFG, qwen25_vl.abstract(CFG)), params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change,reason",
    [
        ({"hidden_size": 128}, "text.hidden_size is 64 there, 128 here"),
        ({"num_layers": 3}, "text.num_layers is 2 there, 3 here"),
        ({"vision_depth": 4}, "vision.depth is 2 there, 4 here"),
        ({"tie_word_embeddings": False}, "text.tie_word_embeddings is True there, False here"),
        ({"vocab_size": 400}, "text.vocab_size is 320 there, 400 here"),
        ({"image_token_id": 9}, "image_token_id is 5 there, 9 here"),
        ({"window_size": 56}, "vision.window_size is 112 there, 56 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_size_is_one_line_with_both_values(tmp_path, form, change, reason):
    source, _ = _write(tmp_path, CFG, form)
    other = qwen25_vl.tiny(**({"num_heads": 8} | change))
    with pytest.raises(ConfigError, match=reason) as error:
        pretrained.load(source, other, qwen25_vl.abstract(other))
    assert str(source) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "qwen2_vl", "qwen3_vl", None])
def test_another_architecture_is_one_line_with_both_values(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"config.json: model_type is {kind!r}, expected 'qwen2_5_vl'"):
        pretrained.check(tmp_path, CFG)


def test_places_without_weights_are_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for source, reason in (
        (tmp_path / "absent", "absent: no such folder"),
        (tmp_path / "model.safetensors", "model.safetensors: a file; give the folder"),
        (tmp_path, "config.json: not a readable config.json"),
    ):
        with pytest.raises((ConfigError, WeightsError), match=reason):
            pretrained.check(source, CFG)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="neither safetensors with a config.json nor a checkpoint"):
        pretrained.check(tmp_path, CFG)


def test_a_torch_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    source, _ = _write(tmp_path, CFG, "safetensors")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin is a torch pickle.*python -m tools.convert_weights"):
        pretrained.check(source, CFG)


def test_a_damaged_checkpoint_names_the_file(tmp_path):
    source, _ = _write(tmp_path, CFG, "orbax")
    victim = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"step 0: .*{victim.name}"):
        pretrained.load(source, CFG, qwen25_vl.abstract(CFG))


# ------------------------------------------------------------------------------------------------- tokenizers
NAMES = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()


def _tokenizer(folder, names=NAMES, words=10):
    vocab = {word: i for i, word in enumerate([*names, "[UNK]", *(f"w{i}" for i in range(words))])}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tok.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    tok.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_that_fits_converts_and_travels(tmp_path):
    source, _ = _write(tmp_path, CFG, "safetensors")
    _tokenizer(source)
    convert_weights.convert(source, tmp_path / "orbax", "float32")
    pretrained.fits(pretrained.config(tmp_path / "orbax"), Tokenizer.load(tmp_path / "orbax"))


@pytest.mark.parametrize(
    "names,words,reason",
    [
        (NAMES, 1000, "ids up to 1007, but the model's embedding has 320 rows"),
        (NAMES[:5] + NAMES[:4:-1], 10, r"<\|image_pad\|> is id 6, the model's image_token_id is 5"),
        (
            NAMES[:3] + NAMES[4:2:-1] + NAMES[5:],
            10,
            r"<\|vision_start\|> is id 4, .*vision_start_token_id is 3",
        ),
        (NAMES[:6], 10, r"has no token '<\|video_pad\|>'"),
        (["a", NAMES[1], "b", *NAMES[3:], *NAMES[:3:2]], 10, r"answers end with \[8, 7\], .* eos_token_id is \[2, 0\]"),
    ],
    ids=["too many", "image", "vision start", "no video", "stop"],
)
def test_a_tokenizer_that_does_not_fit_is_one_line_and_nothing_is_left(tmp_path, capsys, names, words, reason):
    source, _ = _write(tmp_path, CFG, "safetensors")
    _tokenizer(source, names, words)
    with pytest.raises(TokenizerError, match=f"tokenizer.json: {reason}"):
        pretrained.check_tokenizer(CFG, source)
    assert convert_weights.main([f"--source={source}", f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["safetensors"]


def test_the_published_tokenizer_fits_the_published_sizes(test_data):
    folder = test_data / "tokenizer" / "qwen2.5"
    if not (folder / "vocab.json").exists():
        pytest.skip(f"{folder} is absent")
    for size in ("3b", "7b"):
        pretrained.check_tokenizer(qwen25_vl.qwen25_vl(size), folder)
    with pytest.raises(TokenizerError, match="ids up to 151664, but the model's embedding has 320 rows"):
        pretrained.check_tokenizer(CFG, folder)


# ------------------------------------------------------------------------------------------------------ a run
@pytest.fixture
def start(tmp_path, repo, monkeypatch):
    """(overrides) -> a run of the quick start that has begun, and its config."""
    monkeypatch.chdir(repo)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def begin(*overrides):
        config = settings.experiment("experiments/quickstart.py", [f"--config.{o}" for o in overrides])
        return run.surroundings(config, tmp_path)

    return begin


@pytest.mark.parametrize("form", FORMS)
def test_a_run_starts_from_init_from(tmp_path, start, form):
    source, params = _write(tmp_path / "weights", start().cfg, form)
    here = start(f"init_from={source}", "mesh.fsdp=2")
    run.check_sources(here.config, here.cfg)
    loaded = here.parameters("")
    _same(loaded, params)
    assert all(x.sharding.mesh == here.mesh for x in jax.tree.leaves(loaded))
    _same(here.parameters(str(source)), params)  # a stage's own init
    drawn = start().parameters("")
    assert not np.array_equal(drawn["text"]["embed"]["embedding"], params["text"]["embed"]["embedding"])


def save_stage(here, name, step, seed=0):
    """A checkpoint of a stage as the training loop writes it; returns its parameters."""
    params = _random(here.cfg, seed)
    trained, frozen = optim.partition(params, (".*",))
    tree = {"params": trained, "frozen": frozen, "step": np.int32(step)}
    checkpoint.save(here.workdir / name / "checkpoints", step, tree, {"trainable": list(trained)})
    return params


def test_a_stage_hands_on_only_its_last_step(start):
    here = start("teacher.steps=20", "retriever.steps=5")
    with pytest.raises(SettingsError, match="stage 'teacher' of .* has not saved any of its 20 steps; .*train it"):
        here.parameters("teacher")
    save_stage(here, "teacher", 10)
    with pytest.raises(SettingsError, match="stage 'teacher' of .* is at step 10 of 20; its last one is needed"):
        here.parameters("teacher")
    params = save_stage(here, "teacher", 20, seed=1)
    _same(here.parameters("teacher"), params)
    with pytest.raises(SettingsError, match="stage 'retriever' of .* has not saved any of its 5 steps"):
        stages.build(here, "sft")  # reads retrieved events


def test_a_damaged_last_step_is_not_replaced_by_an_earlier_one(start):
    here = start("teacher.steps=20")
    for step in (10, 20):
        save_stage(here, "teacher", step)
    (here.workdir / "teacher/checkpoints/step_00000020/meta.json").write_text("{}")
    with pytest.raises(SettingsError, match="step 20: meta.json has 2 bytes, not .*; train stage 'teacher' again"):
        here.parameters("teacher")


def test_a_run_refuses_weights_of_another_size_before_it_begins(tmp_path, start):
    here = start()
    source, _ = _write(tmp_path / "weights", dataclasses.replace(here.cfg, image_token_id=1), "safetensors")
    with pytest.raises(ConfigError, match="image_token_id is 1 there, "):
        run.check_sources(start(f"init_from={source}").config, here.cfg)
    with pytest.raises(ConfigError, match="text.num_layers is 3 there, 2 here"):
        smaller = start(f"init_from={source}", "model.text.num_layers=2")
        run.check_sources(smaller.config, smaller.cfg)


def test_settings_refuse_a_folder_without_weights(tmp_path, start):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="config.init_from = '.*empty' is not a folder with a config.json"):
        start(f"init_from={tmp_path / 'empty'}")
    with pytest.raises(SettingsError, match="config.sft.init = 'nothing' is neither an earlier stage nor a folder"):
        start("sft.init=nothing")


def test_a_run_older_than_init_from_goes_on_unless_it_is_set(tmp_path, start):
    config, path = start().config, tmp_path / "config.json"
    settings.keep(config, path)
    old = json.loads(path.read_text())
    del old["init_from"]
    path.write_text(json.dumps(old))
    settings.keep(config, path, write=False)
    source, _ = _write(tmp_path / "weights", CFG, "safetensors")
    with pytest.raises(SettingsError, match="different: init_from"):
        settings.keep(start(f"init_from={source}").config, path, write=False)


def test_errors_of_weights_are_for_the_user():
    for error in (ConfigError, WeightsError, TokenizerError, CheckpointError("x")):
        assert error.exit_code == 2
