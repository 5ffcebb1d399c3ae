"""What dual encoders of the CLIP family share: sizes, the pre-LN block and its stack, attention pooling, patches.

Axes: b image or text, l token, w width, n head, h head_dim, g grid side.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marc_jax.models import attention
from marc_jax.models.layers import Linear, Runtime, _param, maybe_remat, stack_of


@dataclasses.dataclass(frozen=True)
class Tower:
    """A stack of blocks."""

    width: int
    layers: int
    heads: int
    mlp_width: int

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class Image(Tower):
    """The image tower: `size` is the side of the square it was trained on, in pixels."""

    size: int
    patch: int

    @property
    def grid(self) -> int:
        return self.size // self.patch


@dataclasses.dataclass(frozen=True)
class Text(Tower):
    """The text tower: `context` is the most tokens it reads."""

    vocab: int
    context: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Both towers of a model; hashable.

    Attributes:
      family: "pe-core" or "siglip2".
      name: as published, e.g. "PE-Core-L14-336"; "" for sizes of one's own.
      output: width of the embeddings.
      class_token: the image tower has one (PE-Core but for G).
      pool_heads: heads of the attention that pools an image's tokens.
    """

    family: str
    image: Image
    text: Text
    output: int
    class_token: bool = False
    pool_heads: int = 8
    name: str = ""

    def __post_init__(self):
        if self.image.size % self.image.patch:
            raise ValueError(f"image size {self.image.size} is not a multiple of the patch {self.image.patch}")
        if self.image.width % self.pool_heads:
            raise ValueError(f"image width {self.image.width} is not a multiple of {self.pool_heads} pooling heads")


@dataclasses.dataclass(frozen=True)
class Style:
    """Where the families differ inside a block: LayerNorm's epsilon, and GELU by erf or by its tanh approximation."""

    eps: float
    tanh: bool


class LayerNorm(nnx.Module):
    """Statistics in float32; scale and bias."""

    def __init__(self, size: int, eps: float, stack=()):
        self.scale = _param(stack, (size,), (None,), "ones")
        self.bias = _param(stack, (size,), (None,), "zeros")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Table(nnx.Module):
    """A learned table of embeddings [rows, width]."""

    def __init__(self, rows: int, width: int, axes=(None, "embed")):
        self.embedding = _param((), (rows, width), axes)


class MLP(nnx.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int, mlp_width: int, style: Style, stack=()):
        self.up = Linear((width, mlp_width), ("embed", "mlp"), bias=True, stack=stack)
        self.down = Linear((mlp_width, width), ("mlp", "embed"), bias=True, stack=stack)
        self.tanh = style.tanh

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=self.tanh))


def rotate_pairs(x_blnh: jax.Array, cos_lh: np.ndarray, sin_lh: np.ndarray) -> jax.Array:
    """Rotates adjacent pairs (x0, x1) -> (x0 c - x1 s, x1 c + x0 s); tables [l, h / 2], float32; back in x's dtype."""
    pairs = x_blnh.astype(jnp.float32).reshape(*x_blnh.shape[:-1], -1, 2)
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], cos_lh[:, None], sin_lh[:, None]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x_blnh.shape).astype(x_blnh.dtype)


