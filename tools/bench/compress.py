"""Merging 32 temporal patches of 121 tokens into one: equal to plain numpy, its time beside its floor.

    python -m tools.bench.compress [--patches=32] [--tokens=121] [--width=2048] [--batch=1] [--keep=1]

The reference merges the features themselves in float64, pair by pair, as the paper says. The floor reads the tokens
once, at the rate at which this machine sums them in the same run. "loop alone" is the merge without reading features:
its merges depend on each other, so its time is 31 small steps whatever the machine's bandwidth. Prints Markdown;
docs/retrieval.md keeps a run.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.memory import compress
from tools.bench.timing import median_ms


def plain_merge(vis_tpd: np.ndarray, event_t: np.ndarray, keep: int, per_event: int | None) -> np.ndarray:
    """[keep, P, D] in float64: the two stages with (a + b) / 2, every similarity computed from the features."""
    rows = [(x, event, event) for x, event in zip(vis_tpd.astype(np.float64), event_t, strict=True)]

    def similarity(a, b):
        norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.round(np.mean(np.sum(a * b, axis=-1) / norm) * compress.SIMILARITY_GRID)

    def join(pairs):
        i = max(pairs, key=lambda i: (similarity(rows[i][0], rows[i + 1][0]), -i))
        rows[i : i + 2] = [((rows[i][0] + rows[i + 1][0]) / 2, rows[i][1], rows[i + 1][2])]

    while per_event is not None:
        inside = [i for i in range(len(rows) - 1) if rows[i][2] == rows[i + 1][1]]
        held = [sum(row[1] == event for row in rows) for _, event, _ in rows]
        inside = [i for i in inside if held[i] > per_event]
        if not inside:
            break
        join(inside)
    while len(rows) > keep:
        join(range(len(rows) - 1))
    return np.stack([x for x, _, _ in rows])


def scene(args) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T, P, D] of three events, each around its own picture and drifting, and their events [B, T]."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.patches, args.tokens, args.width)
    event_bt = np.sort(rng.integers(0, 3, shape[:2]), axis=1)
    picture = rng.standard_normal((args.batch, 3, *shape[2:]), dtype=np.float32)
    drift = np.cumsum(rng.standard_normal(shape, dtype=np.float32), axis=1)
    return picture[np.arange(args.batch)[:, None], event_bt] + 0.2 * drift, event_bt.astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(patches=32, tokens=121, width=2048, batch=1, keep=1, repeats=15).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tokens, event_bt = scene(args)
    vis = jnp.asarray(tokens, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    mask_bt = jnp.ones(event_bt.shape, bool)
    gram = jnp.zeros((args.batch, args.patches, args.patches, args.tokens))
    read = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    loop = jax.jit(lambda gram, event_bt: jax.vmap(
        lambda g, e: compress._merge_one(g, jnp.ones(args.patches, bool), e, jnp.ones(args.patches, jnp.int32), 1,
                                         trips=args.patches - args.keep, window=args.patches, weighted=False,
                                         metric="cosine"))(gram, event_bt))  # fmt: skip
    floor = median_ms(lambda: read(vis), args.repeats)
    alone = median_ms(lambda: loop(gram, event_bt), args.repeats)
    print(f"{jax.devices()[0].device_kind}, {list(vis.shape)} {vis.dtype} to {args.keep}, {vis.nbytes / 1e6:.1f} MB\n")
    print("| stage 1 | ours ms | floor ms | loop alone ms | ours / floor | ours / numpy | error / largest value |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for per_event in (None, 1):
        shrink = functools.partial(compress.compress, keep=args.keep, per_event=per_event)
        run = jax.jit(lambda v, e, shrink=shrink: shrink(v, mask_bt, e))
        begun = time.perf_counter()
        exact = np.stack([plain_merge(np.asarray(v, np.float32), e, args.keep, per_event)
                          for v, e in zip(vis, event_bt, strict=True)])  # fmt: skip
        plain = 1e3 * (time.perf_counter() - begun)
        error = np.abs(np.asarray(run(vis, event_bt).tokens_bkpd, np.float64) - exact).max() / np.abs(exact).max()
        ours = median_ms(lambda run=run: run(vis, event_bt), args.repeats)
        name = "none" if per_event is None else f"{per_event} per event"
        ratios = f"{ours / floor:.1f} | {ours / plain:.4f}"
        print(f"| {name} | {ours:.2f} | {floor:.2f} | {alone:.2f} | {ratios} | {error:.1e} |")


if __name__ == "__main__":
    main()
