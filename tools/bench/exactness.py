"""How far this device's kernels stay from float32: the tower's tokens, and the log-probabilities of a generation.

    python -m tools.bench.exactness --size=3b --layers=4

A group is sampled from one prompt as users decode (packed weights, the device's own kernels, bfloat16), and its tokens
are scored again by the plain model, teacher-forced: in bfloat16, and in float32 through XLA alone at the highest matmul
precision, which is the reference. Both roundings of bfloat16 are errors of the same kind: what decodes may not stand
further from the reference than a few times what scores. Random weights of the published widths, fewer layers: a full
model adds nothing that its layers don't have, and takes minutes to compile three times. Exit code 1 where a bound is
broken.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.models import qwen25_vl
from marc_jax.rl import rollout
from tools.bench import model as shapes

TIMES = 4.0  # the decoding error, at most so many times that of the plain bfloat16 model


def config(size: str, layers: int) -> qwen25_vl.Config:
    """The published widths with so many layers in decoder and tower, the tower's last one over whole frames."""
    if size == "tiny":
        return qwen25_vl.tiny()
    cfg = qwen25_vl.qwen25_vl(size)
    tower = dataclasses.replace(cfg.vision, depth=layers, fullatt_block_indexes=(layers - 1,))
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, num_layers=layers), vision=tower)


def tower_error(cfg, params: dict, case: shapes.Case) -> dict[str, float]:
    """Relative norm of what bfloat16 changes in the visual tokens: by the device's kernels, and by XLA's."""
    shape = (case.s, case.grid[0] * case.grid[1], cfg.vision.patch_dim)
    pixels = jax.random.normal(jax.random.key(2), shape, jnp.float32)

    def tokens(dtype, attention):
        model = functools.partial(qwen25_vl.bind, cfg, dtype=dtype, attention=attention)
        return jax.jit(lambda p, x: model(p).vision(x, case.grid).astype(jnp.float32))(params, pixels)

    exact = tokens(jnp.float32, "xla")
    found = {"kernels": tokens(jnp.bfloat16, "auto"), "XLA": tokens(jnp.bfloat16, "xla")}
    return {name: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)) for name, x in found.items()}


def decoding_error(cfg, params: dict, case: shapes.Case, new: int) -> dict[str, np.ndarray]:
    """|difference| of log-probabilities to float32 [G, R]: as the tokens were decoded, and scored in bfloat16."""
    prompt = shapes.prompt_of(cfg, case)
    visual = jax.random.normal(jax.random.key(1), (1, case.visual_tokens, cfg.text.hidden_size), jnp.bfloat16)
    keys = rollout.rollout_keys(0, 0, jnp.arange(1), case.group)
    half = functools.partial(qwen25_vl.bind, cfg, dtype=jnp.bfloat16)
    how = rollout.Sampling(new, (-1,), 0, temperature=1.0)
    packed = jax.jit(functools.partial(qwen25_vl.pack, cfg))(params)
    done = jax.jit(lambda p: rollout.decode(half(p), rollout.prefill(half(p), visual, prompt), keys, how))(packed)
    score = jax.jit(lambda p: rollout.score(half(p), visual, prompt, done))
    plain = functools.partial(qwen25_vl.bind, cfg, dtype=jnp.float32, attention="xla")
    exact = jax.jit(lambda p: rollout.score(plain(p), visual.astype(jnp.float32), prompt, done))(params)
    found = {"decoded": done.logp_bgr, "scored": score(params)}
    return {name: np.abs(np.asarray(logp - exact)[0]) for name, logp in found.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rows", default="vision,decode_1,decode_8,decode_8_long", help="of tools.bench.model")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")  # of float32; bfloat16 has only one
    cfg = config(args.size, args.layers)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.size}, {args.layers} layers", flush=True)
    params, broken = qwen25_vl.init(cfg, jax.random.key(0), jnp.bfloat16), []
    for case in (case for case in shapes.CASES if case.key in args.rows.split(",")):
        if case.kind == "vision":
            own, other = tower_error(cfg, params, case).values()
            print(f"{case.title}: off by {own:.2e} of the norm; XLA in bfloat16 {other:.2e}", flush=True)
        else:
            errors = decoding_error(cfg, params, case, args.new)
            own, other = (float(np.sqrt((e**2).mean())) for e in errors.values())
            told = (f"{name} rms {np.sqrt((e**2).mean()):.2e}, most {e.max():.2e}" for name, e in errors.items())
            print(f"{case.title}: log-probabilities off by: {'; '.join(told)}", flush=True)
        broken += [case.title] if not own <= TIMES * other else []
    print(f"beyond {TIMES:g} times plain bfloat16: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
