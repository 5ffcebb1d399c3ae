"""The teacher that ships with the quick start (experiments/assets/quickstart_teacher), trained from scratch.

    python -m marc_jax.train --config=experiments/quickstart_teacher.py --workdir=runs/quickstart_teacher
    python -m tools.export_weights --checkpoint=runs/quickstart_teacher/teacher/checkpoints --dtype=float32 \\
        --out=experiments/assets/quickstart_teacher

The shipped one: one H200, 155 s of training, 2026-11-22.

First single scenes (perception: vision tower and decoder), then whole videos over the features of the frozen tower.
"""

from ml_collections import ConfigDict

SINGLE = ("colour", "shape", "direction", "count", "happens")
PAIRS = ("colours", "shapes", "directions", "total", "happened", "order")


def get_config():
    c = ConfigDict()
    c.title = "Teacher of the MARC quick start"
    c.data = ConfigDict({"train_videos": 4000, "test_videos": 1200, "questions_per_video": 1, "workers": 8})
    c.data.types = PAIRS
    c.views = ConfigDict({"full": {"select": "all", "method": "keep"}})
    c.stages = ("clips", "teacher")
    c.clips = {"kind": "sft", "visual": "pixels", "events": (1, 1), "types": SINGLE, "videos": 256, "questions": 2}
    c.clips.update(steps=2000, blind=0.05, trainable=(".*",), optimizer={"learning_rate": 2e-3})
    c.teacher = {"kind": "sft", "init": "clips", "types": SINGLE + PAIRS + PAIRS, "videos": 64, "questions": 4}
    c.teacher.update(steps=6000, blind=0.06, optimizer={"learning_rate": 2e-3})
    return c