class Attention(nnx.Module):
    """Self-attention; the kernel's columns are q, k, v, each head-major."""

    def __init__(self, tower: Tower, runtime: Runtime, stack=()):
        w, n = tower.width, tower.heads
        self.qkv = Linear((w, 3 * w), ("embed", "heads"), bias=True, stack=stack, units=(0, 3 * n))
        self.out = Linear((w, w), ("heads", "embed"), bias=True, stack=stack, units=(n, 0))
        self.heads, self.impl = n, runtime.attention

    def __call__(self, x_blw: jax.Array, rope=None, causal: bool = False) -> jax.Array:
        b, length, _ = x_blw.shape
        qkv = self.qkv(x_blw).reshape(b, length, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if rope is not None:
            q, k = rotate_pairs(q, *rope), rotate_pairs(k, *rope)
        if causal:
            out = attention.causal(q, k, v, jnp.ones((b, length), bool), self.impl)
        else:
            out = attention.bidirectional(q, k, v, self.impl)
        return self.out(out.reshape(b, length, -1))


class Block(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, tower: Tower, style: Style, runtime: Runtime, stack=()):
        self.norm1 = LayerNorm(tower.width, style.eps, stack)
        self.attn = Attention(tower, runtime, stack)
        self.norm2 = LayerNorm(tower.width, style.eps, stack)
        self.mlp = MLP(tower.width, tower.mlp_width, style, stack)

    def __call__(self, x_blw, rope=None, causal=False):
        x_blw = x_blw + self.attn(self.norm1(x_blw), rope, causal)
        return x_blw + self.mlp(self.norm2(x_blw))


def run_blocks(blocks: Block, x_blw: jax.Array, runtime: Runtime, rope=None, causal: bool = False) -> jax.Array:
    """The stacked blocks, one after the other, as one scan."""
    make, stacked = stack_of(blocks)

    def body(x_blw, weights):
        return make(weights)(x_blw, rope, causal), None

    return jax.lax.scan(maybe_remat(body, runtime), x_blw, stacked)[0]


class AttentionPool(nnx.Module):
    """A learned query attends to all tokens, y; then y + mlp(norm(y)). -> [B, W]."""

    def __init__(self, width: int, heads: int, mlp_width: int, style: Style):
        self.probe = _param((), (width,), (None,))
        self.qkv = Linear((width, 3 * width), ("embed", "heads"), bias=True, units=(0, 3 * heads))
        self.out = Linear((width, width), ("heads", "embed"), bias=True, units=(heads, 0))
        self.norm = LayerNorm(width, style.eps)
        self.mlp = MLP(width, mlp_width, style)
        self.heads = heads

    def __call__(self, x_blw: jax.Array) -> jax.Array:
        w, dtype = x_blw.shape[-1], x_blw.dtype
        kernel, bias = self.qkv.kernel[...].astype(dtype), self.qkv.bias[...].astype(dtype)
        q_nh = (self.probe[...].astype(dtype) @ kernel[:, :w] + bias[:w]).reshape(self.heads, -1)
        kv = (x_blw @ kernel[:, w:] + bias[w:]).reshape(*x_blw.shape[:2], 2, self.heads, -1)
        q_nh = q_nh * q_nh.shape[-1] ** -0.5
        score_bnl = jnp.einsum("nh,blnh->bnl", q_nh, kv[:, :, 0], preferred_element_type=jnp.float32)
        weight_bnl = jax.nn.softmax(score_bnl, axis=-1).astype(dtype)
        y_bw = self.out(jnp.einsum("bnl,blnh->bnh", weight_bnl, kv[:, :, 1]).reshape(-1, w))
        return y_bw + self.mlp(self.norm(y_bw))


class TwoTowers(nnx.Module):
    """An image and a text tower over one space; `scale()` times the cosine is a pair's logit."""

    def __init__(self, image: nnx.Module, text: nnx.Module):
        self.image, self.text = image, text
        self.logit_scale = _param((), (), (), "zeros")

    def embed_images(self, pixels_bhwc: jax.Array) -> jax.Array:
        """[B, D], not normalised, of uint8 [B, H, W, 3] (or pixels already in [-1, 1])."""
        return self.image(normalise(pixels_bhwc) if pixels_bhwc.dtype == jnp.uint8 else pixels_bhwc)

    def embed_texts(self, tokens_bl: jax.Array) -> jax.Array:
        """[B, D], not normalised, of token ids [B, L]; the text tower says which L."""
        return self.text(tokens_bl)

    def scale(self) -> jax.Array:
        """What cosine similarities are multiplied by."""
        return jnp.exp(self.logit_scale[...])


def normalise(pixels: jax.Array) -> jax.Array:
    """uint8 [..., 3] -> float32 in [-1, 1]: mean and standard deviation are 0.5 in both families."""
    return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


def patches_of(pixels_bhwc: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, 3] -> row-major patches [B, (H / p)(W / p), 3 p p], each in the order (channel, row, column)."""
    b, height, width, c = pixels_bhwc.shape
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"an image of {width}x{height} pixels does not divide into patches of {patch}")
    x = pixels_bhwc.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (height // patch) * (width // patch), -1)


def bilinear(old: int, new: int) -> np.ndarray:
    """Matrix float32 [new, old] of bilinear resampling without antialiasing, pixel centres at half-integers."""
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    low = np.minimum(place.astype(int), old - 1)
    high, share = np.minimum(low + 1, old - 1), place - low
    out = np.zeros((new, old), np.float32)
    np.add.at(out, (np.arange(new), low), 1 - share)
    np.add.at(out, (np.arange(new), high), share)
    return out


def resample(table_lw: jax.Array, side: int, grid: tuple[int, int]) -> jax.Array:
    """A table of positions [side * side, W] on another grid: [h * w, W]."""
    if grid == (side, side):
        return table_lw
    table = table_lw.astype(jnp.float32).reshape(side, side, -1)
    out = jnp.einsum("hg,wk,gkd->hwd", bilinear(side, grid[0]), bilinear(side, grid[1]), table, precision="highest")
    return out.reshape(grid[0] * grid[1], -1)


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) along the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def config_from(raw: dict) -> Config:
    """The inverse of `dataclasses.asdict`. Raises ValueError for another structure."""
    try:
        return Config(**(raw | {"image": Image(**raw["image"]), "text": Text(**raw["text"])}))
    except (TypeError, KeyError) as e:
        raise ValueError(f"not the sizes of a dual encoder ({e!r})") from None
