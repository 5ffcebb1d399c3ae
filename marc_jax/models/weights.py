"""Published names and shapes of Qwen2.5-VL weights, and the way from them to our tree and back.

`TABLE` is the whole mapping: published name, our path, transform. Loading is streamed: a leaf is assembled from the
slices of the tensors that make it, onto the sharding the target asks for, then the next leaf.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from marc_jax.models.qwen25_vl import Config, describe
from marc_jax.models.safetensors_io import WeightsError, open_folder
from marc_jax.paths import flatten, unflatten

__all__ = ["WeightsError", "assemble", "canonical", "hf_config", "load", "match", "published", "published_shapes"]

_LINEAR = (("kernel", "weight", "transpose"), ("bias", "bias", "copy"))


def _linear(theirs: str, ours: str, bias: bool):
    return [(f"{theirs}.{b}", f"{ours}/{a}", how) for a, b, how in _LINEAR if bias or a == "kernel"]


# (published name, our path, transform); {i} is the layer, stacked on axis 0 of ours.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", "flatten"),
    ("visual.blocks.{i}.norm1.weight", "vision/blocks/norm1/scale", "copy"),
    ("visual.blocks.{i}.norm2.weight", "vision/blocks/norm2/scale", "copy"),
    *_linear("visual.blocks.{i}.attn.qkv", "vision/blocks/attn/qkv", True),
    *_linear("visual.blocks.{i}.attn.proj", "vision/blocks/attn/proj", True),
    *_linear("visual.blocks.{i}.mlp.gate_proj", "vision/blocks/mlp/gate", True),
    *_linear("visual.blocks.{i}.mlp.up_proj", "vision/blocks/mlp/up", True),
    *_linear("visual.blocks.{i}.mlp.down_proj", "vision/blocks/mlp/down", True),
    ("visual.merger.ln_q.weight", "vision/merger/norm/scale", "copy"),
    *_linear("visual.merger.mlp.0", "vision/merger/fc1", True),
    *_linear("visual.merger.mlp.2", "vision/merger/fc2", True),
    ("model.embed_tokens.weight", "text/embed/embedding", "copy"),
    ("model.layers.{i}.input_layernorm.weight", "text/layers/norm1/scale", "copy"),
    ("model.layers.{i}.post_attention_layernorm.weight", "text/layers/norm2/scale", "copy"),
    *_linear("model.layers.{i}.self_attn.q_proj", "text/layers/attn/q", True),
    *_linear("model.layers.{i}.self_attn.k_proj", "text/layers/attn/k", True),
    *_linear("model.layers.{i}.self_attn.v_proj", "text/layers/attn/v", True),
    *_linear("model.layers.{i}.self_attn.o_proj", "text/layers/attn/o", False),
    *_linear("model.layers.{i}.mlp.gate_proj", "text/layers/mlp/gate", False),
    *_linear("model.layers.{i}.mlp.up_proj", "text/layers/mlp/up", False),
    *_linear("model.layers.{i}.mlp.down_proj", "text/layers/mlp/down", False),
    ("model.norm.weight", "text/norm/scale", "copy"),
    ("lm_head.weight", "text/head/kernel", "transpose"),
)

# Longest first: a prefix of one generation is also the beginning of another's.
_PREFIXES = (
    ("model.visual.", "visual."),
    ("visual.", "visual."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", "model."),
    ("model.", "model."),
)


def canonical(name: str) -> str | None:
    """The published name of a tensor named by any generation of transformers; None for rotary buffers."""
    if name.endswith("inv_freq"):
        return None
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _their_shape(cfg: Config, how: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Published shape of a tensor that is `shape` in our tree (one layer of it)."""
    if how == "flatten":
        v = cfg.vision
        return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return shape[::-1] if how == "transpose" else shape


def _to_ours(tensor: np.ndarray, how: str) -> np.ndarray:
    if how == "flatten":
        tensor = tensor.reshape(tensor.shape[0], -1)
    return tensor if how == "copy" else tensor.T


def _rows(cfg: Config) -> Iterator[tuple[str, str, int | None, str, tuple[int, ...]]]:
    """(published name, our path, layer or None, transform, published shape), in the published order of modules."""
    flat = flatten(describe(cfg))
    for theirs, ours, how in TABLE:
        if ours not in flat:
            continue  # the head of a tied model
        shape = flat[ours].shape
        if "{i}" in theirs:
            one = _their_shape(cfg, how, shape[1:])
            yield from ((theirs.format(i=i), ours, i, how, one) for i in range(shape[0]))
        else:
            yield theirs, ours, None, how, _their_shape(cfg, how, shape)


