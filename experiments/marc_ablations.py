"""MARC's ablations on a published model and files of one's own: one setting of marc_qwen25vl_3b.py changed at a time.

    python -m marc_jax.train --config=experiments/marc_ablations.py:no_retrieval --workdir=runs/no_retrieval \\
        --config.init_from=Qwen2.5-VL-3B-Instruct --config.encoder.path=weights/pe-l14 \\
        --config.data.train=Video-R1-260k.json --config.data.root=VIDEOS --config.data.memory=runs/memory
    python -m marc_jax.eval --config=experiments/eval_benchmark.py:videomme --checkpoint=runs/no_retrieval/cgrpo ...

    main            C-GRPO, three events retrieved and merged to one patch: the method
    no_retrieval    C-GRPO, the whole video merged to one patch, in training and evaluation; needs no encoder
    no_retention    GRPO: the same without the reward for keeping the teacher's accuracy (alpha = 0)
    sft             SFT alone, retrieved and merged (--config.sft.file=Video-R1-COT-165k.json)
    sft_whole       SFT alone, the whole video merged

--config.data.memory shares what the tower made of the videos among them; --dry_run says what each would do. The paper's
means over six benchmarks (arXiv 2510.07915, 3B): SFT 38.50, SFT + retrieval 40.16, C-GRPO + retrieval 42.20, the
teacher at 64 frames 42.21. Not measured here: no published weights were at hand.
"""

from experiments import marc_qwen25vl_3b

STAGES = {"main": "cgrpo", "no_retrieval": "cgrpo", "no_retention": "cgrpo", "sft": "sft", "sft_whole": "sft"}


def get_config(which="main"):
    c, stage = marc_qwen25vl_3b.get_config(), STAGES[which]
    c.title = f"{c.title}: {which.replace('_', ' ')}"
    for name in c.stages:
        if name != stage:
            del c[name], c.eval.arms[name]
    c.stages, c.eval.main = (stage,), stage
    if which == "no_retention":
        c.cgrpo.alpha = 0.0
    if which in ("no_retrieval", "sft_whole"):
        c[stage].view = c.eval.arms[stage].view = "whole"
        for key in ("untrained", "per_event"):
            del c.eval.arms[key]
        for name in ("marc", "per_event"):
            del c.views[name]
    return c
