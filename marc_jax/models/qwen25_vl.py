"""Qwen2.5-VL: configuration, parameters and the bound model.

Parameters are plain nested dicts of arrays (`text/layers/attn/q/kernel`, layers stacked on axis 0). Inside a jitted
function, `bind(cfg, params)` turns them into a `Qwen25VL` whose methods are ordinary pure computations. Teacher,
reference and policy are this one function over different dicts.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax.models import lora, packed, trees
from marc_jax.models.cache import KV
from marc_jax.models.decoder import Decoder, TextConfig
from marc_jax.models.layers import Runtime
from marc_jax.models.packed import Packed
from marc_jax.models.vision import VisionConfig, VisionTower, Watched

__all__ = ["KV", "Config", "ConfigError", "Qwen25VL", "TextConfig", "VisionConfig", "abstract", "bind"]
__all__ += ["config_from_hf", "describe", "init", "pack", "qwen25_vl", "tiny"]

SIZES = {
    "3b": {"text": (151936, 2048, 36, 16, 2, 11008, True), "vision": 3420},
    "7b": {"text": (152064, 3584, 28, 28, 4, 18944, False), "vision": 3420},
    "32b": {"text": (152064, 5120, 64, 40, 8, 27648, False), "vision": 3456},
    "72b": {"text": (152064, 8192, 80, 64, 8, 29568, False), "vision": 3456},
}


class ConfigError(ValueError):
    """A config.json that is not a Qwen2.5-VL; the message names the file and the field."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole model; hashable, so it can be a static argument. Token ids are the tokenizer's."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    eos_token_ids: tuple[int, ...] = (151645, 151643)
    tokens_per_second: float = 2.0

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size {self.vision.out_hidden_size} != text hidden_size {self.text.hidden_size}"
            )


