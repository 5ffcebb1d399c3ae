"""The retriever alone, trained contrastively on the quick start's videos: enough to index with, but not to answer.

    python -m marc_jax.train --config=experiments/retriever.py --workdir=runs/retriever
    python -m marc_jax.train --config=experiments/retriever.py --workdir=runs/r2 --config.retriever.in_batch=0.0

Negatives: the other events of the question's own video, and (in_batch) the events that the batch's other questions
need, both ways round (symmetric InfoNCE). Videos of a batch are split over the mesh's data axis; the in-batch term is
over the whole batch on any number of devices. Keep in_batch small where different videos may show the same thing, as
they often do here: those are false negatives.

Measured on two shared CPU cores (2026-11-22, one seed, --config.data.train_videos=400 --config.retriever.steps=200
--config.retriever.videos=64): recall@3 of the last training batches 92.1 % with in_batch 0.1, 92.8 % with 0.0; half a
minute to two. The full 500 steps of this file are not measured.

PE-Core or SigLIP 2 on your own pairs instead (marc_jax/contrastive.py), from what tools/convert_pe.py wrote:

    python -m marc_jax.train --config=experiments/retriever.py:towers --workdir=runs/towers \\
        --config.towers.init=weights/pe-l14 --config.towers.pairs=pairs.json
    python -m marc_jax.index ... --encoder=runs/towers/towers/encoder

pairs.json is a list, or lines, of {"path": "videos/a.mp4", "text": "a red car turns left", "start": 3.0, "end": 7.5}.
Nobody has trained published towers with it yet: learning rate and sizes below are starting points, not measurements.
"""

from ml_collections import ConfigDict

TEACHER = "experiments/assets/quickstart_teacher"
SINGLE = ("colour", "shape", "direction", "count", "happens")
PAIRS = ("colours", "shapes", "directions", "total", "happened", "order")


def get_config(which="small"):
    return {"small": small, "towers": towers}[which]()


def small():
    c = ConfigDict()
    c.title = "MARC's retriever"
    c.data = ConfigDict({"train_videos": 1500, "test_videos": 1200, "questions_per_video": 1, "types": PAIRS})
    c.views = ConfigDict({"marc": {"select": "retrieve", "method": "merge", "k": 3, "keep": 1}})
    c.stages = ("retriever",)
    c.retriever = {"kind": "retriever", "init": TEACHER, "types": SINGLE + PAIRS + PAIRS, "videos": 128, "steps": 500}
    c.retriever.update(in_batch=0.1, optimizer={"learning_rate": 3e-3})
    c.eval = {"teacher": TEACHER}  # whose vision tower indexes
    return c


def towers():
    c = ConfigDict()
    c.title = "PE-Core or SigLIP 2 on one's own pairs"
    c.stages = ("towers",)
    c.towers = {"kind": "encoder", "videos": 64, "clips": 4, "frames": 8, "steps": 1000}
    c.towers.optimizer = {"learning_rate": 1e-5, "warmup_steps": 100, "weight_decay": 0.05}
    return c
