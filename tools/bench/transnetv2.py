"""Speed of TransNetV2 over a long video, windows batched: frames per second on this device, random weights.

    python -m tools.bench.transnetv2 [--frames=12800] [--batches=8,32]

Frames are decided once each, though every window computes 100 to decide 50. Includes the copy to the device. Prints too
how far the probabilities lie from those of the first line (float32, highest matmul precision).
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.models import transnetv2
from tools.bench.timing import milliseconds


def random_weights(weight) -> np.ndarray:
    """Large enough that the answer depends on the input."""
    if weight.init != "normal":
        return np.full(weight.shape, weight.init == "ones", np.float32)
    z = np.random.default_rng(weight.size).standard_normal(weight.shape)
    return (z / np.prod(weight.shape[:-1]) ** 0.5).astype(np.float32)


def shots(count: int) -> np.ndarray:
    """uint8 [count, 27, 48, 3]: shots of 40 frames of random pictures under noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 236, (-(-count // 40), 27, 48, 3))
    frames = np.repeat(pictures, 40, axis=0)[:count] + rng.integers(0, 20, (count, 27, 1, 3))
    return frames.astype(np.uint8)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=12800)
    parser.add_argument("--batches", default="8,32", help="windows at a time, separated by commas")
    args = parser.parse_args(argv)
    cfg = transnetv2.Config()
    params = jax.device_put(jax.tree.map(random_weights, transnetv2.describe(cfg)))
    frames, exact = shots(args.frames), None
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(frames)} frames")
    print("| matmul | activations | windows | first call s | frames/s | largest change |\n|---|---|--:|--:|--:|--:|")
    for precision, dtype in (("highest", jnp.float32), ("default", jnp.float32), ("default", jnp.bfloat16)):
        with jax.default_matmul_precision(None if precision == "default" else precision):
            for batch in map(int, args.batches.split(",")):
                call = functools.partial(transnetv2.predict, cfg, params, frames, batch=batch, dtype=dtype)
                first, *later = milliseconds(call, 4, warmup=0)
                one_hot, _ = call()
                exact = one_hot if exact is None else exact
                change, rate = float(np.abs(one_hot - exact).max()), 1e3 * len(frames) / min(later)
                row = (precision, dtype.__name__, batch, f"{first / 1e3:.1f}", f"{rate:,.0f}", f"{change:.1e}")
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
