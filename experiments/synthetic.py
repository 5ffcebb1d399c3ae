"""What the synthetic set shows with a wider model and minutes on one GPU. Not measured as a whole yet.

    python -m marc_jax.train --config=experiments/synthetic.py --workdir=runs/synthetic

The students train the vision tower too (visual = "pixels"): a merged patch must learn codes that survive averaging.
Independent stages can run as separate processes: --config.only="('sft',)".
"""

from ml_collections import ConfigDict

SINGLE = ("colour", "shape", "direction", "count", "happens")
PAIRS = ("colours", "shapes", "directions", "total", "happened", "order")


def get_config():
    c = ConfigDict()
    c.title = "MARC on the synthetic set"
    c.data = ConfigDict({"train_videos": 4000, "test_videos": 1500, "questions_per_video": 1, "workers": 8})
    c.data.types = PAIRS
    c.model = {
        "vision": {"depth": 3, "hidden_size": 128, "num_heads": 2, "intermediate_size": 256},
        "text": {"hidden_size": 192, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 384},
    }
    c.views = ConfigDict()
    c.views.full = {"select": "all", "method": "keep"}
    c.views.marc = {"select": "retrieve", "method": "merge", "k": 3, "keep": 1}
    c.views.marc_k1 = {"select": "retrieve", "method": "merge", "k": 1, "keep": 1}
    c.views.per_event = {"select": "retrieve", "method": "per_event", "k": 3}
    c.views.whole = {"select": "all", "method": "merge", "keep": 1}
    c.views.random = {"select": "random", "method": "keep"}
    c.views.blind = {"select": "none", "method": "keep"}

    c.stages = ("clips", "teacher", "retriever", "sft", "sft_whole", "distill", "distill_events")
    everything = (".*",)
    c.clips = {"kind": "sft", "visual": "pixels", "events": (1, 1), "types": SINGLE, "videos": 256, "questions": 2}
    c.clips.update(steps=2000, blind=0.05, trainable=everything, optimizer={"learning_rate": 2e-3})
    c.teacher = {"kind": "sft", "init": "clips", "types": SINGLE + PAIRS + PAIRS, "videos": 64, "questions": 4}
    c.teacher.update(steps=5500, blind=0.06, optimizer={"learning_rate": 1e-3})
    c.retriever = {"kind": "retriever", "init": "teacher", "types": SINGLE + PAIRS + PAIRS, "videos": 256}
    c.retriever.steps = 1500
    c.retriever.optimizer = {"learning_rate": 3e-3}

    student = {"init": "teacher", "types": PAIRS, "videos": 128, "visual": "pixels", "trainable": everything}
    c.sft = {"kind": "sft", **student, "view": "marc", "steps": 3000, "optimizer": {"learning_rate": 5e-4}}
    c.sft_whole = {"kind": "sft", **student, "view": "whole", "steps": 1500, "optimizer": {"learning_rate": 5e-4}}
    c.distill = {"kind": "distill", **student, "view": "marc", "steps": 2000, "group": 4}
    c.distill.optimizer = {"learning_rate": 5e-4}
    c.distill_events = {"kind": "distill", **student, "view": "per_event", "steps": 300, "group": 2}
    c.distill_events.optimizer = {"learning_rate": 2e-4}

    c.eval = ConfigDict({"main": "sft", "batch": 500, "arms": {}})
    c.eval.arms.teacher = {"stage": "teacher", "view": "full", "group": "teacher", "label": "teacher, every patch"}
    for key, view, label in (
        ("blind", "blind", "no video"),
        ("random", "random", "one random patch"),
        ("whole", "whole", "whole video merged to one patch, untrained"),
        ("untrained", "marc", "retrieval + merging to one patch, untrained"),
        ("untrained_k1", "marc_k1", "one retrieved event, one patch, untrained"),
        ("per_event", "per_event", "one patch per retrieved event, untrained"),
    ):
        c.eval.arms[key] = {"stage": "teacher", "view": view, "label": label}
    for key, stage, view, label in (
        ("sft_whole", "sft_whole", "whole", "SFT, whole video merged to one patch"),
        ("sft", "sft", "marc", "SFT, retrieval + one patch"),
        ("sft_k1", "sft", "marc_k1", "the same student, one event retrieved"),
        ("distill", "distill", "marc", "on-policy distillation, no labels, one patch"),
        ("distill_events", "distill_events", "per_event", "on-policy distillation, one patch per retrieved event"),
    ):
        c.eval.arms[key] = {"stage": stage, "view": view, "label": label, "group": "student"}
    return c
