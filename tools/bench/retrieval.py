"""Exact top-k of an archive: equal to FAISS IndexFlatIP, its time beside FAISS's and beside the roofline.

    python -m tools.bench.retrieval [--rows=1000000] [--width=512] [--queries=1,64] [--threads=2] [--block=N,N]
        [--clock=process]

On a CPU: float32 beside FAISS (pip install faiss-cpu: the [bench] extra; left out where it is absent) on the same
number of threads, call by call in turn: its index with its own copy of the rows, and the same search (`faiss.knn`) over
the very array that ours reads, since where an array lies in memory changes the time of one question by a tenth. On an
accelerator: 1,000,000 x 1,024 in bfloat16 with 1 and 1,024 questions, several blocks, beside a plain `lax.top_k`.
The floor is the longer of reading the archive once and multiplying it, at the rates that this machine shows in the same
run (a sum over the archive, a square product). Prints Markdown; docs/retrieval.md keeps a run.
"""

import argparse
import os
import statistics
import time

import numpy as np

from tools.bench.timing import seconds_in_turn


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, help="default 512 on a CPU, 1,024 on an accelerator")
    parser.add_argument("--queries", help="comma-separated; default 1,64 on a CPU, 1,1024 on an accelerator")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--block", help="rows scored at a time, comma-separated; 0: as retrieve.search chooses")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall",
                        help="process: CPU seconds, which programs beside this one disturb less")  # fmt: skip
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


def machine_rates(jax, jnp, emb_nd, clock) -> tuple[float, float]:
    """(bytes/s of a sum over the archive, FLOP/s of a square product in its dtype), the best of five."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), emb_nd.dtype)  # random: zeros draw less power
    read = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    multiply = jax.jit(lambda x: jnp.einsum("ab,bc->ac", x, x, preferred_element_type=jnp.float32))
    best = lambda call: min(seconds_in_turn({"": call}, 5, clock=clock)[""])  # noqa: E731
    return emb_nd.nbytes / best(lambda: read(emb_nd)), 2 * side**3 / best(lambda: multiply(square))


def archive(jax, jnp, shape, dtype):
    """Unit rows: on a CPU from numpy, since FAISS reads them too; on an accelerator made where they are searched."""
    if jax.default_backend() == "cpu":
        return jnp.asarray(unit(shape, 0))

    @jax.jit
    def rows(key):
        emb_nd = jax.random.normal(key, shape, dtype)
        norm_n = jnp.sqrt(jnp.sum(jnp.square(emb_nd.astype(jnp.float32)), axis=1, keepdims=True))
        return (emb_nd / norm_n).astype(dtype)

    return rows(jax.random.key(0)).block_until_ready()


def faiss_calls(index, rows, query_qd, k: int) -> dict:
    """FAISS multiplies by BLAS from 20 questions on, else row by row; the faster of the two is taken for the table."""
    import faiss

    def way(threshold, find):
        def call():
            faiss.cvar.distance_compute_blas_threshold = threshold
            return find()

        return call

    finds = {"index": lambda: index.search(query_qd, k),
             "our rows": lambda: faiss.knn(query_qd, rows, k, faiss.METRIC_INNER_PRODUCT)}  # fmt: skip
    ways = {name: way(threshold, finds["index"]) for name, threshold in (("BLAS", 1), ("row by row", 1 << 30))}
    spent = seconds_in_turn(ways, 1, warmup=0)  # the slower way may take a minute a call
    name = min(spent, key=lambda name: spent[name][0])
    threshold = 1 if name == "BLAS" else 1 << 30
    return {f"FAISS {where}, {name}": way(threshold, find) for where, find in finds.items()}


def faiss_index(emb_nd: np.ndarray, threads: int):
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(emb_nd.shape[1])
    index.add(emb_nd)
    return index


def plain(jax, jnp, query_qd, emb_nd, k: int):
    """The first eight questions by one product and `lax.top_k`, where there is no FAISS."""
    product = jax.jit(lambda q, x: jax.lax.top_k(
        jnp.einsum("qd,nd->qn", q, x, precision="highest", preferred_element_type=jnp.float32), k))  # fmt: skip
    return jax.tree.map(np.asarray, product(query_qd[:8], emb_nd))


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before XLA counts its threads
    import jax
    import jax.numpy as jnp

    from marc_jax.memory import retrieve

    cpu = jax.default_backend() == "cpu"
    clock = time.process_time if args.clock == "process" else time.perf_counter
    width = args.width or (512 if cpu else 1024)
    counts = [int(q) for q in (args.queries or ("1,64" if cpu else "1,1024")).split(",")]
    blocks = [int(b) or None for b in (args.block or ("0" if cpu else "0,32768,131072")).split(",")]
    emb_nd = archive(jax, jnp, (args.rows, width), jnp.float32 if cpu else jnp.bfloat16)
    index = faiss_index(np.asarray(emb_nd), args.threads) if cpu else None
    bandwidth, rate = machine_rates(jax, jnp, emb_nd, clock)
    print(f"{jax.devices()[0].device_kind}, {args.rows:,} x {width} {emb_nd.dtype}, k = {args.k}, {args.threads} CPU "
          f"threads, {args.clock} clock, {args.repeats} calls each in turn: least and median ms\n"
          f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {rate / 1e12:.3f} TFLOP/s\n"
          )  # fmt: skip
    print("| questions | GB | TFLOP | floor ms | block | ours ms | floor / ours | matrix rate | other ids (no tie) "
          "| beside | its ms | ours / its |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|")  # fmt: skip
    for count in counts:
        query = unit((count, width), 1)
        query_qd = jnp.asarray(query, emb_nd.dtype)
        flop = 2 * count * args.rows * width
        floor = max(emb_nd.nbytes / bandwidth, flop / rate)
        calls = {} if index is None else faiss_calls(index, np.asarray(emb_nd), query, args.k)
        theirs = next(iter(calls.values()))() if calls else plain(jax, jnp, query_qd, emb_nd, args.k)
        for block in blocks if count > 1 else [None]:
            run = jax.jit(lambda query_qd, emb_nd, block=block: retrieve.search(query_qd, emb_nd, args.k, block=block))
            ours = run(query_qd, emb_nd)
            other, wrong = differing([x[: len(theirs[1])] for x in ours], theirs)
            calls["ours"] = lambda run=run, query_qd=query_qd: run(query_qd, emb_nd)
            seconds = seconds_in_turn(calls, args.repeats, warmup=0, clock=clock)
            spent = {name: (min(s), statistics.median(s)) for name, s in seconds.items()}
            low, mid = spent.pop("ours")
            head = (f"| {count} | {emb_nd.nbytes / 1e9:.2f} | {flop / 1e12:.4f} | {1e3 * floor:.2f} | {block or '-'} | "
                    f"{1e3 * low:.2f}, {1e3 * mid:.2f} | {floor / low:.0%} | {flop / low / rate:.0%} | "
                    f"{other} ({wrong}) | ")  # fmt: skip
            for name, (its_low, its_mid) in (spent or {"-": (np.nan, np.nan)}).items():
                print(f"{head}{name} | {1e3 * its_low:.2f}, {1e3 * its_mid:.2f} | {low / its_low:.2f}, "
                      f"{mid / its_mid:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