def qwen25_vl(size: str) -> Config:
    """The published model of this size: "3b", "7b", "32b" or "72b"."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: one of {sorted(SIZES)}")
    vocab, width, layers, heads, kv, mlp, tied = SIZES[size]["text"]
    text = TextConfig(vocab, width, layers, heads, kv, 128, mlp, tie_word_embeddings=tied)
    return Config(text, VisionConfig(32, 1280, 16, SIZES[size]["vision"], width))


def tiny(
    *,
    vocab_size: int = 320,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
    vision_depth: int = 2,
    vision_hidden_size: int = 32,
    vision_num_heads: int = 2,
    vision_intermediate_size: int | None = None,
    patch_size: int = 14,
    window_size: int = 112,
    fullatt_block_indexes: tuple[int, ...] | None = None,
    mrope_section: tuple[int, ...] | None = None,
    **ids: Any,
) -> Config:
    """The same architecture with any sizes; `ids` are the remaining fields of `Config` (token ids).

    Defaults: widths of the MLPs 2x (rounded), every second vision block full, M-RoPE sections in the published
    proportion 2:3:3.
    """
    half = hidden_size // num_heads // 2
    rest = (half * 3 + 4) // 8
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size or 2 * hidden_size,
        mrope_section=tuple(mrope_section or (half - 2 * rest, rest, rest)),
        tie_word_embeddings=tie_word_embeddings,
    )
    vision = VisionConfig(
        depth=vision_depth,
        hidden_size=vision_hidden_size,
        num_heads=vision_num_heads,
        intermediate_size=vision_intermediate_size or 2 * vision_hidden_size,
        out_hidden_size=hidden_size,
        patch_size=patch_size,
        window_size=window_size,
        fullatt_block_indexes=(
            tuple(range(1, vision_depth, 2)) if fullatt_block_indexes is None else tuple(fullatt_block_indexes)
        ),
    )
    defaults = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    defaults |= {"pad_token_id": 0, "eos_token_ids": (2, 0)}
    return Config(text, vision, **(defaults | ids))


def _eos(raw: dict, text: dict, folder: pathlib.Path | None) -> tuple[int, ...]:
    """The set of stop ids: generation_config.json's when there is one, else config.json's."""
    ids = raw.get("eos_token_id", text.get("eos_token_id"))
    path = folder / "generation_config.json" if folder is not None else None
    if path is not None and path.exists():
        try:
            ids = json.loads(path.read_text()).get("eos_token_id", ids)
        except (OSError, ValueError, AttributeError) as e:
            raise ConfigError(f"{path}: not a readable generation_config.json ({e})") from None
    ids = [151645, 151643] if ids is None else ids
    return tuple(ids) if isinstance(ids, list) else (ids,)


def config_from_hf(source: dict | str | pathlib.Path, name: str = "config") -> Config:
    """Reads a published config.json (flat), a newer one (nested text_config, either rope spelling), or a dict.

    Args:
      source: the dict, the file, or the folder that holds it.
      name: of a dict, in errors.
    Raises:
      ConfigError: another architecture, or a field that is missing, naming file and field.
    """
    raw, folder = source, None
    if not isinstance(source, dict):
        path = pathlib.Path(source)
        path = path / "config.json" if path.is_dir() else path
        name, folder = str(path), path.parent
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path}: not a readable config.json ({e})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}: holds a {type(raw).__name__}, not an object")
    kind = raw.get("model_type")
    if kind != "qwen2_5_vl":
        raise ConfigError(f"{name}: model_type is {kind!r}, expected 'qwen2_5_vl'")
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method")
        raise ConfigError(f"{name}: quantised weights ({method!r}) are not read; take the model they were made from")
    try:
        return _config(raw, name, folder)
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise ConfigError(f"{name}: {e}") from None


def _config(raw: dict, name: str, folder: pathlib.Path | None) -> Config:
    def get(section: dict, where: str, *keys: str):
        for key in keys:
            if section.get(key) is not None:
                return section[key]
        raise ConfigError(f"{name}: {where}{' or '.join(keys)} is missing")

    def top(key: str, default):
        return raw[key] if raw.get(key) is not None else default

    text, vis = raw.get("text_config") or raw, raw.get("vision_config") or {}
    rope_cfg = text.get("rope_parameters") or text.get("rope_scaling") or {}
    hidden, heads = get(text, "", "hidden_size"), get(text, "", "num_attention_heads")
    text_cfg = TextConfig(
        vocab_size=get(text, "", "vocab_size"),
        hidden_size=hidden,
        num_layers=get(text, "", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=get(text, "", "num_key_value_heads"),
        head_dim=text.get("head_dim") or hidden // heads,
        intermediate_size=get(text, "", "intermediate_size"),
        rope_theta=float(rope_cfg.get("rope_theta") or get(text, "", "rope_theta")),
        mrope_section=tuple(get(rope_cfg, "rope_scaling.", "mrope_section")),
        rms_norm_eps=get(text, "", "rms_norm_eps"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        max_position_embeddings=int(text.get("max_position_embeddings") or 128000),
    )
    names = [f.name for f in dataclasses.fields(VisionConfig) if f.name not in ("in_channels", "fullatt_block_indexes")]
    where = "vision_config."
    vision_cfg = VisionConfig(
        **{key: get(vis, where, key) for key in names},
        fullatt_block_indexes=tuple(get(vis, where, "fullatt_block_indexes")),
        in_channels=get(vis, where, "in_chans", "in_channels"),
    )
    return Config(
        text_cfg,
        vision_cfg,
        image_token_id=top("image_token_id", 151655),
        video_token_id=top("video_token_id", 151656),
        vision_start_token_id=top("vision_start_token_id", 151652),
        vision_end_token_id=top("vision_end_token_id", 151653),
        pad_token_id=top("pad_token_id", text.get("pad_token_id") or top("bos_token_id", 151643)),
        eos_token_ids=_eos(raw, text, folder),
        tokens_per_second=float(get(vis, where, "tokens_per_second")),
    )


class Qwen25VL(nnx.Module):
    """The model; made by `bind`. Axis letters as in `marc_jax.rl.types`."""

    def __init__(self, cfg: Config, runtime: Runtime, visual=None, text=None):
        self.visual = visual or VisionTower(cfg.vision, runtime)
        self.text = text or Decoder(cfg.text, runtime)
        self.cfg, self.runtime = cfg, runtime

    def vision_features(self, patches_snc: jax.Array, grid_hw: tuple[int, int]) -> jax.Array:
        """Last block's output [S, n, V] of S temporal patches; grid (h, w) in patches, static; merge-block-major."""
        return self.visual.features(patches_snc, grid_hw)

    def merge_features(self, features_snv: jax.Array) -> jax.Array:
        """Visual tokens [S, p = n / 4, D] of `vision_features`."""
        return self.visual.merge(features_snv)

    def vision(self, patches_snc: jax.Array, grid_hw: tuple[int, int]) -> jax.Array:
        """Visual tokens [S, p, D] of patches [S, n, C]."""
        return self.visual.merge(self.visual.features(patches_snc, grid_hw))

    def watched_vision(self, patches_snc: jax.Array, grid_hw: tuple[int, int]) -> tuple[jax.Array, Watched]:
        """`vision`, and the attention of the tower's last full block, per visual token. Costs one more product of
        queries and keys per full block; `vision` pays nothing for it."""
        features, watched = self.visual.watched_features(patches_snc, grid_hw)
        return self.visual.merge(features), watched

    def embed(self, tokens_bl: jax.Array, vis_bnd=None, vis_index_bl=None) -> jax.Array:
        """Input rows [..., D]: the token's embedding, or row `vis_index` of the prompt's visual tokens where >= 0."""
        if vis_bnd is None:
            return self.text.rows(tokens_bl)
        # Any row will do where a visual token goes; different ones, because the embedding's gradient is a scatter, and
        # thousands of equal placeholders would queue at one row.
        x = self.text.rows(jnp.where(vis_index_bl >= 0, vis_index_bl % self.cfg.text.vocab_size, tokens_bl))
        rows = jnp.take_along_axis(vis_bnd.astype(x.dtype), jnp.maximum(vis_index_bl, 0)[..., None], axis=1)
        return jnp.where((vis_index_bl >= 0)[..., None], rows, x)

    def prefill(self, x_bld, pos_3bl, mask_bl, at_b=None) -> tuple[jax.Array, KV]:
        """Normed hidden states [B, L, D] and the cache [layers, B, L, kv, hd] of right-padded prompts.

        With `at_b` (int [B]) only the hidden states [B, D] of those positions.
        """
        return self.text.prefill(x_bld, pos_3bl, mask_bl, at_b)

    def prefill_pruned(self, x_bld, pos_3bl, mask_bl, at_b, layer: int, keep, length: int):
        """Prefill in which only the tokens that `keep` names go on after `layer` layers: `Decoder.prefill_pruned`."""
        return self.text.prefill_pruned(x_bld, pos_3bl, mask_bl, at_b, layer, keep, length)

    def prefill_group(self, x_bpd, pos_3bp, mask_bp, at_b, x_bgrd, pos_3bgr, mask_bgr) -> tuple[jax.Array, jax.Array]:
        """Right-padded prompts and teacher-forced suffixes in one pass: ([B, D] of prompts at `at_b`, [B, G, R, D]).

        Each (b, g) sees its prompt and its own causal past.
        """
        return self.text.prefill_group(x_bpd, pos_3bp, mask_bp, at_b, x_bgrd, pos_3bgr, mask_bgr)

    def prefill_packed(self, x_bld, pos_3bl, segment_bl) -> jax.Array:
        """Normed hidden states [B, L, D] of rows that hold several segments (int32 [B, L], 0 is padding) end to end."""
        return self.text.prefill_packed(x_bld, pos_3bl, segment_bl)

    def decode_step(self, x_bgd, pos_3bg, index, prefix: KV, prefix_mask_bp, cache: KV) -> tuple[jax.Array, KV]:
        """One token per (b, g): attends to the prefix and to slots <= index, writes slot `index`. -> [B, G, D]."""
        return self.text.decode_step(x_bgd, pos_3bg, index, prefix, prefix_mask_bp, cache)

    def empty_cache(self, b: int, g: int, r: int, dtype=None) -> KV:
        """A suffix cache of (at least) R slots for B x G completions (activation dtype by default)."""
        return self.text.empty_cache(b, g, r, dtype)

    def for_decoding(self) -> "Qwen25VL":
        """The same model with its decoder laid out for a decoding loop; make it before the loop."""
        return Qwen25VL(self.cfg, self.runtime, self.visual, self.text.for_decoding())

    def head(self) -> jax.Array:
        """The output matrix [D, vocab]; the embedding transposed when tied."""
        return self.text.output()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., vocab] of normed hidden states [..., D]."""
        return self.text.logits(hidden)


def _rename(tree: dict, old: str, new: str) -> dict:
    return {new if key == old else key: value for key, value in tree.items()}


def describe(cfg: Config) -> dict:
    """Nested dict of `Weight`: shape, logical axes and init of every parameter."""
    return _rename(trees.skeleton(Qwen25VL, cfg, Runtime())[1], "visual", "vision")


def bind(cfg: Config, params: dict, *, dtype=jnp.float32, attention: str = "auto",
         remat: bool | str = False) -> Qwen25VL:
    """The model over these parameters; cheap, made for use inside jit.

    Args:
      params: nested dict as `init` returns it, with adapters where there are some (`lora`), or packed for decoding
        (`pack`); cast to `dtype` where used.
      dtype: activation dtype.
      attention: "auto", "xla", "cudnn" or "splash".
      remat: recompute each layer in the backward pass: True or "layer" from its input alone; "attention" keeps all
        around attention (a GPU's flash kernels included), "products" every matrix product (near the memory of False).
    """
    runtime = Runtime(jnp.dtype(dtype), attention, remat)
    graphdef, _ = trees.skeleton(Qwen25VL, cfg, runtime)
    if not isinstance(params["text"]["layers"], list):
        params, adapters = lora.split(_rename(params, "vision", "visual"))
        model = nnx.merge(graphdef, params)
        lora.attach(model, adapters)
        return model
    visual = nnx.merge(nnx.graphdef(VisionTower(cfg.vision, runtime)), params["vision"])
    return Qwen25VL(cfg, runtime, visual, Packed(cfg.text, runtime, params["text"]))


def pack(cfg: Config, params: dict, dtype=jnp.bfloat16, bits: int = 16) -> dict:
    """Parameters laid out for serving: `bind` takes them like those of `init`, but not for training.

    Args:
      dtype: of the result.
      bits: 8 quantises the decoder's matrices and the head to int8 with one scale per output.
    """
    vision = jax.tree.map(lambda w: w.astype(dtype), lora.merge(params["vision"]))
    text = packed.pack(params["text"], cfg.text.tie_word_embeddings, dtype=dtype, bits=bits)
    return {"vision": vision, "text": text}


def init(cfg: Config, key: jax.Array, dtype=jnp.float32, mesh=None) -> dict:
    """Random parameters; with a mesh each leaf is created on its own shards. See `trees.init`."""
    return trees.init(describe(cfg), key, dtype, mesh)


def abstract(cfg: Config, dtype=jnp.float32, mesh=None) -> dict:
    """ShapeDtypeStructs of the parameters, with shardings when a mesh is given: the target of restore and loading."""
    return trees.abstract(describe(cfg), dtype, mesh)
