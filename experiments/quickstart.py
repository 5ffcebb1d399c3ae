"""The whole of MARC on two CPU cores: teacher, retriever, memory, student, report.

    make quickstart
    python -m marc_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart

Data: 56x56 videos of 6 to 8 scenes, rendered to MP4 files and read back (data_pipelines/synthetic).
Model: the Qwen2.5-VL architecture with a 2-layer vision tower and a 3-layer decoder. The teacher starts from the
shipped weights that experiments/quickstart_teacher.py makes; everything else is trained here.
"""

from ml_collections import ConfigDict

TEACHER = "experiments/assets/quickstart_teacher"
SINGLE = ("colour", "shape", "direction", "count", "happens")  # about one scene: perception, in training only
PAIRS = ("colours", "shapes", "directions", "total", "happened", "order")  # about two scenes: what is asked in the end


def get_config():
    c = ConfigDict()
    c.title = "MARC quick start"
    c.data = ConfigDict({"train_videos": 1500, "test_videos": 1200, "questions_per_video": 1, "types": PAIRS})

    # What a model looks at: which temporal patches are chosen, and how they are compressed.
    c.views = ConfigDict()
    c.views.full = {"select": "all", "method": "keep"}
    c.views.marc = {"select": "retrieve", "method": "merge", "k": 3, "keep": 1}
    c.views.marc_k1 = {"select": "retrieve", "method": "merge", "k": 1, "keep": 1}
    c.views.per_event = {"select": "retrieve", "method": "per_event", "k": 3}
    c.views.whole = {"select": "all", "method": "merge", "keep": 1}
    c.views.pooled = {"select": "all", "method": "pooled"}
    c.views.random = {"select": "random", "method": "keep"}
    c.views.blind = {"select": "none", "method": "keep"}

    c.stages = ("teacher", "retriever", "sft", "sft_whole", "distill", "cgrpo")

    c.teacher = {"kind": "sft", "init": TEACHER, "types": SINGLE + PAIRS + PAIRS, "videos": 16, "questions": 4}
    c.teacher.update(steps=100, blind=0.06, optimizer={"learning_rate": 2e-4})
    c.retriever = {"kind": "retriever", "init": "teacher", "types": SINGLE + PAIRS + PAIRS, "videos": 128, "steps": 500}
    c.retriever.optimizer = {"learning_rate": 3e-3}

    # Order is left out of the students' training: one merged patch has no time in it.
    student = {"init": "teacher", "view": "marc", "types": PAIRS[:-1], "videos": 64}
    c.sft = {"kind": "sft", **student, "steps": 1450}
    c.sft_whole = {"kind": "sft", **student, "view": "whole", "steps": 1450}
    c.distill = {"kind": "distill", **student, "steps": 600, "group": 2}
    # The teacher is over-sure of itself on merged tokens (two groups in three are all right or all wrong): T > 1.
    c.cgrpo = {"kind": "cgrpo", **student, "videos": 32, "steps": 600, "group": 8, "temperature": 1.2, "beta": 0.002}
    c.cgrpo.optimizer = {"learning_rate": 5e-4}

    c.eval = ConfigDict({"main": "sft", "arms": arms(), "claims": claims()})
    return c


def arms():
    """Who answers the held-out questions, looking how."""
    c = ConfigDict()
    c.teacher = {"stage": "teacher", "view": "full", "group": "teacher", "label": "teacher, every patch"}
    for key, view, label in (
        ("blind", "blind", "no video"),
        ("random", "random", "one random patch"),
        ("pooled", "pooled", "uniform patches, pooled to one patch's tokens"),
        ("whole", "whole", "whole video merged to one patch, untrained"),
        ("untrained", "marc", "retrieval + merging to one patch, untrained"),
        ("untrained_k1", "marc_k1", "one retrieved event, one patch, untrained"),
        ("per_event", "per_event", "one patch per retrieved event, untrained"),
    ):
        c[key] = {"stage": "teacher", "view": view, "label": label}
    for key, stage, view, label in (
        ("sft_whole", "sft_whole", "whole", "SFT, whole video merged to one patch"),
        ("sft", "sft", "marc", "SFT, retrieval + one patch"),
        ("sft_k1", "sft", "marc_k1", "the same student, one event retrieved"),
        ("distill", "distill", "marc", "on-policy distillation, no labels, one patch"),
        ("cgrpo", "cgrpo", "marc", "C-GRPO from the untrained student, one patch"),
    ):
        c[key] = {"stage": stage, "view": view, "label": label, "group": "student"}
    return c


def claims():
    """What the report says of its own numbers: headline accuracies and differences, in points."""
    c = ConfigDict()
    for name, text, arm, minus, least in (
        ("teacher", "the teacher reads the videos", "teacher", "", 85.0),
        ("loss", "compression alone loses clearly", "teacher", "untrained", 30.0),
        ("training", "training the student on compressed tokens recovers", "sft", "untrained", 25.0),
        ("retrieval", "retrieval before compression matters, trained", "sft", "sft_whole", 20.0),
        ("three", "three retrieved events beat one, trained", "sft", "sft_k1", 5.0),
        ("distillation", "distillation from the teacher recovers without any label", "distill", "untrained", 10.0),
        ("reward", "C-GRPO raises its starting point on reward alone", "cgrpo", "untrained", 3.0),
        ("budget", "one patch per retrieved event against one patch in all, untrained", "per_event", "untrained", 30.0),
    ):
        c[name] = {"text": text, "arm": arm, "minus": minus, "at_least": least}
    for name, text, arm, most in (
        ("blind", "no video: near chance (9.2 over these types)", "blind", 16.0),
        ("random", "one random patch: near chance plus the one event it shows", "random", 20.0),
    ):
        c[name] = {"text": text, "arm": arm, "at_most": most}
    return c
