"""The whole of MARC on two CPU cores: teacher, retriever, memory, student, report.

    make quickstart
    python -m marc_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart

Data: 56x56 videos of 6 to 8 scenes, rendered to MP4 files and read back (data_pipelines/synthetic).
Model: the Qwen2.5-VL architecture with a 2-layer vision tower and a 3-layer decoder, trained here from scratch.
"""

from ml_collections import ConfigDict


def optimizer(learning_rate, **other):
    return ConfigDict(
        {"learning_rate": learning_rate, "warmup_steps": 50, "b2": 0.98, "clip_norm": 1.0, "end_factor": 0.05, **other}
    )


def get_config():
    c = ConfigDict()
    c.title = "MARC quick start"
    c.seed = 0
    c.dtype = "float32"
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})

    c.data = ConfigDict()
    c.data.path = ""  # "" renders into <workdir>/data
    c.data.train_videos = 1500
    c.data.test_videos = 600
    c.data.questions_per_video = 2
    c.data.size = 56
    c.data.fps = 4.0
    c.data.events = (6, 8)
    c.data.patches = (1, 2)
    c.data.dissolve = 0.2
    c.data.types = ("colour", "shape", "direction", "count", "happened", "total", "order")
    c.data.workers = 2

    c.model = ConfigDict()
    c.model.vision = ConfigDict({"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128})
    c.model.text = ConfigDict(
        {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
    )

    # What a model looks at: which patches are chosen, how they are compressed.
    c.views = ConfigDict()
    c.views.full = ConfigDict({"select": "all", "method": "keep"})
    c.views.marc = ConfigDict({"select": "retrieve", "method": "merge", "k": 3, "keep": 1})
    c.views.marc_k1 = ConfigDict({"select": "retrieve", "method": "merge", "k": 1, "keep": 1})
    c.views.whole = ConfigDict({"select": "all", "method": "merge", "keep": 1})
    c.views.per_event = ConfigDict({"select": "retrieve", "method": "per_event", "k": 3})
    c.views.retrieved = ConfigDict({"select": "retrieve", "method": "keep", "k": 3})
    c.views.pooled = ConfigDict({"select": "all", "method": "pooled"})
    c.views.random = ConfigDict({"select": "random", "method": "keep"})
    c.views.blind = ConfigDict({"select": "none", "method": "keep"})

    c.stages = ("clips", "teacher", "retriever", "sft", "sft_whole", "distill", "cgrpo")

    c.clips = ConfigDict({"kind": "sft", "init": "", "view": "full", "visual": "pixels", "events": (1, 1)})
    c.clips.update({"videos": 64, "questions": 2, "steps": 1500, "trainable": (".*",), "blind": 0.05})
    c.clips.optimizer = optimizer(2e-3)

    c.teacher = ConfigDict({"kind": "sft", "init": "clips", "view": "full", "visual": "features", "events": (6, 8)})
    c.teacher.update({"videos": 16, "questions": 4, "steps": 3000, "blind": 0.05})
    c.teacher.trainable = ("text/.*", "vision/merger/.*")
    c.teacher.optimizer = optimizer(2e-3)

    c.retriever = ConfigDict({"kind": "retriever", "init": "teacher", "visual": "features", "events": (6, 8)})
    c.retriever.update({"videos": 64, "steps": 300, "dim": 64})
    c.retriever.optimizer = optimizer(3e-3)

    student = {"init": "teacher", "view": "marc", "visual": "features", "events": (6, 8)}
    trainable = ("text/.*", "vision/merger/.*")
    c.sft = ConfigDict({"kind": "sft", **student, "videos": 64, "questions": 1, "steps": 1000, "blind": 0.0})
    c.sft.trainable = trainable
    c.sft.optimizer = optimizer(1e-3)
    c.sft_whole = ConfigDict(c.sft.to_dict())
    c.sft_whole.view = "whole"

    c.distill = ConfigDict({"kind": "distill", **student, "teacher": "teacher", "teacher_view": "full"})
    c.distill.update({"videos": 48, "group": 2, "steps": 600, "temperature": 1.0, "trainable": trainable})
    c.distill.optimizer = optimizer(1e-3)

    c.cgrpo = ConfigDict({"kind": "cgrpo", **student, "teacher": "teacher", "teacher_view": "full"})
    c.cgrpo.update({"videos": 32, "group": 8, "steps": 300, "temperature": 1.0, "trainable": trainable})
    c.cgrpo.update({"alpha": 0.3, "tau": 0.6, "beta": 0.02})
    c.cgrpo.optimizer = optimizer(3e-4)

    c.max_new_tokens = 14
    c.log_every = 20
    c.save_every = 1000

    c.eval = ConfigDict()
    c.eval.batch = 200
    c.eval.apart = ("order",)
    c.eval.pictures = 6
    return c
