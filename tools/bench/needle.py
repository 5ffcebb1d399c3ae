"""A needle in an hour of video: is the event that a question is about retrieved, wherever it lies?

    python -m tools.bench.needle [--run=RUN_FOLDER] [--out=needle.png] [--k=3] [--trials=200]

Without --run, events are random unit vectors that drift (each 0.7 like the one before it), one in five seconds; the
question has a given cosine with the needle and is random otherwise. `expected` is the binomial probability that fewer
than k of as many independent others score higher: what an exact search must show, at every depth.
With --run (a finished run with a trained retriever and its memory of the synthetic test set), the hour is made of
events of other test videos whose scenes the question does not name; the events that it names are put in side by side.
Found are all of them among the k best, and beside it the share of them.

Writes a heat map, depth across, and prints its numbers.
"""

import argparse
import functools
import math
import pathlib

import jax
import numpy as np

from marc_jax.memory import embed, retrieve

DEPTHS = np.arange(0, 101, 10)
MINUTES = (1, 5, 15, 60)
COSINES = (0.10, 0.125, 0.15, 0.175, 0.20)
WIDTH, SECONDS, DRIFT, COSINE = 512, 5.0, 0.7, 0.15
BATCH = 25


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def found_share(draw, depth: int, events: int, k: int, trials: int) -> np.ndarray:
    """[2]: share of `trials` in which all needles are among the k best of `events` others; mean share of the needles.

    `draw(events)` gives a question [D], its needles [n, D] and the other events [events, D].
    """
    hits = []
    for _ in range(0, trials, BATCH):
        query, emb, needed = [], [], np.zeros((BATCH, events + 2), bool)
        for b in range(BATCH):
            q, needles, others = draw(events + 2)
            others = others[: events + 2 - len(needles)]
            at = round(depth / 100 * len(others))
            query.append(q)
            emb.append(np.concatenate([others[:at], needles, others[at:]]))
            needed[b, at : at + len(needles)] = True
        ids, valid = topk(np.stack(query), np.stack(emb), np.ones(needed.shape, bool), k)
        hits.append(np.stack([np.asarray(x, float) for x in embed.recall(ids, valid, needed)]))
    return np.concatenate(hits, axis=1).mean(1)


topk = jax.jit(retrieve.topk_events, static_argnames="k")


def random_draw(rng, cosine: float):
    """One long drifting sequence; every trial looks at another stretch of it with a question of its own."""
    steps = unit(rng.standard_normal((20_000, WIDTH), dtype=np.float32))
    emb = steps.copy()
    for t in range(1, len(emb)):
        emb[t] = unit(DRIFT * emb[t - 1] + math.sqrt(1 - DRIFT**2) * steps[t])

    def draw(events: int):
        start = rng.integers(0, len(emb) - events)
        needle, noise = unit(rng.standard_normal((2, WIDTH), dtype=np.float32))
        noise = unit(noise - (noise @ needle) * needle)
        return cosine * needle + math.sqrt(1 - cosine**2) * noise, needle[None], emb[start : start + events]

    return draw


def expected(cosine: float, events: int, k: int) -> float:
    """P(fewer than k of `events` independent ones score above the needle); a score is N(0, 1 / WIDTH)."""
    p = 0.5 * math.erfc(cosine * math.sqrt(WIDTH / 2))
    return sum(math.comb(events, i) * p**i * (1 - p) ** (events - i) for i in range(k))


