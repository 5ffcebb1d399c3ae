"""Checkpoints of the dual encoders: four published forms in, the .pt converted, damage named, timm's forward equal."""

import dataclasses

import cpu_torchvision
import dual_reference as reference
import jax
import numpy as np
import pytest

from marc_jax import checkpoint
from marc_jax.models import clip, clip_weights, perception_encoder, siglip2
from marc_jax.models.safetensors_io import WeightsError, write_folder
from tools import convert_pe

PE = perception_encoder.tiny()
FORMS = [("meta", PE), ("meta", perception_encoder.tiny(class_token=False)), ("open_clip", PE), ("timm", PE)]
FORMS += [("siglip2", siglip2.tiny())]


def drawn(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), clip_weights.describe(cfg))


def abstract(cfg, mesh=None):
    return (siglip2 if cfg.family == "siglip2" else perception_encoder).abstract(cfg, mesh=mesh)


def write(folder, form, cfg, params, drop=(), extra=()):
    folder.mkdir(parents=True)
    tensors = [(n, t) for n, t in clip_weights.published(cfg, form, params) if n not in drop] + list(extra)
    write_folder(folder, [(n, t.dtype, t.shape) for n, t in tensors], iter(tensors))
    return folder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("form,cfg", FORMS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_form_loads(tmp_path, form, cfg):
    params = drawn(cfg)
    spare = [(name, np.zeros(cfg.output, np.float32)) for name in clip_weights.ZERO.get(form, ())]
    folder = write(tmp_path / "model", form, cfg, params, extra=spare)
    want = {"image": params["image"]} if form == "timm" else params
    same(clip_weights.load(folder, cfg, abstract(cfg)), want)


def test_loading_onto_a_mesh_gives_the_same_numbers(tmp_path):
    from marc_jax import sharding

    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    params = drawn(PE)
    folder = write(tmp_path / "model", "open_clip", PE, params)
    loaded = clip_weights.load(folder, PE, abstract(PE, sharding.make_mesh(data=2, fsdp=2, tensor=2)))
    same(jax.device_get(loaded), params)
    assert len(loaded["image"]["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == 8


def test_damage_is_named(tmp_path):
    params = drawn(PE)
    folder = write(tmp_path / "a", "meta", PE, params, drop=("ln_final.bias",))
    with pytest.raises(WeightsError, match="1 tensors missing: ln_final.bias"):
        clip_weights.load(folder, PE, abstract(PE))
    folder = write(tmp_path / "b", "meta", PE, params, extra=[("visual.ls", np.zeros(3, np.float32))])
    with pytest.raises(WeightsError, match="1 tensors left over: visual.ls"):
        clip_weights.load(folder, PE, abstract(PE))
    other = dataclasses.replace(PE, text=dataclasses.replace(PE.text, context=9))
    with pytest.raises(WeightsError, match=r"tensor positional_embedding has shape \(12, 32\), expected \(9, 32\)"):
        clip_weights.load(write(tmp_path / "c", "meta", PE, params), other, abstract(other))
    folder = write(tmp_path / "d", "timm", PE, params, extra=[("head.bias", np.ones(24, np.float32))])
    with pytest.raises(WeightsError, match="head.bias is not zero"):
        clip_weights.load(folder, PE, abstract(PE))
    with pytest.raises(WeightsError, match="holds meta weights"):
        clip_weights.load(tmp_path / "c", siglip2.tiny(), abstract(siglip2.tiny()))
    with pytest.raises(WeightsError, match="neither PE-Core nor SigLIP 2"):
        clip_weights.form_of(["x"], "file")


@pytest.mark.parametrize("name", ["PE-Core-G14-448", "siglip2-base-patch16-256"])
def test_published_models_are_recognised(name):
    cfg = convert_pe.config_named(name)
    for form in ("siglip2",) if cfg.family == "siglip2" else ("meta", "open_clip"):
        assert clip_weights.recognise(clip_weights.published_shapes(cfg, form)) == cfg
    with pytest.raises(WeightsError, match=f"not {name}"):
        shapes = clip_weights.published_shapes(cfg, form)
        clip_weights.recognise(shapes | {"more": (1,)})


def test_sizes_survive_the_metadata():
    cfg = perception_encoder.pe_core("PE-Core-B16-224")
    assert clip.config_from(dataclasses.asdict(cfg)) == cfg
    with pytest.raises(ValueError, match="not the sizes"):
        clip.config_from({"model_type": "qwen2_5_vl"})


@pytest.mark.parametrize("wrap", [None, "state_dict", "weights"])
def test_a_pickle_is_converted(tmp_path, wrap):
    torch = pytest.importorskip("torch")
    params = drawn(PE)
    prefix = "module." if wrap else ""
    tensors = {prefix + n: torch.from_numpy(t.copy()) for n, t in clip_weights.published(PE, "meta", params)}
    torch.save({wrap: tensors} if wrap else tensors, tmp_path / "model.pt")
    (tmp_path / "tokenizer.json").write_text("{}")
    count = convert_pe.convert(tmp_path / "model.pt", tmp_path / "out", cfg=PE, dtype="float32")
    tree, meta = checkpoint.restore(tmp_path / "out", {"params": abstract(PE)})
    same(jax.device_get(tree["params"]), params)
    assert count == sum(x.size for x in jax.tree.leaves(params)) and clip.config_from(meta["model"]) == PE
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "out", "tokenizer.json"]


def test_nothing_is_written_where_conversion_fails(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"visual.conv1.weight": torch.zeros(3)}, tmp_path / "PE-Core-B16-224.pt")
    assert convert_pe.main([f"--source={tmp_path / 'PE-Core-B16-224.pt'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "456 tensors missing" in capsys.readouterr().err
    (tmp_path / "x.pt").write_bytes(b"\x80\x04cposix\nsystem\n")
    args = [f"--source={tmp_path / 'x.pt'}", f"--out={tmp_path / 'out'}"]
    assert convert_pe.main(args) == 2 and "known model" in capsys.readouterr().err
    assert convert_pe.main([*args, "--model=PE-Core-L14-336"]) == 2
    assert "not a torch checkpoint" in capsys.readouterr().err
    write(tmp_path / "timm", "timm", PE, drawn(PE))
    with pytest.raises(WeightsError, match="image tower alone"):
        convert_pe.convert(tmp_path / "timm", tmp_path / "out", cfg=PE)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def timm():
    torch = pytest.importorskip("torch")
    cpu_torchvision.load()
    return pytest.importorskip("timm"), torch


def test_timm_weights_give_timm_features(timm):
    """The class-token form at the size it was made for; timm scales its rotary grid for others."""
    timm, torch = timm
    model = timm.create_model("vit_pe_core_tiny_patch16_384", depth=2)
    reference.redraw(model)
    found = reference.tensors(model)
    found["head.bias"] *= 0
    model.head.bias.data.zero_()
    base = perception_encoder.pe_core("PE-Core-T16-384")
    cfg = dataclasses.replace(base, image=dataclasses.replace(base.image, layers=2))
    params = reference.ours(cfg, found)
    x = np.random.default_rng(0).standard_normal((1, 384, 384, 3)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    # The text tower is absent: only the image's parameters are bound.
    params["text"] = jax.tree.map(lambda w: np.zeros(w.shape, np.float32), perception_encoder.describe(cfg)["text"])
    params["logit_scale"] = np.float32(0)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda p: perception_encoder.bind(cfg, p).embed_images(x))(params)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)