def published_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint: name -> torch shape."""
    return {name: shape for name, _, _, _, shape in _rows(cfg)}


def match(cfg: Config, found: Mapping[str, tuple[int, ...]], source: str = "checkpoint") -> dict[str, str]:
    """Checks a checkpoint's names and shapes against the model; -> published name -> name in the checkpoint.

    Every tensor must be consumed once and every leaf written once. A tied model's `lm_head.weight` is allowed and left
    out of the result.

    Args:
      found: name -> shape.
      source: named in errors.
    Raises:
      WeightsError: missing, left over, doubled tensors, or a wrong shape.
    """
    names: dict[str, str] = {}
    for name in found:
        key = canonical(name)
        if key is None:
            continue
        if key in names:
            raise WeightsError(f"{source}: {name} and {names[key]} are the same tensor")
        names[key] = name
    want = published_shapes(cfg)
    if cfg.text.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    missing, left = sorted(want.keys() - names.keys()), sorted(names.keys() - want.keys())
    if missing or left:
        raise WeightsError(f"{source}: {_listed('missing', missing)}{_listed('left over', left)}".rstrip("; "))
    for key, name in names.items():
        if tuple(found[name]) != want[key]:
            raise WeightsError(f"{source}: tensor {name} has shape {tuple(found[name])}, expected {want[key]}")
    return {key: names[key] for key in want}


def _listed(word: str, names: list[str], limit: int = 8) -> str:
    if not names:
        return ""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensors {word}: {', '.join(names[:limit])}{more}; "


def assemble(
    cfg: Config, read: Callable[[str], np.ndarray], make: Callable[[str, tuple[int, ...], Callable], Any]
) -> dict:
    """Builds the tree leaf by leaf.

    Args:
      read: published name -> tensor (a view is enough).
      make: (path, shape, piece) -> leaf, where piece(index) gives the part of the leaf under a tuple of slices; it is
        called for the parts that `make` wants, and only their bytes are touched.
    """
    sources: dict[str, list[tuple[str, str, bool]]] = {}
    for name, path, layer, how, _ in _rows(cfg):
        sources.setdefault(path, []).append((name, how, layer is not None))
    out = {}
    for path, weight in flatten(describe(cfg)).items():

        def piece(index, rows=sources[path]):
            index = tuple(index)
            if not rows[0][2]:
                return np.asarray(_to_ours(read(rows[0][0]), rows[0][1])[index])
            chosen = rows[index[0]] if index else rows
            return np.stack([_to_ours(read(name), how)[index[1:]] for name, how, _ in chosen])

        out[path] = make(path, weight.shape, piece)
    return unflatten(out)


def load(folder: str | os.PathLike, cfg: Config, abstract: dict) -> dict:
    """Reads a folder of safetensors (any naming generation, sharded or not) onto the target shardings.

    Args:
      abstract: tree of ShapeDtypeStructs (`qwen25_vl.abstract`); its dtypes and shardings are those of the result. Each
        device's part is read and placed on its own, so the host holds one part of one leaf at a time.
    Raises:
      WeightsError: see `match` and `safetensors_io.open_folder`.
    """
    files = open_folder(folder)
    names = match(cfg, {name: file.tensors[name][1] for name, file in files.items()}, str(folder))
    check_tied(cfg, files, folder)
    targets = flatten(abstract)

    def make(path, shape, piece):
        leaf = _place(shape, targets[path], piece)
        for file in {id(file): file for file in files.values()}.values():
            file.release()
        return leaf

    return assemble(cfg, lambda name: files[names[name]].read(names[name]), make)


def _place(shape: tuple[int, ...], target: jax.ShapeDtypeStruct, piece: Callable) -> jax.Array:
    """A leaf on its sharding. Equal parts of several devices are read once; a part is let go once it is placed."""
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    parts = []
    for key, holders in devices.items():
        host = piece(tuple(slice(*bounds) for bounds in key)).astype(target.dtype)
        for device in holders:
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            parts.append(jax.device_put(host, place).block_until_ready())
        del host
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def check_tied(cfg: Config, files: Mapping, folder) -> None:
    """A tied model may carry `lm_head.weight`, but only as the same numbers as the embedding."""
    names = {canonical(name): name for name in files}
    if not cfg.text.tie_word_embeddings or "lm_head.weight" not in names:
        return
    head, embed = names["lm_head.weight"], names["model.embed_tokens.weight"]
    a, b = files[head].read(head), files[embed].read(embed)
    if not all(np.array_equal(a[i : i + 4096], b[i : i + 4096]) for i in range(0, len(b), 4096)):
        raise WeightsError(
            f"{pathlib.Path(folder)}: config.json ties the embeddings, but {head} differs from {embed}"
        )


def published(cfg: Config, params: dict, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, tensor) of every parameter, one at a time, in the order of `published_shapes`."""
    flat = flatten(params)
    for name, path, layer, how, shape in _rows(cfg):
        leaf = flat[path] if layer is None else flat[path][layer]
        leaf = np.asarray(leaf).astype(dtype)
        yield name, (leaf if how == "copy" else leaf.T).reshape(shape)


def hf_config(cfg: Config, dtype: str = "float32") -> dict:
    """config.json in the published flat form."""
    t, v = cfg.text, cfg.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": cfg.pad_token_id,
        "eos_token_id": cfg.eos_token_ids[0] if len(cfg.eos_token_ids) == 1 else list(cfg.eos_token_ids),
        "pad_token_id": cfg.pad_token_id,
        "image_token_id": cfg.image_token_id,
        "video_token_id": cfg.video_token_id,
        "vision_start_token_id": cfg.vision_start_token_id,
        "vision_end_token_id": cfg.vision_end_token_id,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "head_dim": t.head_dim,
        "initializer_range": 0.02,
        "intermediate_size": t.intermediate_size,
        "max_position_embeddings": t.max_position_embeddings,
        "num_attention_heads": t.num_heads,
        "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.num_kv_heads,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_theta": t.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
        "tie_word_embeddings": t.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "vocab_size": t.vocab_size,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": v.depth,
            "hidden_act": "silu",
            "hidden_size": v.hidden_size,
            "intermediate_size": v.intermediate_size,
            "num_heads": v.num_heads,
            "in_chans": v.in_channels,
            "in_channels": v.in_channels,
            "out_hidden_size": v.out_hidden_size,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "spatial_patch_size": v.patch_size,
            "window_size": v.window_size,
            "fullatt_block_indexes": list(v.fullatt_block_indexes),
            "tokens_per_second": _tokens_per_second(cfg),
            "temporal_patch_size": v.temporal_patch_size,
        },
    }


def _tokens_per_second(cfg: Config) -> int | float:
    """tokens_per_second as the published files write it: an integer when it is one."""
    return int(cfg.tokens_per_second) if float(cfg.tokens_per_second).is_integer() else cfg.tokens_per_second
