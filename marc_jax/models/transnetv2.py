"""TransNetV2 (Soucek and Lokoc, 2020): shot borders from 27 x 48 pixel frames at the file's own frame rate.

    cfg = transnetv2.Config()
    one_hot_n, many_hot_n = transnetv2.predict(cfg, params, frames_n)      # uint8 [n, 27, 48, 3] -> probabilities
    transnetv2.scenes(one_hot_n)                                           # [[first, last], ...]

Parameters are plain nested dicts (`stack0/cell0/rate1/spatial/kernel`) as those of `qwen25_vl`; `bind` makes the model
inside a jitted function. Frames are squashed to 48 x 27 whatever their aspect. The decision for a frame sees 25 frames
or more on either side: it cannot be made online (`memory.events` can).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marc_jax.models import trees
from marc_jax.models.layers import Linear, Runtime, _param
from marc_jax.models.safetensors_io import WeightsError
from marc_jax.paths import flatten, unflatten

__all__ = ["Config", "TransNetV2", "WeightsError", "abstract", "assemble", "bind", "describe", "init", "names"]
__all__ += ["predict", "scenes"]

RATES = (1, 2, 4, 8)
WINDOW, STRIDE = 100, 50  # frames seen and frames decided by one window; a quarter of the window is context each side


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published model's (7,616,258 parameters and 1,792 batch statistics)."""

    filters: int = 16
    stacks: int = 3
    cells: int = 2
    width: int = 1024
    similarity: int = 128
    lookup: int = 101
    height: int = 27
    columns: int = 48

    def __post_init__(self):
        if self.lookup % 2 == 0 or min(self.height, self.columns) >> self.stacks < 1:
            raise ValueError(f"need an odd lookup and at least one pixel after {self.stacks} poolings, got {self}")

    def channels(self, stack: int) -> int:
        """Channels that leave a stack; 3 enter the first."""
        return 4 * self.filters << stack if stack >= 0 else 3


class Kernel(nnx.Module):
    """A convolution's kernel [time, height, width, in, out], no bias."""

    def __init__(self, *shape: int):
        self.kernel = _param((), shape, (None,) * 5)


class Branch(nnx.Module):
    def __init__(self, inputs: int, filters: int):
        self.spatial = Kernel(1, 3, 3, inputs, 2 * filters)
        self.temporal = Kernel(3, 1, 1, 2 * filters, filters)


class BatchNorm(nnx.Module):
    """Over all axes but the last; the statistics are parameters like the others."""

    def __init__(self, size: int, eps: float = 1e-3):
        self.scale, self.bias = _param((), (size,), (None,), "ones"), _param((), (size,), (None,), "zeros")
        self.mean, self.var = _param((), (size,), (None,), "zeros"), _param((), (size,), (None,), "ones")
        self.eps = eps

    def __call__(self, x: jax.Array, seen: dict | None):
        """Normalises by the stored statistics, or by the batch's own, which are put into `seen`."""
        mean, var = self.mean[...], self.var[...]
        if seen is not None:
            x32 = x.astype(jnp.float32)
            mean, var = x32.mean((0, 1, 2, 3)), x32.var((0, 1, 2, 3))
            count = x.size // x.shape[-1]
            seen |= {"mean": mean, "var": var * count / (count - 1)}  # stored unbiased, used biased
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        return x * scale.astype(x.dtype) + (self.bias[...] - mean * scale).astype(x.dtype)


