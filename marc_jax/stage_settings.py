"""The keys of a stage in an experiment: defaults, what may be set, and what goes with what. No jax here."""

from pathlib import Path

from ml_collections import ConfigDict

from marc_jax import view_settings
from marc_jax.view_settings import unknown

KINDS = ("sft", "retriever", "distill", "cgrpo", "grpo", "encoder")
GROUPED = ("cgrpo", "grpo")
VISUAL = ("pixels", "features")
DTYPES = ("float32", "bfloat16")
COMPUTED = ("auto", *DTYPES)
SCALE = ("", "group", "batch", "none")
WEIGHT = ("", "lost")
DIVERGENCE = ("reverse", "forward", "jsd", "sampled", "text")
A_FULL = ("frozen", "current")
TEACHER_ZERO = ("none", "cap", "floor")
LOSS = {  # of rl.loss.LossConfig, what a family (`parity`) settles otherwise: its choices, or the least of a number
    "clip_low": 0.0, "clip_high": 0.0, "dual_clip": 1.0, "ratio": ("token", "sequence"), "log_ratio_clamp": 0.0,
    "kl": ("k1", "k2", "k3"), "kl_clamp": 0.0, "kl_value_clamp": 0.0, "kl_bias_corrected": (False, True),
    "aggregation": ("grpo", "bnpo", "dr_grpo", "dapo"), "max_length": 0,
}  # fmt: skip
ADVANTAGE = {"baseline": ("mean", "rloo"), "ddof": (0, 1), "eps": 0.0}
PARITY = ("videor1", "trl", "trl_bias_corrected", "tunix", "verl")
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
    `ladder`: further views; step n looks through view n of (view, *ladder), and round again (`views.NAME.tell` tells
    the student its budget).
    `lora.rank` > 0 freezes the model and trains adapters of the kernels that `lora.patterns` match in place of
    `trainable`, and beside them, whole, the parameters that `lora.whole` match.

    Of sft: `questions` about one video share its tokens; or `packing` lays those of several videos end to end, up to
    `max_segments` in a row of `max_length` tokens, and `videos` counts such rows.

    Of distill: `on_policy`: the student samples, else the teacher; `divergence`, `mix`, `top_k` of `rl.step`.

    Of cgrpo (grpo: the same through every token, alpha 0): `rewards`, names of ours ("accuracy", "strict_accuracy",
    "format") or package.module:function, times `reward_weights` (none: 1 each), within `reward_seconds` (0: any time);
    the first is the accuracy that retention compares with the teacher's, `a_full` of the "frozen" teacher or of the
    "current" policy with every token. `bonus`: Video-R1's for lengths and for the order of frames. `iterations`
    updates on the same rollouts; numerics of a family, `parity`, where `loss` and `advantage` say nothing (infinity:
    off); advantages divided as `scale` says ("": as `parity`), times 1 - eta of their question where `weight` is
    "lost", with `credit` x (teacher's - student's log-probability) added to each token's. Up to `refill` further
    batches are drawn to replace dead groups; `skip_dead` leaves out those that remain, their KL term included.

    "encoder" (`marc_jax.contrastive`): `pairs` is a file of pairs under the data root `root` ("": the file's folder);
    a step sees `videos` videos, `clips` pairs of each, `frames` frames of each clip; `workers` processes decode them;
    `dtype` is that of the computation ("auto": bfloat16 on an accelerator).
    """
    common = {"kind": kind, "init": "", "steps": 100, "events": (6, 8), "types": ("",), "videos": 64, "file": ""}
    trained = {"view": "full", "visual": "features", "trainable": ("text/.*", "vision/merger/.*"), "micro_batches": 1}
    trained["records"] = 0
    trained["lora"] = {"rank": 0, "alpha": 32.0, "patterns": ("text/layers/.*/kernel",), "whole": ("",)}
    trained["ladder"] = ()
    judged = {"teacher": "teacher", "teacher_view": "full", "group": 2, "temperature": 1.0}
    grouped = trained | judged | {
        "alpha": 0.3, "tau": 0.6, "beta": 0.02, "parity": "videor1", "teacher_group": 2, "iterations": 1,
        "scale": "", "weight": "", "credit": 0.0, "refill": 0, "skip_dead": False, "a_full": "frozen",
        "rewards": ("accuracy", "format"), "reward_weights": (), "reward_seconds": 30.0,
        "retention": {
            "eta_max": 2.0, "teacher_zero": "none", "teacher_floor": 0.125, "correct_above": 0.5, "images": False,
        },
        "bonus": {
            "length": 0.0, "length_range": (320, 512), "temporal": 0.0, "temporal_factor": 0.8, "correct_above": 0.1,
        },
        "loss": dict.fromkeys(LOSS), "advantage": dict.fromkeys(ADVANTAGE),
    }  # fmt: skip
    c = ConfigDict(common | {
        "sft": trained | {
            "questions": 1, "blind": 0.0, "packing": False, "max_length": 4096, "max_segments": 16,
        },
        "retriever": {"visual": "features", "in_batch": 0.0},
        "distill": trained | judged | {"on_policy": True, "divergence": "reverse", "mix": 0.5, "top_k": 0},
        "cgrpo": grouped, "grpo": grouped | {"alpha": 0.0},
        "encoder": {
            "pairs": "", "root": "", "clips": 4, "frames": 8, "in_batch": 1.0, "trainable": (".*",), "dtype": "auto",
            "remat": True, "workers": 2,
        },
    }[kind])  # fmt: skip
    c.optimizer = optimizer()
    return c


def trainable(c) -> tuple[str, ...]:
    """Patterns of the parameters that a stage trains whole."""
    return tuple(filter(None, c.lora.whole if c.lora.rank else c.trainable))


def ladder(c) -> tuple[str, ...]:
    """The views that a stage trains through, one step after the other."""
    return (c.view, *c.ladder)


def asks_teacher(c) -> bool:
    """Whether a stage needs a_full, the accuracy at every token."""
    return c.kind in GROUPED and bool(c.alpha or c.weight)


def needs_teacher(c) -> bool:
    """Whether a stage needs frozen parameters: to sample, to judge, or as the KL anchor."""
    if c.kind == "distill":
        return True
    return c.kind in GROUPED and bool(c.beta or c.credit or (asks_teacher(c) and c.a_full == "frozen"))


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
    wrong += unknown(f"{name}.visual", c.visual, VISUAL)
    if not 0 <= c.optimizer.ema < 1 or (c.optimizer.ema and c.kind == "retriever"):
        wrong.append(f"{name}.optimizer.ema = {c.optimizer.ema} must lie in [0, 1); 0 for a retriever")
    if c.kind == "retriever":
        if c.in_batch < 0:
            wrong.append(f"{name}.in_batch = {c.in_batch} must not be negative")
        return wrong
    for view in dict.fromkeys(ladder(c)):
        if view not in config.views:
            wrong.append(f"{name}.view = {view!r} is not one of config.views: {', '.join(config.views)}")
        elif config.views[view].select == "retrieve" and not _can_retrieve(config, done, on_files):
            wrong.append(f"{name}.view = {view!r} retrieves, but no retriever stage comes before it")
        else:
            wrong += view_settings.trained_problems(name, config.views[view], c.visual)
    if c.micro_batches < 1 or c.videos % c.micro_batches:
        wrong.append(f"{name}.micro_batches = {c.micro_batches} must divide {name}.videos = {c.videos}")
    if c.records < 0 or c.records % c.videos or (c.records and on_files):
        wrong.append(f"{name}.records = {c.records} must be a multiple of {name}.videos = {c.videos}; 0 on files")
    if c.lora.rank < 0 or c.lora.alpha <= 0:
        wrong.append(f"{name}.lora: rank must not be negative and alpha must be positive")
    if c.kind == "sft" and c.packing:
        wrong += _packing_problems(name, c, on_files)
    if c.kind == "distill":
        wrong += _distill_problems(name, c)
    if c.kind in ("distill", *GROUPED):
        known("teacher")
        if c.teacher_view not in config.views:
            wrong.append(f"{name}.teacher_view = {c.teacher_view!r} is not one of config.views")
        if c.temperature <= 0:
            wrong.append(f"{name}.temperature = {c.temperature} must be positive: rollouts are sampled")
    return wrong + (_group_problems(name, c) if c.kind in GROUPED else [])


def _packing_problems(name: str, c, on_files: bool) -> list[str]:
    wrong = []
    if not on_files:
        wrong.append(f"{name}.packing is for files: rows of the synthetic set are all of about one length")
    if c.questions != 1:
        wrong.append(f"{name}.packing: {name}.questions = {c.questions} share one video's tokens already; set it to 1")
    if min(c.max_length, c.max_segments) < 1:
        wrong.append(f"{name}.max_length and {name}.max_segments must be at least 1")
    return wrong


def _distill_problems(name: str, c) -> list[str]:
    wrong = unknown(f"{name}.divergence", c.divergence, DIVERGENCE)
    if not 0 < c.mix < 1 or c.top_k < 0 or c.group < 1:
        wrong.append(f"{name}: mix must lie between 0 and 1, top_k not be negative and group be at least 1")
    if c.divergence == ("text" if c.on_policy else "sampled"):
        whose = "teacher" if c.on_policy else "student"
        wrong.append(f"{name}.divergence = {c.divergence!r} is for tokens of the {whose}; on_policy = {c.on_policy}")
    return wrong


def _group_problems(name: str, c) -> list[str]:
    """Of rollouts, their rewards, and what is made of them."""
    wrong = unknown(f"{name}.parity", c.parity, PARITY) + unknown(f"{name}.a_full", c.a_full, A_FULL)
    wrong += unknown(f"{name}.scale", c.scale, SCALE) + unknown(f"{name}.weight", c.weight, WEIGHT)
    if c.group < 2 or c.teacher_group < 1:
        wrong.append(f"{name}.group = {c.group}: group-relative advantages need at least 2 rollouts, the teacher 1")
    if c.alpha < 0 or not 0 <= c.tau <= 1:
        wrong.append(f"{name}: alpha = {c.alpha} must not be negative and tau = {c.tau} must lie in [0, 1]")
    if not c.rewards or len(set(c.rewards)) < len(c.rewards) or c.reward_seconds < 0:
        wrong.append(f"{name}.rewards must name at least one function, each once, and reward_seconds not be negative")
    if c.reward_weights and len(c.reward_weights) != len(c.rewards):
        wrong.append(f"{name}.reward_weights has {len(c.reward_weights)} numbers for {len(c.rewards)} rewards")
    keep = c.retention
    wrong += unknown(f"{name}.retention.teacher_zero", keep.teacher_zero, TEACHER_ZERO)
    if keep.eta_max < c.tau or not 0 < keep.teacher_floor <= 1:
        wrong.append(f"{name}.retention: eta_max must be at least tau, and teacher_floor lie in (0, 1]")
    if len(c.bonus.length_range) != 2 or min(c.bonus.length, c.bonus.temporal) < 0:
        wrong.append(f"{name}.bonus: length_range is (shortest, longest), and bonuses are not negative")
    if c.iterations < 1 or c.refill < 0 or c.credit < 0 or c.beta < 0:
        wrong.append(f"{name}: iterations must be at least 1, refill and credit not negative")
    if c.iterations > 1 and c.parity == "videor1":
        wrong.append(f"{name}.iterations = {c.iterations}: the loss of parity 'videor1' has no clipping; choose 'trl'")
    for group, choices in (("loss", LOSS), ("advantage", ADVANTAGE)):
        for key, known in choices.items():
            wrong += _numeric_problems(f"{name}.{group}.{key}", c[group][key], known)
    return wrong


def _numeric_problems(key: str, value, known) -> list[str]:
    """Of a number that must be at least `known`, or one of the choices `known`; None: as the family has it."""
    if value is None:
        return []
    if isinstance(known, tuple):
        return unknown(key, value, known)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return [] if number and value >= known else [f"{key} = {value!r} must be a number, at least {known:g}"]


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
    return wrong + unknown(f"{name}.dtype", c.dtype, COMPUTED)


def _can_retrieve(config, done: list[str], on_files: bool) -> bool:
    """On files an encoder may do it, which `run.prepare` asks for."""
    return on_files or "retriever" in {config[name].kind for name in done if name in config}


def holds_weights(source: str) -> bool:
    """Whether a folder looks like published weights, or has checkpoint steps; they are checked when the run begins."""
    folder = Path(source)
    return (folder / "config.json").exists() or any(
        here.is_dir() and any(here.glob("step_*")) for here in (folder, folder / "checkpoints")
    )
