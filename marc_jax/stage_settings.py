"""The keys of a stage in an experiment: defaults, what may be set, and what goes with what. No jax here."""

from pathlib import Path

from ml_collections import ConfigDict

from marc_jax import view_settings

KINDS = ("sft", "retriever", "distill", "cgrpo", "encoder")
VISUAL = ("pixels", "features")
DTYPES = ("float32", "bfloat16")
COMPUTED = ("auto", *DTYPES)
SCALE = ("", "group", "batch", "none")
WEIGHT = ("", "lost")
PARITY = ("videor1", "trl", "trl_bias_corrected", "tunix", "verl")
DIVERGENCE = ("reverse", "forward", "jsd", "sampled")
WEIGHTS = "a folder with a config.json and safetensors, nor a checkpoint"


def optimizer() -> ConfigDict:
    return ConfigDict({
        "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 50, "end_factor": 0.05, "b1": 0.9, "b2": 0.98,
        "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0, "ema": 0.0, "skip": 0, "spike": 0.0,
    })  # fmt: skip


def stage(kind: str) -> ConfigDict:
    """The keys of a stage of this kind. Raises KeyError for an unknown kind.

    `file`: on files, its question file, where it is not data.train. Of the synthetic set are `events`, `types` and
    `records`, the number of questions that a stage sees over and over: the same ones as any other stage of as many, the
    first of those of a stage of more (0: new ones in each step).
    `lora.rank` > 0 freezes the model and trains adapters of the kernels that `lora.patterns` match in place of
    `trainable`, and beside them, whole, the parameters that `lora.whole` match.

    Of distill: `divergence` from the teacher, see `rl.step.DistillConfig`.

    Of cgrpo: `iterations` updates on the same rollouts; advantages divided as `scale` says ("": as `parity`), times
    1 - eta of their question where `weight` is "lost", with `credit` x (teacher's - student's log-probability) added to
    each token's. Up to `refill` further batches are drawn to replace dead groups; `skip_dead` leaves out those that
    remain, their KL term included.

    "encoder" (`marc_jax.contrastive`): `pairs` is a file of pairs under the data root `root` ("": the file's folder);
    a step sees `videos` videos, `clips` pairs of each, `frames` frames of each clip; `workers` processes read them (0:
    threads); `dtype` is that of the computation ("auto": bfloat16 on an accelerator).
    """
    common = {"kind": kind, "init": "", "steps": 100, "events": (6, 8), "types": ("",), "videos": 64, "file": ""}
    trained = {"view": "full", "visual": "features", "trainable": ("text/.*", "vision/merger/.*"), "micro_batches": 1}
    trained["records"] = 0
    trained["lora"] = {"rank": 0, "alpha": 32.0, "patterns": ("text/layers/.*/kernel",), "whole": ("",)}
    judged = {"teacher": "teacher", "teacher_view": "full", "group": 2, "temperature": 1.0}
    c = ConfigDict(common | {
        "sft": trained | {"questions": 1, "blind": 0.0},
        "retriever": {"visual": "features", "in_batch": 0.0},
        "distill": trained | judged | {"divergence": "reverse"},
        "cgrpo": trained | judged | {
            "alpha": 0.3, "tau": 0.6, "beta": 0.02, "parity": "videor1", "teacher_group": 2, "iterations": 1,
            "scale": "", "weight": "", "credit": 0.0, "refill": 0, "skip_dead": False,
        },
        "encoder": {
            "pairs": "", "root": "", "clips": 4, "frames": 8, "in_batch": 1.0, "trainable": (".*",), "dtype": "auto",
            "remat": True, "workers": 0,
        },
    }[kind])  # fmt: skip
    c.optimizer = optimizer()
    return c


def trainable(c) -> tuple[str, ...]:
    """Patterns of the parameters that a stage trains whole."""
    return tuple(filter(None, c.lora.whole if c.lora.rank else c.trainable))


def teacher_within(c) -> bool:
    """Whether a stage's teacher is the frozen weights beneath its adapters, which its state holds already."""
    return bool(c.lora.rank) and not trainable(c) and c.teacher == c.init


