"""Published names and shapes of PE-Core and SigLIP 2 weights, and the way from them to our trees and back.

Forms (`FORMS`): what a PE-Core or SigLIP 2 checkpoint calls its tensors.
  "meta"       facebook/PE-Core-*, the names inside the .pt (converted once by tools/convert_pe.py, or saved again as
               safetensors)
  "open_clip"  timm/PE-Core-*, safetensors with both towers: timm's names for the image, "text." before the text's
  "timm"       timm/vit_pe_core_*.fb, safetensors of the image tower alone
  "siglip2"    google/siglip2-*, safetensors as transformers writes them
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from marc_jax.models import perception_encoder, siglip2
from marc_jax.models.clip import Config
from marc_jax.models.safetensors_io import WeightsError, open_folder
from marc_jax.paths import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Row:
    """Published tensors that make one leaf of ours: joined along their first axis, in shares of it, then turned.

    `how`: "copy"; "transpose"; "conv" ([w, 3, p, p] -> [3 p p, w]); "lead" and "lead2", one or two leading axes of 1;
    "one", a scalar kept as [1]. {i} in a name is the layer, stacked on axis 0 of ours.
    """

    theirs: tuple[str, ...]
    ours: str
    how: str = "copy"
    shares: tuple[int, ...] = (1,)


def _norm(theirs: str, ours: str) -> list[Row]:
    return [Row((f"{theirs}.weight",), f"{ours}/scale"), Row((f"{theirs}.bias",), f"{ours}/bias")]


def _linear(theirs: tuple[str, ...] | str, ours: str, shares=(1,), dot: str = ".") -> list[Row]:
    names = (theirs,) if isinstance(theirs, str) else theirs
    return [
        Row(tuple(f"{n}{dot}weight" for n in names), f"{ours}/kernel", "transpose", shares),
        Row(tuple(f"{n}{dot}bias" for n in names), f"{ours}/bias", "copy", shares),
    ]


def _meta_block(prefix: str, ours: str) -> list[Row]:
    block = f"{prefix}transformer.resblocks.{{i}}"
    return [
        *_norm(f"{block}.ln_1", f"{ours}/blocks/norm1"),
        *_linear(f"{block}.attn.in_proj", f"{ours}/blocks/attn/qkv", dot="_"),
        *_linear(f"{block}.attn.out_proj", f"{ours}/blocks/attn/out"),
        *_norm(f"{block}.ln_2", f"{ours}/blocks/norm2"),
        *_linear(f"{block}.mlp.c_fc", f"{ours}/blocks/mlp/up"),
        *_linear(f"{block}.mlp.c_proj", f"{ours}/blocks/mlp/down"),
    ]


def _meta_text(prefix: str) -> list[Row]:
    return [
        Row((f"{prefix}positional_embedding",), "text/positions/embedding"),
        Row((f"{prefix}text_projection",), "text/proj/kernel"),
        Row(("logit_scale",), "logit_scale"),
        Row((f"{prefix}token_embedding.weight",), "text/tokens/embedding"),
        *_meta_block(prefix, "text"),
        *_norm(f"{prefix}ln_final", "text/norm"),
    ]


_META_IMAGE = [
    Row(("visual.class_embedding",), "image/class_token"),
    Row(("visual.positional_embedding",), "image/positions/embedding"),
    Row(("visual.proj",), "image/proj/kernel"),
    Row(("visual.conv1.weight",), "image/patch_embed/kernel", "conv"),
    *_norm("visual.ln_pre", "image/norm_pre"),
    *_norm("visual.ln_post", "image/norm_post"),
    *_meta_block("visual.", "image"),
    Row(("visual.attn_pool.probe",), "image/pool/probe", "lead2"),
    *_linear("visual.attn_pool.attn.in_proj", "image/pool/qkv", dot="_"),
    *_linear("visual.attn_pool.attn.out_proj", "image/pool/out"),
    *_norm("visual.attn_pool.layernorm", "image/pool/norm"),
    *_linear("visual.attn_pool.mlp.c_fc", "image/pool/mlp/up"),
    *_linear("visual.attn_pool.mlp.c_proj", "image/pool/mlp/down"),
]


def _timm_image(prefix: str) -> list[Row]:
    block, pool = f"{prefix}blocks.{{i}}", f"{prefix}attn_pool"
    return [
        Row((f"{prefix}cls_token",), "image/class_token", "lead2"),
        Row((f"{prefix}pos_embed",), "image/positions/embedding", "lead"),
        Row((f"{prefix}head.weight",), "image/proj/kernel", "transpose"),
        Row((f"{prefix}patch_embed.proj.weight",), "image/patch_embed/kernel", "conv"),
        *_norm(f"{prefix}norm_pre", "image/norm_pre"),
        *_norm(f"{prefix}norm", "image/norm_post"),
        *_norm(f"{block}.norm1", "image/blocks/norm1"),
        *_linear(f"{block}.attn.qkv", "image/blocks/attn/qkv"),
        *_linear(f"{block}.attn.proj", "image/blocks/attn/out"),
        *_norm(f"{block}.norm2", "image/blocks/norm2"),
        *_linear(f"{block}.mlp.fc1", "image/blocks/mlp/up"),
        *_linear(f"{block}.mlp.fc2", "image/blocks/mlp/down"),
        Row((f"{pool}.latent",), "image/pool/probe", "lead2"),
        *_linear((f"{pool}.q", f"{pool}.kv"), "image/pool/qkv", (1, 2)),
        *_linear(f"{pool}.proj", "image/pool/out"),
        *_norm(f"{pool}.norm", "image/pool/norm"),
        *_linear(f"{pool}.mlp.fc1", "image/pool/mlp/up"),
        *_linear(f"{pool}.mlp.fc2", "image/pool/mlp/down"),
    ]


def _siglip_tower(theirs: str, ours: str) -> list[Row]:
    layer = f"{theirs}.encoder.layers.{{i}}"
    return [
        *_norm(f"{layer}.layer_norm1", f"{ours}/blocks/norm1"),
        *_linear(tuple(f"{layer}.self_attn.{x}_proj" for x in "qkv"), f"{ours}/blocks/attn/qkv", (1, 1, 1)),
        *_linear(f"{layer}.self_attn.out_proj", f"{ours}/blocks/attn/out"),
        *_norm(f"{layer}.layer_norm2", f"{ours}/blocks/norm2"),
        *_linear(f"{layer}.mlp.fc1", f"{ours}/blocks/mlp/up"),
        *_linear(f"{layer}.mlp.fc2", f"{ours}/blocks/mlp/down"),
    ]


_SIGLIP = [
    Row(("logit_scale",), "logit_scale", "one"),
    Row(("logit_bias",), "logit_bias", "one"),
    Row(("text_model.embeddings.token_embedding.weight",), "text/tokens/embedding"),
    Row(("text_model.embeddings.position_embedding.weight",), "text/positions/embedding"),
    *_siglip_tower("text_model", "text"),
    *_norm("text_model.final_layer_norm", "text/norm"),
    *_linear("text_model.head", "text/head"),
    Row(("vision_model.embeddings.patch_embedding.weight",), "image/patch_embed/kernel", "conv"),
    Row(("vision_model.embeddings.patch_embedding.bias",), "image/patch_embed/bias"),
    Row(("vision_model.embeddings.position_embedding.weight",), "image/positions/embedding"),
    *_siglip_tower("vision_model", "image"),
    *_norm("vision_model.post_layernorm", "image/norm_post"),
    Row(("vision_model.head.probe",), "image/pool/probe", "lead2"),
    *_linear("vision_model.head.attention.in_proj", "image/pool/qkv", dot="_"),
    *_linear("vision_model.head.attention.out_proj", "image/pool/out"),
    *_norm("vision_model.head.layernorm", "image/pool/norm"),
    *_linear("vision_model.head.mlp.fc1", "image/pool/mlp/up"),
    *_linear("vision_model.head.mlp.fc2", "image/pool/mlp/down"),
]

# Tensors that a form carries beside the model's own: zero, or buffers; they are checked to be zero where they matter.
ZERO = {"open_clip": ("visual.trunk.head.bias",), "timm": ("head.bias",)}
FORMS: dict[str, list[Row]] = {
    "meta": _meta_text("") + _META_IMAGE,
    "open_clip": _meta_text("text.") + _timm_image("visual.trunk."),
    "timm": _timm_image(""),
    "siglip2": _SIGLIP,
}
_SIGNS = (
    ("vision_model.head.probe", "siglip2"),
    ("visual.conv1.weight", "meta"),
    ("visual.trunk.pos_embed", "open_clip"),
    ("pos_embed", "timm"),
)


def describe(cfg: Config) -> dict:
    """Nested dict of `Weight` of a model of either family."""
    return (siglip2 if cfg.family == "siglip2" else perception_encoder).describe(cfg)


def form_of(names, source: str = "checkpoint") -> str:
    """Which of `FORMS` these tensor names are. Raises WeightsError."""
    names = set(names)
    for sign, form in _SIGNS:
        if sign in names:
            return form
    raise WeightsError(f"{source}: neither PE-Core nor SigLIP 2 (has no tensor {' or '.join(s for s, _ in _SIGNS)})")


def _their_shape(cfg: Config, how: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Published shape of a tensor that is `shape` in our tree (one layer of it)."""
    if how == "conv":
        return (shape[1], 3, cfg.image.patch, cfg.image.patch)
    extra = {"lead": 1, "lead2": 2, "one": 1}.get(how, 0)
    return shape[::-1] if how == "transpose" else (1,) * extra + shape


