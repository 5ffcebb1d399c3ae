"""SigLIP 2 (arXiv 2502.14786), fixed-resolution form: image and text towers. Equal to transformers to 1e-5 in float32.

The `-naflex` checkpoints are another architecture. Parameters and `bind` as in `perception_encoder`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from marc_jax.models import clip, trees
from marc_jax.models.clip import Config, Image, Text
from marc_jax.models.layers import Linear, Runtime, _param

STYLE = clip.Style(eps=1e-6, tanh=True)
LOGIT_SCALE, LOGIT_BIAS = math.log(10), -10.0  # where training starts (SigLIP, arXiv 2303.15343)

# name: (width, layers, heads, mlp) of both towers, image size, patch
SIZES = {
    "siglip2-base-patch16-224": ((768, 12, 12, 3072), 224, 16),
    "siglip2-base-patch16-256": ((768, 12, 12, 3072), 256, 16),
    "siglip2-base-patch16-384": ((768, 12, 12, 3072), 384, 16),
    "siglip2-base-patch16-512": ((768, 12, 12, 3072), 512, 16),
    "siglip2-large-patch16-256": ((1024, 24, 16, 4096), 256, 16),
    "siglip2-large-patch16-384": ((1024, 24, 16, 4096), 384, 16),
}


def siglip2(name: str = "siglip2-base-patch16-224") -> Config:
    """The published model of this name."""
    if name not in SIZES:
        raise ValueError(f"unknown SigLIP 2 model {name!r}: one of {', '.join(SIZES)}")
    tower, size, patch = SIZES[name]
    return Config("siglip2", Image(*tower, size, patch), Text(*tower, 256000, 64), tower[0], False, tower[2], name)


def tiny(image=(32, 2, 2, 48, 56, 14), text=(32, 2, 2, 48, 90, 12)) -> Config:
    """The architecture with any sizes: fields of `Image` and `Text` in order; widths equal."""
    return Config("siglip2", Image(*image), Text(*text), image[0], False, image[2])


class ImageTower(nnx.Module):
    """Patches, learned positions, blocks, attention pooling; the pooled vector is the embedding."""

    def __init__(self, cfg: Config, runtime: Runtime):
        t = cfg.image
        self.patch_embed = Linear((3 * t.patch**2, t.width), (None, "embed"), bias=True)
        self.positions = clip.Table(t.grid**2, t.width)
        self.blocks = clip.Block(t, STYLE, runtime, (t.layers,))
        self.norm_post = clip.LayerNorm(t.width, STYLE.eps)
        self.pool = clip.AttentionPool(t.width, cfg.pool_heads, t.mlp_width, STYLE)
        self.cfg, self.runtime = cfg, runtime

    def features(self, pixels_bhwc: jax.Array) -> jax.Array:
        """Normed tokens [B, h w, W] of normalised pixels [B, size, size, 3]."""
        t = self.cfg.image
        if pixels_bhwc.shape[1:3] != (t.size, t.size):
            raise ValueError(f"images of {pixels_bhwc.shape[1:3]} pixels, the model reads {t.size}x{t.size}")
        x = self.patch_embed(clip.patches_of(pixels_bhwc.astype(self.runtime.dtype), t.patch))
        x = x + self.positions.embedding[...].astype(x.dtype)
        return self.norm_post(clip.run_blocks(self.blocks, x, self.runtime))

    def __call__(self, pixels_bhwc: jax.Array) -> jax.Array:
        return self.pool(self.features(pixels_bhwc))


class TextTower(nnx.Module):
    """Bidirectional, no mask: every text is padded to `context` and the last position is the text's."""

    def __init__(self, cfg: Config, runtime: Runtime):
        t = cfg.text
        self.tokens = clip.Table(t.vocab, t.width, ("vocab", "embed"))
        self.positions = clip.Table(t.context, t.width)
        self.blocks = clip.Block(t, STYLE, runtime, (t.layers,))
        self.norm = clip.LayerNorm(t.width, STYLE.eps)
        self.head = Linear((t.width, cfg.output), ("embed", None), bias=True)
        self.cfg, self.runtime = cfg, runtime

    def __call__(self, tokens_bl: jax.Array) -> jax.Array:
        if tokens_bl.shape[1] != self.cfg.text.context:
            raise ValueError(f"texts of {tokens_bl.shape[1]} tokens: pad them to {self.cfg.text.context}")
        x = jnp.take(self.tokens.embedding[...], tokens_bl, axis=0) + self.positions.embedding[...]
        x = self.norm(clip.run_blocks(self.blocks, x.astype(self.runtime.dtype), self.runtime))
        return self.head(x[:, -1])


class SigLIP2(clip.TwoTowers):
    """The model; made by `bind`. Score of a pair: scale() * cosine + logit_bias."""

    def __init__(self, cfg: Config, runtime: Runtime):
        super().__init__(ImageTower(cfg, runtime), TextTower(cfg, runtime))
        self.logit_bias = _param((), (), (), "zeros")


def describe(cfg: Config) -> dict:
    """Nested dict of `Weight`: shape, logical axes and init of every parameter."""
    return trees.skeleton(SigLIP2, cfg, Runtime())[1]


def bind(cfg: Config, params: dict, *, dtype=jnp.float32, attention="auto", remat=False) -> SigLIP2:
    """The model over these parameters, for use inside jit; arguments as `qwen25_vl.bind`."""
    graphdef, _ = trees.skeleton(SigLIP2, cfg, Runtime(jnp.dtype(dtype), attention, remat))
    return nnx.merge(graphdef, params)


def init(cfg: Config, key: jax.Array, dtype=jnp.float32, mesh=None) -> dict:
    """Random parameters; temperature and bias where SigLIP's training starts."""
    start = {"logit_scale": jnp.asarray(LOGIT_SCALE, dtype), "logit_bias": jnp.asarray(LOGIT_BIAS, dtype)}
    params = trees.init(describe(cfg), key, dtype, mesh)
    return params | {name: params[name] + value for name, value in start.items()}


def abstract(cfg: Config, dtype=jnp.float32, mesh=None) -> dict:
    """ShapeDtypeStructs of the parameters, with shardings when a mesh is given."""
    return trees.abstract(describe(cfg), dtype, mesh)