def problems(config, name: str, done: list[str], on_files: bool) -> list[str]:
    """What is wrong with stage `name` of the config, with the stages `done` before it."""
    if name not in config or "kind" not in config[name]:
        return [f"stages names {name!r}, which the file does not define"]
    c, wrong = config[name], []
    if c.kind == "encoder":
        return _encoder_problems(name, c, done)

    def known(field: str) -> None:
        source = c[field]
        if source and source not in done and not holds_weights(source):
            wrong.append(f"{name}.{field} = {source!r} is neither an earlier stage nor {WEIGHTS}")

    known("init")
    if c.steps < 1 or c.videos < 1:
        wrong.append(f"{name}.steps and {name}.videos must be at least 1")
    if c.events[1] > config.data.events[1] and not on_files:
        wrong.append(f"{name}.events = {tuple(c.events)} goes beyond data.events = {tuple(config.data.events)}")
    if c.visual not in VISUAL:
        wrong.append(f"{name}.visual = {c.visual!r}: choose one of {', '.join(VISUAL)}")
    if not 0 <= c.optimizer.ema < 1 or (c.optimizer.ema and c.kind == "retriever"):
        wrong.append(f"{name}.optimizer.ema = {c.optimizer.ema} must lie in [0, 1); 0 for a retriever")
    if c.kind == "retriever":
        if c.in_batch < 0:
            wrong.append(f"{name}.in_batch = {c.in_batch} must not be negative")
        return wrong
    if c.view not in config.views:
        wrong.append(f"{name}.view = {c.view!r} is not one of config.views: {', '.join(config.views)}")
    elif config.views[c.view].select == "retrieve" and not _can_retrieve(config, done, on_files):
        wrong.append(f"{name}.view = {c.view!r} retrieves, but no retriever stage comes before it")
    else:
        wrong += view_settings.trained_problems(name, config.views[c.view], c.visual)
    if c.micro_batches < 1 or c.videos % c.micro_batches:
        wrong.append(f"{name}.micro_batches = {c.micro_batches} must divide {name}.videos = {c.videos}")
    if c.records < 0 or c.records % c.videos or (c.records and on_files):
        wrong.append(f"{name}.records = {c.records} must be a multiple of {name}.videos = {c.videos}; 0 on files")
    if c.lora.rank < 0 or c.lora.alpha <= 0:
        wrong.append(f"{name}.lora: rank must not be negative and alpha must be positive")
    if c.kind in ("distill", "cgrpo"):
        known("teacher")
        if c.teacher_view not in config.views:
            wrong.append(f"{name}.teacher_view = {c.teacher_view!r} is not one of config.views")
        if c.get("divergence", "reverse") not in DIVERGENCE:
            wrong.append(f"{name}.divergence = {c.divergence!r}: choose one of {', '.join(DIVERGENCE)}")
        if c.temperature <= 0:
            wrong.append(f"{name}.temperature = {c.temperature} must be positive: rollouts are sampled")
    if c.kind == "cgrpo":
        if c.group < 2:
            wrong.append(f"{name}.group = {c.group}: group-relative advantages need at least 2 rollouts")
        if c.parity not in PARITY:
            wrong.append(f"{name}.parity = {c.parity!r}: choose one of {', '.join(PARITY)}")
        if c.alpha < 0 or not 0 <= c.tau <= 1:
            wrong.append(f"{name}: alpha must not be negative and tau must lie in [0, 1]")
        wrong += _update_problems(name, c)
    return wrong


def _update_problems(name: str, c) -> list[str]:
    """Of what a C-GRPO stage makes of its rollouts."""
    wrong = []
    if c.scale not in SCALE:
        wrong.append(f"{name}.scale = {c.scale!r}: choose one of {', '.join(map(repr, SCALE))}")
    if c.weight not in WEIGHT:
        wrong.append(f"{name}.weight = {c.weight!r}: choose one of {', '.join(map(repr, WEIGHT))}")
    if c.iterations < 1 or c.refill < 0 or c.credit < 0:
        wrong.append(f"{name}: iterations must be at least 1, refill and credit not negative")
    if c.iterations > 1 and c.parity == "videor1":
        wrong.append(f"{name}.iterations = {c.iterations}: the loss of parity 'videor1' has no clipping; choose 'trl'")
    return wrong


def _encoder_problems(name: str, c, done: list[str]) -> list[str]:
    wrong = []
    if c.init not in done and not Path(c.init or " ").is_dir():
        wrong.append(f"{name}.init = {c.init!r} is neither an earlier stage nor a folder (of PE-Core or SigLIP 2)")
    if not Path(c.pairs).is_file():
        wrong.append(f"{name}.pairs = {c.pairs!r} is not a file of (clip, text) pairs")
    if min(c.steps, c.videos, c.clips, c.frames) < 1:
        wrong.append(f"{name}.steps, videos, clips and frames must be at least 1")
    if c.optimizer.ema:
        wrong.append(f"{name}.optimizer.ema = {c.optimizer.ema}: an encoder hands on its last step")
    if c.in_batch < 0:
        wrong.append(f"{name}.in_batch = {c.in_batch} must not be negative")
    if c.in_batch == 0 and c.clips == 1:
        wrong.append(f"{name}: in_batch = 0 and clips = 1 leave no negatives")
    if c.dtype not in COMPUTED:
        wrong.append(f"{name}.dtype = {c.dtype!r}: choose one of {', '.join(COMPUTED)}")
    return wrong


def _can_retrieve(config, done: list[str], on_files: bool) -> bool:
    """On files an encoder may do it, which `run.prepare` asks for."""
    return on_files or "retriever" in {config[name].kind for name in done if name in config}


def holds_weights(source: str) -> bool:
    """Whether a folder looks like published weights, or has checkpoint steps; they are checked when the run begins."""
    folder = Path(source)
    return (folder / "config.json").exists() or any(
        here.is_dir() and any(here.glob("step_*")) for here in (folder, folder / "checkpoints")
    )