def run_draw(rng, folder: str):
    """(draw, seconds per event) from a finished run on the synthetic set."""
    from marc_jax import run as runs
    from marc_jax import synthetic
    from marc_jax.memory import store

    here, _ = runs.opened(folder)
    records = synthetic.read_records(synthetic.data_folder(here.config, here.workdir), "test")
    memory = store.MemoryReader(here.workdir / "memory", None)
    kept, scenes, rows, asked = [], [], 0, []
    for record in records:
        emb, names = memory[record["path"]].event_embeddings, [(e["hue"], e["texture"]) for e in record["events"]]
        if len(emb) != len(names):  # segmented otherwise than annotated: which event is which is not known
            continue
        if record["question_type"] not in ("happens", "happened"):  # those name no scene
            asked.append((record["problem"], rows + np.array(record["needed_events"])))
        kept, scenes, rows = [*kept, emb], [*scenes, *names], rows + len(emb)
    emb, scenes = np.concatenate(kept).astype(np.float32), np.unique(scenes, axis=0, return_inverse=True)[1].ravel()
    tokens, mask = here.prompter.queries([problem for problem, _ in asked], here.sizes.question)
    query = np.asarray(jax.jit(embed.embed_questions)(here.retriever, tokens, mask))
    seconds = np.mean([e["end_seconds"] - e["start_seconds"] for r in records for e in r["events"]])

    def draw(events: int):
        i = rng.integers(len(asked))
        needed = asked[i][1]
        others = np.flatnonzero(~np.isin(scenes, scenes[needed]))
        return query[i], emb[needed], emb[rng.choice(others, events, replace=len(others) < events)]

    return draw, float(seconds)


def table(title: str, rows: dict, shares: np.ndarray, beside: dict) -> None:
    print(f"\n{title}\n\n| | " + " | ".join(f"{d} %" for d in DEPTHS) + " | mean |" + (" expected |" if beside else ""))
    print("|---|" + "--:|" * (len(DEPTHS) + 1 + bool(beside)))
    for name, row in zip(rows, shares, strict=True):
        end = f" {100 * beside[name]:.1f} |" if beside else ""
        print(f"| {name} | " + " | ".join(f"{100 * x:.1f}" for x in row) + f" | {100 * row.mean():.1f} |{end}")


def draw_maps(path: str, maps: list, k: int) -> None:
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(len(maps), 1, figsize=(8.5, 0.6 + 2.9 * len(maps)), layout="constrained", squeeze=False)
    for ax, (title, names, shares) in zip(axes[:, 0], maps, strict=True):
        image = ax.imshow(100 * shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(DEPTHS)), [f"{d}" for d in DEPTHS])
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("depth of the needle, % of the video")
        ax.set_title(title, fontsize=10)
        for y, x in np.ndindex(shares.shape):
            dark = shares[y, x] < 0.6
            ax.text(x, y, f"{100 * shares[y, x]:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        fig.colorbar(image, ax=ax, label=f"found among {k}, %")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a finished run (default: random vectors)")
    parser.add_argument("--out", default="needle.png")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200, help="per cell")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    maps = []

    def measure(title, cases, beside, share_title=None):
        """cases: name -> (draw, events). With `share_title` also a map of the share of the needles."""
        share = functools.partial(found_share, k=args.k, trials=args.trials)
        shares = np.array([[share(draw, depth, events) for depth in DEPTHS] for draw, events in cases.values()])
        for i, name in enumerate([title] + ([share_title] if share_title else [])):
            table(name, cases, shares[..., i], beside)
            maps.append((name, list(cases), shares[..., i]))

    if args.run:
        draw, seconds = run_draw(rng, args.run)
        cases = {f"{m} min, {round(60 * m / seconds)} events": (draw, round(60 * m / seconds)) for m in MINUTES}
        measure("Synthetic events, the run's retriever: all events that the question names", cases, {},
                "Synthetic events: share of the events that the question names")
    else:
        draw = random_draw(rng, COSINE)
        sizes = {f"{m} min, {round(60 * m / SECONDS)} events": round(60 * m / SECONDS) for m in MINUTES}
        by_length = {name: (draw, n) for name, n in sizes.items()}
        hoped = {name: expected(COSINE, n, args.k) for name, n in sizes.items()}
        measure(f"Random events, question at cosine {COSINE} to its needle", by_length, hoped)
        hour = round(3600 / SECONDS)
        by_cosine = {f"cosine {c}": (random_draw(rng, c), hour) for c in COSINES}
        hoped = {f"cosine {c}": expected(c, hour, args.k) for c in COSINES}
        measure(f"60 minutes of random events ({hour})", by_cosine, hoped)
    draw_maps(args.out, maps, args.k)
    print(f"\n{pathlib.Path(args.out).resolve()}")


if __name__ == "__main__":
    main()
