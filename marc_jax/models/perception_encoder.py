"""PE-Core (Perception Encoder, arXiv 2504.13181): image and text towers, B16, L14 and G14.

Source: facebookresearch/perception_models, core/vision_encoder; equal to it to 1e-5 in float32.
Parameters are nested dicts; inside a jitted function `bind(cfg, params)` gives the model.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marc_jax.models import clip, rope, trees
from marc_jax.models.clip import Config, Image, Text
from marc_jax.models.layers import Linear, Runtime, _param

STYLE = clip.Style(eps=1e-5, tanh=False)
VOCAB = 49408
LOGIT_SCALE = math.log(1 / 0.07)

# name: image (width, layers, heads, mlp, size, patch), text (width, layers, heads, context), output, class token
SIZES = {
    "PE-Core-T16-384": ((192, 12, 3, 768, 384, 16), (512, 12, 8, 32), 512, True),
    "PE-Core-S16-384": ((384, 12, 6, 1536, 384, 16), (512, 12, 8, 32), 512, True),
    "PE-Core-B16-224": ((768, 12, 12, 3072, 224, 16), (1024, 24, 16, 32), 1024, True),
    "PE-Core-L14-336": ((1024, 24, 16, 4096, 336, 14), (1024, 24, 16, 32), 1024, True),
    "PE-Core-G14-448": ((1536, 50, 16, 8960, 448, 14), (1280, 24, 20, 72), 1280, False),
}


def pe_core(name: str) -> Config:
    """The published model of this name, e.g. "PE-Core-L14-336"."""
    if name not in SIZES:
        raise ValueError(f"unknown PE-Core model {name!r}: one of {', '.join(SIZES)}")
    image, (width, layers, heads, context), output, class_token = SIZES[name]
    text = Text(width, layers, heads, 4 * width, VOCAB, context)
    return Config("pe-core", Image(*image), text, output, class_token, name=name)


def tiny(image=(64, 3, 4, 373, 56, 14), text=(32, 2, 2, 128, 90, 12), output=24, class_token=True) -> Config:
    """The architecture with any sizes: fields of `Image` and `Text` in order."""
    return Config("pe-core", Image(*image), Text(*text), output, class_token)


@functools.lru_cache(maxsize=64)
def rope_2d(grid: tuple[int, int], head_dim: int, class_token: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tables float32 [l, head_dim / 2] of a grid (h, w): the first half of a head turns with the column, then the row.

    Without a class token coordinates start at 0; with one they start at 1 and the class token, first, does not turn.
    """
    inv = rope.inverse_frequencies(head_dim // 2, 10000.0)
    first = int(class_token)
    row, col = np.meshgrid(np.arange(grid[0]) + first, np.arange(grid[1]) + first, indexing="ij")
    angles = np.concatenate([np.outer(a.ravel().astype(np.float32), inv) for a in (col, row)], axis=1)
    if class_token:
        angles = np.concatenate([np.zeros((1, angles.shape[1]), np.float32), angles])
    return np.cos(angles), np.sin(angles)


class ImageTower(nnx.Module):
    """Patches, class token, positions, blocks with 2-D rope, attention pooling over all tokens, projection."""

    def __init__(self, cfg: Config, runtime: Runtime):
        t = cfg.image
        self.patch_embed = Linear((3 * t.patch**2, t.width), (None, "embed"))
        self.class_token = _param((), (t.width,), (None,)) if cfg.class_token else None
        self.positions = clip.Table(cfg.class_token + t.grid**2, t.width)
        self.norm_pre = clip.LayerNorm(t.width, STYLE.eps)
        self.blocks = clip.Block(t, STYLE, runtime, (t.layers,))
        self.norm_post = clip.LayerNorm(t.width, STYLE.eps)
        self.pool = clip.AttentionPool(t.width, cfg.pool_heads, 4 * t.width, STYLE)
        self.proj = Linear((t.width, cfg.output), ("embed", None))
        self.cfg, self.runtime = cfg, runtime

    def features(self, pixels_bhwc: jax.Array) -> jax.Array:
        """Normed tokens [B, class? + h w, W] of normalised pixels [B, H, W, 3]; H, W multiples of the patch."""
        t, skip = self.cfg.image, int(self.cfg.class_token)
        grid = (pixels_bhwc.shape[1] // t.patch, pixels_bhwc.shape[2] // t.patch)
        x = self.patch_embed(clip.patches_of(pixels_bhwc.astype(self.runtime.dtype), t.patch))
        table = self.positions.embedding[...]
        x = x + clip.resample(table[skip:], t.grid, grid).astype(x.dtype)
        if skip:
            first = (self.class_token[...] + table[0]).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, t.width)), x], axis=1)
        x = clip.run_blocks(self.blocks, self.norm_pre(x), self.runtime, rope_2d(grid, t.width // t.heads, bool(skip)))
        return self.norm_post(x)

    def __call__(self, pixels_bhwc: jax.Array) -> jax.Array:
        return self.proj(self.pool(self.features(pixels_bhwc)))


class TextTower(nnx.Module):
    """Causal transformer; the feature of the end-of-text token, which has the largest id, is projected."""

    def __init__(self, cfg: Config, runtime: Runtime):
        t = cfg.text
        self.tokens = clip.Table(t.vocab, t.width, ("vocab", "embed"))
        self.positions = clip.Table(t.context, t.width)
        self.blocks = clip.Block(t, STYLE, runtime, (t.layers,))
        self.norm = clip.LayerNorm(t.width, STYLE.eps)
        self.proj = Linear((t.width, cfg.output), ("embed", None))
        self.cfg, self.runtime = cfg, runtime

    def __call__(self, tokens_bl: jax.Array) -> jax.Array:
        length = tokens_bl.shape[1]
        if length > self.cfg.text.context:
            raise ValueError(f"texts of {length} tokens, the model reads {self.cfg.text.context}")
        x = jnp.take(self.tokens.embedding[...], tokens_bl, axis=0) + self.positions.embedding[...][:length]
        x = self.norm(clip.run_blocks(self.blocks, x.astype(self.runtime.dtype), self.runtime, causal=True))
        end_b = jnp.argmax(tokens_bl, axis=1)  # the first of equal maxima: padding with end-of-text is harmless
        return self.proj(jnp.take_along_axis(x, end_b[:, None, None], axis=1)[:, 0])


class PerceptionEncoder(clip.TwoTowers):
    """The model; made by `bind`."""

    def __init__(self, cfg: Config, runtime: Runtime):
        super().__init__(ImageTower(cfg, runtime), TextTower(cfg, runtime))

    def embed_videos(self, pixels_bthwc: jax.Array, normalise_frames: bool = False) -> jax.Array:
        """[B, D], the mean over frames of their embeddings, each normalised before if asked.

        As published, the mean is not normalised again: with `normalise_frames` its length is below 1.
        """
        b, t = pixels_bthwc.shape[:2]
        emb_btd = self.embed_images(pixels_bthwc.reshape(b * t, *pixels_bthwc.shape[2:])).reshape(b, t, -1)
        return (clip.unit(emb_btd) if normalise_frames else emb_btd).mean(1)


def describe(cfg: Config) -> dict:
    """Nested dict of `Weight`: shape, logical axes and init of every parameter."""
    return trees.skeleton(PerceptionEncoder, cfg, Runtime())[1]


def bind(cfg: Config, params: dict, *, dtype=jnp.float32, attention="auto", remat=False) -> PerceptionEncoder:
    """The model over these parameters, for use inside jit; arguments as `qwen25_vl.bind`."""
    graphdef, _ = trees.skeleton(PerceptionEncoder, cfg, Runtime(jnp.dtype(dtype), attention, remat))
    return nnx.merge(graphdef, params)


def init(cfg: Config, key: jax.Array, dtype=jnp.float32, mesh=None) -> dict:
    """Random parameters; the temperature starts at 0.07."""
    params = trees.init(describe(cfg), key, dtype, mesh)
    return params | {"logit_scale": params["logit_scale"] + jnp.asarray(LOGIT_SCALE, dtype)}


def abstract(cfg: Config, dtype=jnp.float32, mesh=None) -> dict:
    """ShapeDtypeStructs of the parameters, with shardings when a mesh is given."""
    return trees.abstract(describe(cfg), dtype, mesh)
