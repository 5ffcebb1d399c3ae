"""MARC on Qwen2.5-VL-3B and files of one's own: SFT, C-GRPO, on-policy distillation at one frame's worth of tokens.

    python -m marc_jax.train --config=experiments/marc_qwen25vl_3b.py --workdir=runs/3b \\
        --config.init_from=Qwen2.5-VL-3B-Instruct --config.encoder.path=weights/pe-l14 \\
        --config.data.train=Video-R1-260k.json --config.sft.file=Video-R1-COT-165k.json \\
        --config.data.root=VIDEOS --config.data.test=eval_videomme.json

Every stage's settings are Video-R1's (learning rate 1e-6, cosine, AdamW, weight decay 0.01, clip 5, beta 0.04, G = 8,
768 new tokens) over MARC's amount of data: 312 steps of 16 questions, 5,000 rows drawn from the file. What a run needs,
what is checked and what happens to a file: docs/training.md.

Measured on 2026-11-22: one NVIDIA H200, jax 0.11.2, 16 questions per step about eight real videos (10 to 30 temporal
patches), 256 new tokens instead of 768, random weights of the 3B's shapes and a tiny random encoder; four steps each,
the first (which compiles) left out; the training step as it was before one pass took a prompt and its group. So no word
on what is learned:
    cgrpo    7.5 s per step with the teacher's eight answers from all tokens, 4.4 s where they are known (a question's
             later epochs); the first step 72 s, compiling included
    sft      0.9 s per step; the first 27 s
    memory   peak 83 GiB of the GPU's 139 (43 of them state: decoder and merger in float32 with Adam's moments, 35 GiB;
             tower and teacher in bfloat16, 8 GiB)
A step's batch, 0.6 s, is read while the one before computes. Reading and indexing the eight videos took 40 s, loading
the weights and compiling the tower for each of their shapes included.
Not measured: distill, and 768 new tokens, on a GPU; where they do not fit, --config.distill.micro_batches=4 takes the
activations of four questions at a time. Compiled for 16 TPU v5e chips, distill takes 8.4 of 16 GiB each (docs/tpu.md).
Computed from the above, not measured: 312 such cgrpo steps are 40 minutes, and about two hours with 768 new tokens. The
features of 5,000 rows, 44 % of them videos of 42 frames, are about 60 GB on disk (docs/training.md).
"""

from ml_collections import ConfigDict


def get_config(size="3b"):
    c = ConfigDict()
    c.title = f"MARC, Qwen2.5-VL-{size.upper()}"
    c.model = {"size": size, "dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "layer"}
    c.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    c.max_new_tokens = 768
    c.log_every, c.save_every = 5, 100
    # 64 frames at 2 per second; two of them make a temporal patch of about 128 visual tokens (Video-R1's training).
    c.data = ConfigDict({"fps": 2.0, "max_frames": 64, "frame_tokens": 128, "buckets": (1, 8, 32), "workers": 8})
    c.data.sample = 5000

    c.views = ConfigDict()
    c.views.full = {"select": "all", "method": "keep"}
    c.views.marc = {"select": "retrieve", "method": "merge", "k": 3, "keep": 1}
    c.views.whole = {"select": "all", "method": "merge", "keep": 1}
    c.views.per_event = {"select": "retrieve", "method": "per_event", "k": 3}
    c.views.blind = {"select": "none", "method": "keep"}

    # The teacher is the frozen start. Each stage starts from it too; --config.cgrpo.init=sft and the like chain them.
    c.stages = ("sft", "cgrpo", "distill")
    student = {"view": "marc", "videos": 16, "steps": 312, "micro_batches": 1}  # 312 x 16 = 5,000 questions, as MARC
    judged = {"teacher": "", "teacher_view": "full"}
    video_r1 = {"learning_rate": 1e-6, "warmup_steps": 0, "end_factor": 0.0, "b2": 0.999, "weight_decay": 0.01}
    c.sft = {"kind": "sft", **student, "optimizer": {**video_r1, "clip_norm": 5.0}}
    c.cgrpo = {"kind": "cgrpo", **student, **judged, "group": 8, "teacher_group": 8, "beta": 0.04}
    c.cgrpo.optimizer = {**video_r1, "clip_norm": 5.0}
    c.distill = {"kind": "distill", **student, **judged, "group": 4, "optimizer": {**video_r1, "clip_norm": 1.0}}

    c.eval = ConfigDict({"main": "cgrpo", "batch": 16, "rule": "benchmark", "apart": (), "arms": {}})
    c.eval.arms.teacher = {"stage": "", "view": "full", "group": "teacher", "label": "64 frames, every token"}
    for key, view, label in (
        ("blind", "blind", "no video"),
        ("whole", "whole", "whole video merged to one patch, untrained"),
        ("untrained", "marc", "retrieval + merging to one patch, untrained"),
        ("per_event", "per_event", "one patch per retrieved event, untrained"),
    ):
        c.eval.arms[key] = {"stage": "", "view": view, "label": label}
    for key, label in (("sft", "SFT"), ("cgrpo", "C-GRPO"), ("distill", "on-policy distillation, no labels")):
        c.eval.arms[key] = {"stage": key, "view": "marc", "group": "student", "label": f"{label}, one patch"}
    return c
