"""The keys of an experiment: defaults, what a file may set, and every check before anything compiles. No jax here."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from marc_jax import config as configs
from marc_jax import files, stage_settings, view_settings
from marc_jax.config import ConfigError
from marc_jax.evaluation import benchmarks
from marc_jax.view_settings import unknown

POOL = ("mean", "max")
GROUPS = ("teacher", "baseline", "student")
RULES = ("training", "benchmark")
REMAT = ("", "layer", "attention", "products")
STORED = ("keep", "bfloat16", "float32", "int8")


def base() -> ConfigDict:
    """Every key outside the open groups (views, stages, eval.arms), with its default.

    `encoder.path`: folder of PE-Core, SigLIP 2 or another run's retriever for index and ask; empty: this run's own.
    `only` runs just these stages and no evaluation, so that independent stages can be separate jobs in one workdir.
    `init_from` is where stages without `init` start: a folder of published safetensors or a converted checkpoint
    ("": random).

    `data.keep_decoded` keeps the synthetic set's decoded patches beside its files (190 kB a video): the processes of
    several stages then decode them once.

    Training on files (see `on_files`): `data.train` and `data.test` are question files in Video-R1's schema, their
    media under `data.root`; frames at `data.fps`, at most `max_frames`, each of about `frame_tokens` visual tokens, an
    image of at most `image_tokens` (0: as a frame); `second_per_grid` of every video (0: its own; 1.0: as Video-R1's
    checkpoints know it). `memory` is the folder of the features (default in the workdir), kept as `tokens`; `frames` is
    one of sampled frames for runs with another tower or encoder (`data_pipelines.frames`; "": none);
    `shots` a folder of TransNetV2 weights. A batch is padded to one of `buckets` temporal patches, its texts to
    `question_tokens` and `answer_tokens` or half of them. `workers` processes decode, a file in at most
    `decode_seconds`. `sample` is how many rows of a training file are drawn (0: all);
    `skip_bad` leaves out those that cannot be used.
    `eval.limit` asks only so many of the held-out questions, the first (0: all).
    `eval.benchmark` makes it an evaluation on a published benchmark, with data.test its annotations
    (`evaluation.harness`); `eval.scoring` is the rule that leads its report.
    `watch`: every `samples` steps a table of `rows` completions, every `evaluate` steps an evaluation of `questions`
    held-out questions through the stage's views and its teacher's (on files: the first of `file`); `profile_steps`
    steps from step `profile` on under jax.profiler (0: none of it).
    `model.size` is the published size ("": what `init_from` holds); what is trained is kept in float32, the rest in
    `frozen_dtype`, activations in `dtype`; `remat` recomputes in the backward pass, see `models.qwen25_vl.bind`.
    """
    return ConfigDict({
        "title": "MARC",
        "seed": 0,
        "max_new_tokens": 14,
        "log_every": 20,
        "save_every": 1000,
        "stages": ("",),
        "only": ("",),
        "init_from": "",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "data": {
            "path": "", "train_videos": 1500, "test_videos": 600, "questions_per_video": 2, "size": 56, "fps": 4.0,
            "events": (6, 8), "patches": (1, 2), "dissolve": 0.2, "options": "fixed", "types": ("",), "workers": 2,
            "keep_decoded": False,
            "train": "", "test": "", "root": "", "sample": 0, "skip_bad": False, "max_frames": 64, "frame_tokens": 128,
            "image_tokens": 0, "second_per_grid": 0.0, "question_tokens": 512, "answer_tokens": 768,
            "buckets": (1, 8, 32), "memory": "", "tokens": "bfloat16", "shots": "", "frames": "",
            "decode_seconds": 1800.0,
        },
        "model": {
            "size": "", "dtype": "float32", "frozen_dtype": "float32", "attention": "auto", "remat": "",
            "vision": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128},
            "text": {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128},
        },
        "encoder": {"path": "", "pool": "mean"},
        "eval": {
            "batch": 200, "apart": ("order",), "pictures": 6, "main": "", "teacher": "teacher", "rule": "training",
            "benchmark": "", "scoring": "videor1", "limit": 0,
        },
        "watch": {
            "samples": 0, "rows": 8, "evaluate": 0, "questions": 64, "file": "", "profile": 0, "profile_steps": 3,
        },
    })  # fmt: skip


def arm() -> ConfigDict:
    return ConfigDict({"stage": "", "view": "full", "label": "", "group": "baseline", "note": ""})


def claim() -> ConfigDict:
    """`arm` (minus the arm `minus`) should be at least / at most so many points, if it says so; headline accuracy."""
    return ConfigDict({"text": "", "arm": "", "minus": "", "at_least": -1.0, "at_most": -1.0})


def published(folder: str) -> ConfigDict:
    """A published checkpoint that is asked as it is: no stages; frames and precision as in the presets on files.

    Nobody trained it to read merged patches. It reads one patch per retrieved event: what kept most of the teacher
    untrained on the synthetic set.
    """
    c = base()
    c.title, c.init_from, c.stages, c.max_new_tokens = folder, folder, (), 256
    c.model.update(dtype="bfloat16", frozen_dtype="bfloat16")
    c.mesh.update(data=1, fsdp=-1)
    c.data.fps = 2.0
    c.views = ConfigDict({name: view_settings.view() for name in ("full", "whole", "marc", "per_event", "blind")})
    c.views.whole.method = c.views.marc.method = "merge"
    c.views.marc.select = c.views.per_event.select = "retrieve"
    c.views.per_event.method, c.views.blind.select = "per_event", "none"
    c.eval.main, c.eval.arms = "published", ConfigDict({"published": arm()})
    c.eval.arms.published.view = "per_event"
    return c


def on_files(config) -> bool:
    """Whether a run is of a published model on files of one's own, and not the synthetic set's."""
    data = config.data
    return bool(data.train or data.test or config.model.size or config.eval.benchmark or not config.stages)


def completed(raw: dict) -> dict:
    """A config as a run kept it, with the defaults of keys that came later."""
    stages = {name: stage_settings.stage(c["kind"]).to_dict() for name, c in raw.items() if _is_stage(c)}
    full = base().to_dict() | stages

    def fill(given: dict, defaults: dict) -> dict:
        inner = {k: fill(v, defaults.get(k, {})) if isinstance(v, dict) else v for k, v in given.items()}
        return defaults | inner

    return fill(raw, full)


def _is_stage(c) -> bool:
    return isinstance(c, dict) and c.get("kind") in stage_settings.KINDS


def experiment(path: str, overrides=None) -> ConfigDict:
    """Defaults, then the file, then the command line's overrides; locked and checked.

    Raises ConfigError: an unknown key, a wrong type, an impossible combination; the message names the key.
    """
    given = configs.read_file(path)
    full = base()
    open_groups = {"views": given.get("views", {}), "arms": given.get("eval", {}).get("arms", {})}
    names = [name for name in given if isinstance(given[name], ConfigDict) and "kind" in given[name]]
    full.views, full.eval.arms, full.eval.claims = ConfigDict(), ConfigDict(), ConfigDict()
    for name in given.get("eval", {}).get("claims", {}):
        full.eval.claims[name] = claim()
    for name in open_groups["views"]:
        full.views[name] = view_settings.view()
    for name in open_groups["arms"]:
        full.eval.arms[name] = arm()
    for name in names:
        try:
            full[name] = stage_settings.stage(given[name].kind)
        except KeyError:
            kind = given[name].kind
            known = ", ".join(stage_settings.KINDS)
            raise ConfigError(f"{path}: config.{name}.kind is {kind!r}; known: {known}") from None
    configs.merge(full, given, path)
    config = configs.load(full, None, configs.overrides() if overrides is None else overrides)
    validate(config)
    return config


def validate(config: ConfigDict) -> None:
    """Every check across fields. Raises one ConfigError that lists all that is wrong."""
    wrong = []
    size, events, patches = config.data.size, config.data.events, config.data.patches
    if size % 28 or size < 28:
        wrong.append(f"data.size = {size} must be a multiple of 28 (patch 14, merged 2 x 2)")
    if len(events) != 2 or not 1 <= events[0] <= events[1]:
        wrong.append(f"data.events = {events} must be (fewest, most)")
    if len(patches) != 2 or not 1 <= patches[0] <= patches[1]:
        wrong.append(f"data.patches = {patches} must be (shortest, longest) event in temporal patches")
    if strange := [name for name in config.only if name and name not in config.stages]:
        wrong.append(f"only names {strange[0]!r}, which is not one of the stages: {', '.join(config.stages)}")
    wrong += unknown("encoder.pool", config.encoder.pool, POOL)
    if config.max_new_tokens < 1 or config.save_every < 1 or config.log_every < 1:
        wrong.append("max_new_tokens, save_every and log_every must be at least 1")
    for tower, sizes in (("vision", config.model.vision), ("text", config.model.text)):
        unit = 4 if tower == "vision" else 2
        if sizes.hidden_size % (unit * sizes.num_heads):
            wrong.append(f"model.{tower}.hidden_size must be a multiple of {unit} x num_heads")
    if config.model.text.num_heads % config.model.text.num_kv_heads:
        wrong.append("model.text.num_heads must be a multiple of num_kv_heads")
    wrong += [problem for name in config.views for problem in view_settings.problems(name, config.views[name])]
    most = config.data.max_frames // 2 if on_files(config) else int(max(events) * max(patches))
    wrong += view_settings.budget_problems(config.views, most)
    layers = config.model.text.num_layers
    wrong += _file_problems(config) if on_files(config) else view_settings.layer_problems(config.views, layers)
    for key, known in (("rule", RULES), ("scoring", benchmarks.RULES), ("benchmark", ("", *benchmarks.BENCHMARKS))):
        wrong += unknown(f"eval.{key}", config.eval[key], known)
    wrong += _watch_problems(config)
    if config.init_from and not stage_settings.holds_weights(config.init_from):
        wrong.append(f"init_from = {config.init_from!r} is not {stage_settings.WEIGHTS.replace('nor', 'or')}")
    done: list[str] = []
    for name in config.stages:
        wrong += stage_settings.problems(config, name, done, on_files(config))
        done.append(name)
    kinds = {config[name].kind for name in done if name in config and "kind" in config[name]}
    if "encoder" in kinds and len(kinds) > 1:
        wrong.append("stages: those of kind 'encoder' are a run of their own")
    claimed = {config.eval.claims[name][side] for name in config.eval.claims for side in ("arm", "minus")}
    wrong += [f"eval.claims names the unknown arm {a!r}" for a in sorted(claimed - {"", *config.eval.arms})]
    wrong += [problem for name in config.eval.arms for problem in _arm_problems(config, name, done)]
    if wrong:
        raise ConfigError("; ".join(f"config.{problem}" for problem in wrong))


def _file_problems(config) -> list[str]:
    """Of a run on files."""
    data, wrong = config.data, []
    if data.max_frames < 2 or data.max_frames % 2:
        wrong.append(f"data.max_frames = {data.max_frames} must be even")
    if not data.buckets or max(data.buckets) != data.max_frames // 2 or min(data.buckets) < 1:
        wrong.append(f"data.buckets = {data.buckets} must end with data.max_frames / 2 = {data.max_frames // 2}")
    if min(data.frame_tokens, data.question_tokens, data.answer_tokens) < 1 or data.fps <= 0:
        wrong.append("data.frame_tokens, question_tokens, answer_tokens and fps must be positive")
    wrong += unknown("data.tokens", data.tokens, STORED)
    for key, known in (("dtype", stage_settings.DTYPES), ("frozen_dtype", stage_settings.DTYPES), ("remat", REMAT)):
        wrong += unknown(f"model.{key}", config.model[key], known)
    wrong += [problem for name, c in config.views.items() for problem in view_settings.file_problems(name, c)]
    for name in (name for name in config.stages if name in config):
        if config[name].kind == "retriever":
            wrong.append(f"{name}: files do not say which events a question needs; give config.encoder.path instead")
        if config[name].visual != "features":
            wrong.append(f"{name}: training on files takes visual = 'features'")
        wrong += [
            f"{name}.questions share one look at their video, but view {view!r} looks by the question: take 1"
            for view in (stage_settings.ladder(config[name]) if config[name].get("questions", 1) > 1 else ())
            if view in config.views and config.views[view].select == "retrieve"
        ]  # fmt: skip
    return wrong


def _watch_problems(config) -> list[str]:
    c, wrong = config.watch, []
    if min(c.samples, c.evaluate, c.profile) < 0 or min(c.rows, c.questions, c.profile_steps) < 1:
        wrong.append("watch: samples, evaluate and profile must not be negative, the others at least 1")
    if c.evaluate and on_files(config) and not c.file:
        wrong.append("watch.evaluate on files needs watch.file, a file of questions that no stage trains on")
    return wrong


def _arm_problems(config, name: str, done: list[str]) -> list[str]:
    c, wrong = config.eval.arms[name], []
    if c.stage not in done and (c.stage or not on_files(config)):
        wrong.append(f"eval.arms.{name}.stage = {c.stage!r} is not one of the stages")
    if c.view not in config.views:
        wrong.append(f"eval.arms.{name}.view = {c.view!r} is not one of config.views")
    return wrong + unknown(f"eval.arms.{name}.group", c.group, GROUPS)


def _trained_views(c: dict) -> dict:
    """The views that stages of this config look through, with the defaults of keys that came after it was written."""
    stages = [c[name] for name in c["stages"] if name in c]
    names = {stage.get(field, "") for stage in stages for field in ("view", "teacher_view")}
    names |= {name for stage in stages for name in stage.get("ladder", ())}
    defaults = json.loads(configs.to_json(view_settings.view()))
    return {name: defaults | c["views"][name] for name in names if name in c["views"]}


def keep(config: ConfigDict, path: Path, *, write: bool = True) -> None:
    """Writes the config beside the run; a run that goes on must have been started with the same one.

    Pace, title, evaluation and the views of no stage may change. With write=False it is compared only.
    """
    text = configs.to_json(config)
    if path.exists():
        before, now = json.loads(path.read_text()), json.loads(text)
        before = json.loads(json.dumps(completed(before), default=str))
        for c in (before, now):
            for name in ("test", "root", "skip_bad", "workers", "memory", "keep_decoded", "frames", "decode_seconds"):
                c["data"].pop(name, None)
            for name in ("log_every", "save_every", "eval", "encoder", "title", "only", "watch"):
                c.pop(name, None)
            c["views"] = _trained_views(c)
        if before != now:
            changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            raise ConfigError(
                f"{path.parent} was started with another config (different: {', '.join(changed)}); "
                "choose another --workdir, or remove it"
            )
    if write:
        files.write_whole(path, text)
