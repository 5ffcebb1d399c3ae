"""Every baseline at 25, 10 and 5 % of a video's visual tokens, on the teacher of a finished run; nothing is trained.

    python -m marc_jax.eval --config=experiments/baselines.py --checkpoint=runs/synthetic --out=runs/baselines
    python -m marc_jax.eval --config=experiments/baselines.py:quickstart --checkpoint=runs/quickstart
    python -m marc_jax.eval --config=experiments/baselines.py:synthetic,scenic ...    # with the [scenic] extra
    python -m tools.sweep --config=experiments/regimes.py --also=experiments/baselines.py:regimes ...    # three seeds

The arms are views of the same weights. A share is rounded to whole tokens of each video (5 % of 56 is 3), and what an
arm really reads is counted from its prompt. Methods that keep whole temporal patches take as many as hold the budget,
and the least telling tokens go (`memory.budget.telling_tokens`).

Measured on 2026-11-22, as a check that the numbers are plausible: docs/baselines.md, the quick start's shipped teacher,
200 questions, 2 CPU cores, 12 minutes beside other work.
"""

from ml_collections import ConfigDict

from experiments import quickstart, regimes, synthetic

SHARES = (0.25, 0.1, 0.05)
# key, label, view. in_event = 99: the share alone says how far events are merged.
METHODS = (
    ("uniform", "uniform frames", {"select": "uniform"}),
    ("low", "half resolution, uniform frames", {"select": "uniform", "shrink": 2}),
    ("pooled", "2 x 2 pooling, uniform frames", {"method": "pooled_tokens"}),
    ("random", "random tokens", {"method": "random_tokens"}),
    ("random_1", "random tokens, second draw", {"method": "random_tokens", "seed": 1}),
    ("random_2", "random tokens, third draw", {"method": "random_tokens", "seed": 2}),
    ("moviechat", "MovieChat merge", {"method": "moviechat"}),
    ("vidcom2", "VidCom2", {"method": "vidcom2"}),
    ("visionzip", "VisionZip", {"method": "visionzip"}),
    ("fastvid", "FastVID", {"method": "fastvid"}),
    ("holitom", "HoliTom", {"method": "holitom"}),
    ("evs", "EVS", {"method": "evs"}),
    ("dtd", "DTD", {"method": "dtd"}),
    ("fastv", "FastV, after layer 2", {"method": "fastv"}),
    ("fastv_1", "FastV, after layer 1", {"method": "fastv", "layer": 1}),
    ("topk", "top-k frames", {"select": "topk"}),
    ("topk_apart", "top-k frames, never neighbours", {"select": "topk", "apart": 2}),
    ("bolt", "BOLT", {"select": "bolt"}),
    ("aks", "AKS", {"select": "aks"}),
    ("merge", "MARC's merge of the whole video", {"method": "merge", "in_event": 99}),
    ("marc", "MARC: three events retrieved, merged", {"select": "retrieve", "method": "merge", "in_event": 99}),
)  # fmt: skip

SCENIC = (
    ("adjacent", "scenic's adjacent merging", {"method": "adjacent_merge"}),
    ("token_learner", "scenic's TokenLearner, untrained", {"method": "token_learner"}),
)

# Views that have a size of their own: the trivial rival of one patch, and MARC's budgets by event.
SIZED = (
    ("pooled4", "4 uniform frames, each pooled to one token", {"select": "all", "method": "pooled"}),
    ("mean4", "mean of all patches", {"select": "all", "method": "mean"}),
    ("events_2", "MARC: one patch for each of two events", {"select": "retrieve", "method": "per_event", "k": 2}),
    ("events_3", "MARC: one patch for each of three events", {"select": "retrieve", "method": "per_event", "k": 3}),
    ("events_mass", "MARC, adaptive: one patch per event, as many as hold 80 % of the retriever's belief",
     {"select": "retrieve", "method": "per_event", "k": 4, "rule": "mass"}),
    ("events_gap", "MARC, adaptive: one patch per event, down to the largest gap in their scores",
     {"select": "retrieve", "method": "per_event", "k": 4, "rule": "gap"}),
)  # fmt: skip
# Students of experiments/regimes.py: (stage, view of SIZED or of the stage, label).
TRAINED = (
    ("distill", "", "MARC, distilled: three events merged to one patch"),
    ("distill_pooled", "", "distilled: 4 uniform frames, each pooled to one token"),
    ("distill_events", "events_2", "MARC, distilled: one patch for each of two events"),
    ("distill_events", "events_3", "MARC, distilled: one patch for each of three events"),
    ("distill_events", "events_mass", "MARC, distilled, adaptive: as many events as hold 80 % of belief"),
)


def at_shares(methods=METHODS, shares=SHARES):
    """Each method at each share of the tokens: name, label and view of an arm."""
    for share in shares:
        percent = round(100 * share)
        for key, label, view in methods:
            view = {"select": "all", "method": "keep", "share": share, **view}
            yield f"{key}_{percent}", f"{label}, {percent} %", view


def get_config(run="synthetic"):
    """`run`: whose teacher, "synthetic", "quickstart" or "regimes"; with ",scenic" behind it also the extra's rows."""
    run, *extra = run.split(",")
    c = RUNS[run]()
    methods = METHODS + (SCENIC if extra == ["scenic"] else ())
    arms = ConfigDict({key: c.eval.arms[key] for key in ("teacher", "blind")})
    shares = SHARES[: 1 if run == "rehearsal" else None]
    for name, label, view in (*at_shares(methods, shares), *SIZED):
        c.views[name] = view
        arms[name] = {"stage": "teacher", "view": name, "label": label}
    for stage, view, label in TRAINED:
        if stage in c.stages and run in ("regimes", "rehearsal"):
            arms[f"{stage}_{view}" if view else stage] = {
                "stage": stage, "view": view or c[stage].view, "label": label, "group": "student",
            }  # fmt: skip
    c.eval = ConfigDict({"main": "marc_5", "batch": 100, "pictures": 0, "arms": arms})
    if run == "regimes":
        c.eval.update(batch=700, limit=1400)
    return c


RUNS = {
    "synthetic": synthetic.get_config,
    "quickstart": quickstart.get_config,
    "regimes": regimes.get_config,
    "rehearsal": lambda: regimes.get_config("rehearsal"),
}