class Cell(nnx.Module):
    """Four dilated branches on one input, side by side, then one batch norm."""

    def __init__(self, inputs: int, filters: int):
        for rate in RATES:
            setattr(self, f"rate{rate}", Branch(inputs, filters))
        self.norm = BatchNorm(4 * filters)

    def __call__(self, x_bthwc: jax.Array, seen: dict | None) -> jax.Array:
        b, t, h, w, c = x_bthwc.shape
        branches = [getattr(self, f"rate{rate}") for rate in RATES]
        # One spatial convolution for all branches: they read the same input and nothing lies between the two steps.
        kernel = jnp.concatenate([branch.spatial.kernel[0] for branch in branches], axis=-1).astype(x_bthwc.dtype)
        wide = jax.lax.conv_general_dilated(
            x_bthwc.reshape(b * t, h, w, c), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(b, t, h, w, -1)
        parts = jnp.split(wide, len(RATES), axis=-1)
        out = [_in_time(x, branch.temporal.kernel, r) for x, branch, r in zip(parts, branches, RATES, strict=True)]
        return self.norm(jnp.concatenate(out, axis=-1), seen)


def _in_time(x_bthwc: jax.Array, kernel, rate: int) -> jax.Array:
    """Convolution over time, kernel [3, 1, 1, in, out], zeros outside the clip: one matmul of three shifted copies."""
    t = x_bthwc.shape[1]
    padded = jnp.pad(x_bthwc, ((0, 0), (rate, rate), (0, 0), (0, 0), (0, 0)))
    shifted = jnp.concatenate([padded[:, i * rate : i * rate + t] for i in range(3)], axis=-1)
    return shifted @ kernel[...].reshape(-1, kernel.shape[-1]).astype(x_bthwc.dtype)


class Stack(nnx.Module):
    """relu(last cell) + first cell (ReLU after all but the last), then 2 x 2 average pooling, rounding down."""

    def __init__(self, cfg: Config, index: int):
        filters = cfg.filters << index
        for c in range(cfg.cells):
            setattr(self, f"cell{c}", Cell(4 * filters if c else cfg.channels(index - 1), filters))
        self.cells = cfg.cells

    def __call__(self, x_bthwc: jax.Array, seen: dict | None) -> jax.Array:
        first = None
        for c in range(self.cells):
            x_bthwc = getattr(self, f"cell{c}")(x_bthwc, None if seen is None else seen.setdefault(f"cell{c}", {}))
            first = jax.nn.relu(x_bthwc) if c == 0 and self.cells > 1 else x_bthwc if c == 0 else first
            x_bthwc = jax.nn.relu(x_bthwc)
        x = x_bthwc + first
        b, t, h, w, c = x.shape
        x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, t, h // 2, 2, w // 2, 2, c)
        return x.mean((3, 5))


class Similarity(nnx.Module):
    """A frame's cosines with the `lookup` frames around it (0 outside the clip), projected; ReLU."""

    def __init__(self, cfg: Config, inputs: int | None):
        width = cfg.similarity
        self.project = Linear((inputs, width), (None, None), bias=True) if inputs else None
        self.out = Linear((cfg.lookup, width), (None, None), bias=True)
        self.lookup = cfg.lookup

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        x = x_btc if self.project is None else self.project(x_btc)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return jax.nn.relu(self.out(band(x @ x.mT, self.lookup)))


def band(square_btt: jax.Array, size: int) -> jax.Array:
    """[B, T, size]: row t holds columns t - size // 2 ... t + size // 2, zeros outside; size odd."""
    b, t, _ = square_btt.shape
    # Rows one element longer than the padded ones: each row starts one column further right. No gather.
    flat = jnp.pad(square_btt, ((0, 0), (0, 0), (size // 2, size // 2))).reshape(b, -1)
    return jnp.pad(flat, ((0, 0), (0, t))).reshape(b, t, t + size)[:, :, :size]


def colour_histograms(frames_bthwc: jax.Array) -> jax.Array:
    """float32 [B, T, 512]: pixels per bin of 8 x 8 x 8 colours of uint8 frames."""
    b, t = frames_bthwc.shape[:2]
    r, g, blue = jnp.moveaxis(frames_bthwc.reshape(b * t, -1, 3).astype(jnp.int32) >> 5, -1, 0)
    rows = jnp.arange(b * t)[:, None]
    counts = jnp.zeros((b * t, 512), jnp.int32).at[rows, (r << 6) + (g << 3) + blue].add(1)
    return counts.reshape(b, t, 512).astype(jnp.float32)


class TransNetV2(nnx.Module):
    """The network; made by `bind`."""

    def __init__(self, cfg: Config, runtime: Runtime):
        for s in range(cfg.stacks):
            setattr(self, f"stack{s}", Stack(cfg, s))
        self.similarity = Similarity(cfg, sum(cfg.channels(s) for s in range(cfg.stacks)))
        self.colour = Similarity(cfg, None)
        pixels = (cfg.height >> cfg.stacks) * (cfg.columns >> cfg.stacks)
        flat = cfg.channels(cfg.stacks - 1) * pixels
        self.hidden = Linear((2 * cfg.similarity + flat, cfg.width), (None, None), bias=True)
        self.one_hot = Linear((cfg.width, 1), (None, None), bias=True)
        self.many_hot = Linear((cfg.width, 1), (None, None), bias=True)
        self.cfg, self.dtype = cfg, runtime.dtype

    def __call__(self, frames_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [B, T] float32: the middle frame of a transition, and all frames of it.

        Args:
          frames_bthwc: uint8 RGB [B, T, 27, 48, 3], consecutive frames.
        """
        return self._heads(self._features(frames_bthwc, None))

    def train(self, frames_bthwc: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
        """As `__call__` in training: the batch's own statistics and dropout 0.5 on the hidden layer.

        Also returns those statistics, {stack: {cell: {mean, var}}} (var unbiased), for running means of `norm/mean`
        and `norm/var`.
        """
        seen: dict = {}
        x = self._features(frames_bthwc, seen)
        return *self._heads(x * 2 * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)), seen

    def _features(self, frames_bthwc, seen: dict | None) -> jax.Array:
        if frames_bthwc.dtype != jnp.uint8 or frames_bthwc.shape[2:] != (self.cfg.height, self.cfg.columns, 3):
            size = f"{self.cfg.height}, {self.cfg.columns}, 3"
            raise ValueError(f"frames must be uint8 [B, T, {size}], got {frames_bthwc.dtype} {frames_bthwc.shape}")
        x, means = frames_bthwc.astype(self.dtype) / 255, []
        for s in range(self.cfg.stacks):
            x = getattr(self, f"stack{s}")(x, None if seen is None else seen.setdefault(f"stack{s}", {}))
            means.append(x.mean((2, 3)))
        colour = self.colour(colour_histograms(frames_bthwc)).astype(x.dtype)
        near = self.similarity(jnp.concatenate(means, axis=-1))
        flat = x.reshape(*x.shape[:2], -1)  # (h, w, c)
        return jax.nn.relu(self.hidden(jnp.concatenate([colour, near, flat], axis=-1)))

    def _heads(self, x) -> tuple[jax.Array, jax.Array]:
        return self.one_hot(x)[..., 0].astype(jnp.float32), self.many_hot(x)[..., 0].astype(jnp.float32)


def describe(cfg: Config) -> dict:
    """Nested dict of `Weight`: shape, logical axes and init of every parameter."""
    return trees.skeleton(TransNetV2, cfg, Runtime())[1]


def bind(cfg: Config, params: dict, *, dtype=jnp.float32) -> TransNetV2:
    """The network over these parameters, activations in `dtype`; cheap, made for use inside jit."""
    return nnx.merge(trees.skeleton(TransNetV2, cfg, Runtime(jnp.dtype(dtype)))[0], params)


def init(cfg: Config, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random parameters; a leaf's value depends on the key and its path only."""
    return trees.init(describe(cfg), key, dtype)


def abstract(cfg: Config, dtype=jnp.float32, mesh=None) -> dict:
    """ShapeDtypeStructs of the parameters, whole on every device of the mesh: the target of `checkpoint.restore`."""
    return trees.abstract(describe(cfg), dtype, mesh)


# --- published names ---

_LINEAR = (
    ("hidden", "fc1", "dense"),
    ("one_hot", "cls_layer1", "dense_1"),
    ("many_hot", "cls_layer2", "dense_2"),
    ("similarity/project", "frame_sim_layer.projection", "dense_3"),
    ("similarity/out", "frame_sim_layer.fc", "dense_4"),
    ("colour/out", "color_hist_layer.fc", "dense_5"),
)
_NORM = (
    ("scale", "weight", "gamma"),
    ("bias", "bias", "beta"),
    ("mean", "running_mean", "moving_mean"),
    ("var", "running_var", "moving_variance"),
)


def names(cfg: Config, kind: str) -> dict[str, str]:
    """Our path -> published name; kind "torch" (the .pth) or "tensorflow" (the SavedModel, without scopes and ":0")."""
    if kind not in ("torch", "tensorflow"):
        raise ValueError(f"kind must be 'torch' or 'tensorflow', not {kind!r}")
    torch, table = kind == "torch", {}
    for s in range(cfg.stacks):
        for c in range(cfg.cells):
            ours = f"stack{s}/cell{c}"
            theirs = f"SDDCNN.{s}.DDCNN.{c}" if torch else f"SDDCNN_{s + 1}/DDCNN_{c + 1}"
            for rate in RATES:
                for i, step in enumerate(("spatial", "temporal")):
                    tail = f".Conv3D_{rate}.layers.{i}.weight" if torch else f"/Conv3D_{rate}/conv_{step}/kernel"
                    table[f"{ours}/rate{rate}/{step}/kernel"] = theirs + tail
            for mine, port, original in _NORM:
                table[f"{ours}/norm/{mine}"] = theirs + (f".bn.{port}" if torch else f"/bn/{original}")
    for ours, port, original in _LINEAR:
        table[f"{ours}/kernel"] = f"{port}.weight" if torch else f"{original}/kernel"
        table[f"{ours}/bias"] = f"{port}.bias" if torch else f"{original}/bias"
    return table


def assemble(cfg: Config, tensors: dict[str, np.ndarray], source: str = "weights") -> dict:
    """Parameters from the published tensors, of the PyTorch port or of the SavedModel (told apart by their names).

    Every tensor is consumed once and every parameter written once.

    Args:
      tensors: name -> array; TensorFlow names with or without ":0" and enclosing scopes.
    Raises:
      WeightsError: a tensor missing, left over, doubled or of a wrong shape.
    """
    kind = "torch" if any(name.startswith("SDDCNN.") for name in tensors) else "tensorflow"
    found = _match(tensors, names(cfg, kind).values(), kind, source)
    flat = {}
    for path, weight in flatten(describe(cfg)).items():
        name = names(cfg, kind)[path]
        tensor = np.asarray(tensors[found[name]], np.float32)
        if kind == "torch":
            tensor = tensor.transpose((2, 3, 4, 1, 0) if tensor.ndim == 5 else tuple(range(tensor.ndim))[::-1])
        if tensor.shape != weight.shape:
            have = np.shape(tensors[found[name]])
            raise WeightsError(f"{source}: tensor {found[name]} of shape {have} does not fit {path} {weight.shape}")
        flat[path] = tensor
    return unflatten(flat)


def _match(tensors, wanted, kind: str, source: str) -> dict[str, str]:
    """Published name -> name in `tensors`; counters of the port are ignored. WeightsError as `assemble`."""
    wanted, found = set(wanted), {}
    for name in tensors:
        if name.endswith("num_batches_tracked"):
            continue
        key = name.split(":")[0]
        while kind == "tensorflow" and "/" in key and key not in wanted:
            key = key.split("/", 1)[1]
        if key in found:
            raise WeightsError(f"{source}: {name} and {found[key]} are the same tensor")
        found[key] = name
    missing, left = sorted(wanted - found.keys()), sorted(found[k] for k in found.keys() - wanted)
    if missing or left:
        pairs = (("missing", missing), ("left over", left))
        text = [f"{len(x)} tensors {what}: {', '.join(x[:8])}" for what, x in pairs if x]
        raise WeightsError(f"{source}: {'; '.join(text)}")
    return found


# --- whole videos ---


@functools.lru_cache(maxsize=16)
def _decide(cfg: Config, dtype: Any):
    @jax.jit
    def run(params, blocks_wthwc):
        """Blocks of 50 frames [W + 1, 50, ...] -> probabilities [2, W * 50] of the middle halves of W windows."""
        windows = jnp.concatenate([blocks_wthwc[:-1], blocks_wthwc[1:]], axis=1)
        logits = jnp.stack(bind(cfg, params, dtype=dtype)(windows))
        quarter = (WINDOW - STRIDE) // 2
        return jax.nn.sigmoid(logits[:, :, quarter : quarter + STRIDE]).reshape(2, -1)

    return run


def predict(cfg: Config, params: dict, frames_nhwc: np.ndarray, *, batch: int = 8, dtype=jnp.float32):
    """Probabilities of a whole video: (one_hot_n, many_hot_n), float32 [n] each.

    Windows of 100 frames, 50 apart, each deciding its middle 50; the video is continued by its first and last frame.
    `batch` windows run at a time in one compiled shape.

    Args:
      frames_nhwc: uint8 RGB [n, 27, 48, 3], every frame of the video at its own rate, n >= 1.
    """
    n = len(frames_nhwc)
    if not n or frames_nhwc.dtype != np.uint8 or frames_nhwc.shape[1:] != (cfg.height, cfg.columns, 3):
        size = f"{cfg.height}, {cfg.columns}, 3"
        raise ValueError(f"frames must be uint8 [n >= 1, {size}], got {frames_nhwc.dtype} {frames_nhwc.shape}")
    count, quarter = -(-n // STRIDE), (WINDOW - STRIDE) // 2
    run, out = _decide(cfg, jnp.dtype(dtype)), []
    for first in range(0, count, batch):
        index = np.arange(first * STRIDE, (first + batch + 1) * STRIDE) - quarter
        blocks = frames_nhwc[np.clip(index, 0, n - 1)].reshape(batch + 1, STRIDE, *frames_nhwc.shape[1:])
        out.append(run(params, jax.device_put(blocks)))
    both = np.concatenate(jax.device_get(out), axis=1)[:, :n]
    return both[0], both[1]


def scenes(one_hot_n: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Scenes [first, last], int32 [E, 2], both inclusive, from the one-hot probabilities.

    The first frame above the threshold ends a scene, the next begins after the last such frame; frames between, and all
    after a transition that reaches the end of the video, belong to none. A transition from frame 0 on ends nothing.
    """
    high = np.concatenate([[False], np.asarray(one_hot_n) > threshold])
    if high[1:].all():
        return np.array([[0, len(high) - 2]], np.int32)
    starts = [0, *(np.flatnonzero(high[:-1] & ~high[1:])).tolist()]
    ends = np.flatnonzero(~high[:-1] & high[1:]).tolist()
    if high[1]:
        starts, ends = starts[1:], ends[1:]
    if not high[-1]:
        ends.append(len(high) - 2)
    return np.array([pair for pair in zip(starts, ends, strict=False)], np.int32).reshape(-1, 2)