def _rows(cfg: Config, form: str) -> Iterator[tuple[str, str, int | None, Row, tuple[int, ...]]]:
    """(published name, our path, layer or None, row, published shape) of every tensor."""
    flat = flatten(describe(cfg))
    for row in FORMS[form]:
        if row.ours not in flat:
            continue  # a class token that this model has not
        shape = flat[row.ours].shape
        layers = range(shape[0]) if "{i}" in row.theirs[0] else (None,)
        whole = _their_shape(cfg, row.how, shape if layers == (None,) else shape[1:])
        for i in layers:
            for name, share in zip(row.theirs, row.shares, strict=True):
                part = whole if len(row.shares) == 1 else (whole[0] * share // sum(row.shares), *whole[1:])
                yield name if i is None else name.format(i=i), row.ours, i, row, part


def published_shapes(cfg: Config, form: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint of this form: name -> torch shape."""
    return {name: shape for name, _, _, _, shape in _rows(cfg, form)}


def match(cfg: Config, found: Mapping[str, tuple[int, ...]], source: str = "checkpoint") -> str:
    """The form of a checkpoint, after checking that its names and shapes are those of `cfg`, no more and no fewer.

    Raises:
      WeightsError: missing or left-over tensors, or a wrong shape, by name.
    """
    form = form_of(found, source)
    if (form == "siglip2") != (cfg.family == "siglip2"):
        raise WeightsError(f"{source}: holds {form} weights, but the model asked for is {cfg.name or cfg.family}")
    want, spare = published_shapes(cfg, form), set(ZERO.get(form, ()))
    missing, left = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys() - spare)
    for word, names in (("missing", missing), ("left over", left)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsError(
                f"{source}: not {cfg.name or cfg.family}: {len(names)} tensors {word}: {', '.join(names[:8])}{more}"
            )
    for name, shape in want.items():
        if tuple(found[name]) != shape:
            raise WeightsError(f"{source}: tensor {name} has shape {tuple(found[name])}, expected {shape}")
    return form


def _to_ours(parts: list[np.ndarray], how: str) -> np.ndarray:
    tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if how == "conv":
        return tensor.reshape(tensor.shape[0], -1).T
    if how == "transpose":
        return tensor.T
    return tensor.reshape(tensor.shape[{"lead": 1, "lead2": 2, "one": 1}.get(how, 0) :])


def assemble(
    cfg: Config, form: str, read: Callable[[str], np.ndarray], make: Callable[[str, tuple[int, ...], Callable], Any]
) -> dict:
    """Builds the tree leaf by leaf; leaves that the form does not hold (timm: the text tower) are absent.

    Args:
      read: published name -> tensor.
      make: (path, shape, piece) -> leaf, where piece(index) gives the part of the leaf under a tuple of slices.
    Raises:
      WeightsError: a tensor that must be zero is not.
    """
    sources: dict[str, dict[int | None, list[str]]] = {}
    hows = {}
    for name, path, layer, row, _ in _rows(cfg, form):
        sources.setdefault(path, {}).setdefault(layer, []).append(name)
        hows[path] = row.how
    out = {}
    for path, weight in flatten(describe(cfg)).items():
        if path not in sources:
            continue

        def piece(index, layers=sources[path], how=hows[path]):
            index = tuple(index)
            if None in layers:
                return np.asarray(_to_ours([read(name) for name in layers[None]], how)[index])
            chosen = sorted(layers)[index[0]] if index else sorted(layers)
            return np.stack([_to_ours([read(name) for name in layers[i]], how)[index[1:]] for i in chosen])

        out[path] = make(path, weight.shape, piece)
    return unflatten(out)


def check_zero(form: str, found, read: Callable[[str], np.ndarray], source: str) -> None:
    """Raises WeightsError unless what the form carries for nothing is zero."""
    for name in ZERO.get(form, ()):
        if name in found and np.any(np.asarray(read(name), np.float32)):
            raise WeightsError(f"{source}: tensor {name} is not zero; PE-Core's projection has no bias")


def load(folder: str | os.PathLike, cfg: Config, abstract: dict) -> dict:
    """Reads a folder of safetensors of any form onto the target shardings.

    Args:
      abstract: tree of ShapeDtypeStructs (`perception_encoder.abstract`, `siglip2.abstract`); its dtypes and shardings
        are those of the result. A file of timm's gives the image tower alone: {"image": ...}.
    Raises:
      WeightsError: see `match` and `safetensors_io.open_folder`.
    """
    files = open_folder(folder)
    form = match(cfg, {name: file.tensors[name][1] for name, file in files.items()}, str(folder))
    read = lambda name: files[name].read(name)  # noqa: E731
    check_zero(form, files, read, str(folder))
    targets = flatten(abstract)

    def make(path, shape, piece):
        target = targets[path]
        sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(shape, sharding, lambda index: piece(index).astype(target.dtype))

    return assemble(cfg, form, read, make)


def published(cfg: Config, form: str, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, tensor) of every parameter in this form: the inverse of `assemble`."""
    flat, offsets = flatten(params), {}
    for name, path, layer, row, shape in _rows(cfg, form):
        leaf = np.asarray(flat[path] if layer is None else flat[path][layer])
        whole = leaf.T if row.how in ("conv", "transpose") else leaf
        if len(row.shares) > 1:
            start = offsets.get((path, layer), 0)
            offsets[path, layer] = start + shape[0]
            whole = whole[start : start + shape[0]]
        yield name, np.ascontiguousarray(whole).reshape(shape)  # ascontiguousarray makes a scalar [1]


def recognise(found: Mapping[str, tuple[int, ...]], source: str = "checkpoint") -> Config:
    """The published model that these names and shapes are. Raises WeightsError, naming what would fit best."""
    form = form_of(found, source)
    if form == "siglip2":
        known = [siglip2.siglip2(name) for name in siglip2.SIZES]
    else:
        known = [perception_encoder.pe_core(name) for name in perception_encoder.SIZES]

    def misfits(cfg: Config) -> int:
        want = published_shapes(cfg, form)
        return sum(tuple(found.get(name, ())) != shape for name, shape in want.items())

    best = min(known, key=misfits)
    match(best, found, source)
    return best
