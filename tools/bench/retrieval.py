"""Exact top-k of an archive: equal to FAISS IndexFlatIP, its time beside FAISS's and beside the roofline.

    python -m tools.bench.retrieval [--rows=1000000] [--width=512] [--queries=1,64] [--threads=2] [--block=N]

On a CPU: float32 beside FAISS (pip install faiss-cpu: the [bench] extra; left out where it is absent) on the same
number of threads, call by call in turn. On an accelerator: 1,000,000 x 1,024 in bfloat16 with 1 and 1,024 questions.
The floor is the longer of reading the archive once and multiplying it, at the rates that this machine shows in the same
run (a sum over the archive, a square product). Prints Markdown; docs/retrieval.md keeps a run.
"""

import argparse
import os
import statistics

import numpy as np

from tools.bench.timing import seconds_in_turn


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, help="default 512 on a CPU, 1,024 on an accelerator")
    parser.add_argument("--queries", help="comma-separated; default 1,64 on a CPU, 1,1024 on an accelerator")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--block", type=int, help="rows scored at a time (default: that of retrieve.search)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of both")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def unit(shape, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows


def differing(ours, theirs, tolerance: float = 2e-6) -> tuple[int, int]:
    """(ids in another place, those of them that no tie within `tolerance` explains) of (scores, ids) pairs."""
    other = np.asarray(ours[1]) != theirs[1]
    return int(other.sum()), int((other & (np.abs(np.asarray(ours[0]) - theirs[0]) > tolerance)).sum())


def machine_rates(jax, jnp, emb_nd) -> tuple[float, float]:
    """(bytes/s of a sum over the archive, FLOP/s of a square product in its dtype), the best of five."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), emb_nd.dtype)  # random: zeros draw less power
    read = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    multiply = jax.jit(lambda x: jnp.einsum("ab,bc->ac", x, x, preferred_element_type=jnp.float32))
    best = lambda call: min(seconds_in_turn({"": call}, 5)[""])  # noqa: E731
    return emb_nd.nbytes / best(lambda: read(emb_nd)), 2 * side**3 / best(lambda: multiply(square))


def faiss_index(emb_nd: np.ndarray, threads: int):
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(emb_nd.shape[1])
    index.add(emb_nd)
    return index


def faiss_call(index, query_qd, k: int, way: str):
    """FAISS multiplies by BLAS from 20 questions on, else row by row; the faster of the two is taken for the table."""
    import faiss

    def call():
        faiss.cvar.distance_compute_blas_threshold = 1 if way == "blas" else 1 << 30
        return index.search(query_qd, k)

    return call


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before XLA counts its threads
    import jax
    import jax.numpy as jnp

    from marc_jax.memory import retrieve

    cpu = jax.default_backend() == "cpu"
    width = args.width or (512 if cpu else 1024)
    counts = [int(q) for q in (args.queries or ("1,64" if cpu else "1,1024")).split(",")]
    rows = unit((args.rows, width), 0)
    index = faiss_index(rows, args.threads) if cpu else None
    emb_nd = jnp.asarray(rows, jnp.float32 if cpu else jnp.bfloat16)
    bandwidth, rate = machine_rates(jax, jnp, emb_nd)
    search = jax.jit(lambda query_qd, emb_nd: retrieve.search(query_qd, emb_nd, args.k, block=args.block))
    print(f"{jax.devices()[0].device_kind}, {args.rows:,} x {width} {emb_nd.dtype}, k = {args.k}, "
          f"{args.threads} CPU threads; reads {bandwidth / 1e9:.1f} GB/s, multiplies {rate / 1e12:.3f} TFLOP/s\n"
          )  # fmt: skip
    print("| questions | GB | TFLOP | floor ms | ours ms | floor / ours | matrix rate | faiss ms | ours / faiss | "
          "other ids (no tie) |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for count in counts:
        query = unit((count, width), 1)
        query_qd = jnp.asarray(query, emb_nd.dtype)
        calls = {"ours": lambda query_qd=query_qd: search(query_qd, emb_nd)}
        if index is not None:
            calls |= {f"faiss {way}": faiss_call(index, query, args.k, way) for way in ("blas", "sequential")}
        first = {name: call() for name, call in calls.items()}
        if index is not None:  # the slower way may take a minute a call
            tried = seconds_in_turn({name: call for name, call in calls.items() if name != "ours"}, 1, warmup=0)
            calls.pop(max(tried, key=tried.get))
        spent = {name: statistics.median(s) for name, s in seconds_in_turn(calls, args.repeats).items()}
        flop = 2 * count * args.rows * width
        floor = max(emb_nd.nbytes / bandwidth, flop / rate)
        beside = "- | - | -"
        if index is not None:
            theirs = next(name for name in calls if name != "ours")
            other, wrong = differing(first["ours"], first[theirs])
            beside = f"{1e3 * spent[theirs]:.1f} ({theirs}) | {spent['ours'] / spent[theirs]:.2f} | {other} ({wrong})"
        ours = spent["ours"]
        print(f"| {count} | {emb_nd.nbytes / 1e9:.2f} | {flop / 1e12:.4f} | {1e3 * floor:.2f} | {1e3 * ours:.2f} | "
              f"{floor / ours:.0%} | {flop / ours / rate:.0%} | {beside} |")  # fmt: skip


if __name__ == "__main__":
    main()
