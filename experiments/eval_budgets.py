"""Accuracy against visual tokens of one checkpoint: fixed budgets, an adaptive one, and training-free rivals.

    python -m marc_jax.eval --config=experiments/eval_budgets.py:videomme --checkpoint=runs/3b/cgrpo \\
        --config.data.test=eval_videomme.json --config.data.root=VIDEOS --config.encoder.path=weights/pe-l14 --out=OUT

The arms (--arms takes some of them):

    fixed_1 .. fixed_8      three events retrieved and merged to so many frames' worth of tokens
    half, quarter           one frame's worth, of which the 64 or 32 most telling tokens are read
    adaptive                one to eight of them, as many as happens in the video: the report's table "At equal mean
                            tokens" compares it with fixed budgets mixed to its mean
    <method>_25, _10, _5    that share of the tokens by MovieChat's merge, VidCom2, EVS, DTD, FastV, uniform frames,
                            random tokens, and MARC's own merge

Fixed and adaptive budgets of a checkpoint that was trained at one frame's worth are read by it untrained. Not measured.
"""

from experiments import baselines, eval_benchmark

FIXED = (1, 2, 4, 8)
SHARED = ("uniform", "random", "moviechat", "vidcom2", "evs", "dtd", "fastv", "merge")  # of the baselines


def get_config(benchmark):
    c = eval_benchmark.get_config(benchmark)
    c.title = "accuracy against visual tokens"
    retrieved = {"select": "retrieve", "method": "merge", "k": 3}

    def arm(key, label, view, group="student"):
        c.views[key] = view
        c.eval.arms[key] = {"view": key, "group": group, "label": label}

    for key in ("marc", "whole"):  # fixed_1, and below as shares
        del c.views[key], c.eval.arms[key]
    for n in FIXED:
        frames = "one frame's worth" if n == 1 else f"{n} frames' worth"
        arm(f"fixed_{n}", f"retrieval, {frames}", {**retrieved, "keep": n, "in_event": n})
    arm("half", "retrieval, 64 tokens", {**retrieved, "tokens": 64})
    arm("quarter", "retrieval, 32 tokens", {**retrieved, "tokens": 32})
    arm("adaptive", "retrieval, adaptive budget", {**retrieved, "keep": max(FIXED), "adaptive": True})
    for key, label, view in baselines.at_shares([row for row in baselines.METHODS if row[0] in SHARED]):
        arm(key, label, view, "baseline")
    c.eval.main = "fixed_1"
    return c
