"""What a command would do, said without doing it: --dry_run of `marc_jax.train` and `marc_jax.eval`.

Reads the config, the question files and media that it names, and the model's shapes. Nothing is decoded, compiled or
written, and no weights are read.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import sources
from data_pipelines.benchmarks.read import read
from marc_jax import config as configs
from marc_jax import optim, run, settings, stage_settings
from marc_jax.config import ConfigError
from marc_jax.evaluation import benchmarks
from marc_jax.models import lora, qwen25_vl

SHOWN = 5  # rows that cannot be used
MOMENTS = 2  # Adam's, in float32 beside the parameters


def training(config) -> str:
    """Stages, what each reads and holds, and what is still to be given.

    Raises ConfigError: a question file that cannot be read at all.
    """
    lines = [f"{config.title}: stages {', '.join(config.stages)}"]
    on_files = settings.on_files(config)
    missing = run.to_be_given(config) if on_files else []
    lines += [f"still to be given: config.{key}, {what}" for key, what in missing]
    here = None
    if on_files and (config.model.size or config.init_from):
        here = run.surroundings(config, None)
        lines += _model(here)
    files = {"data.train": config.data.train} | {f"{name}.file": config[name].get("file", "") for name in config.stages}
    if on_files:
        lines += [line for key, file in files.items() if file for line in _questions(config, key, file)]
    for name in config.stages:
        if not any(config.only) or name in config.only:
            lines.append(_stage(config, here, name))
    if not any(config.only):
        lines += [_arm(config, here, key) for key in config.eval.arms]
    return "\n".join([*lines, *_settings(config)])


def benchmark(config, arms: Sequence[str]) -> str:
    """Arms on a benchmark, of a config whose init_from is the checkpoint; `arms` as `harness.chosen` gives them.

    Raises ConfigError: annotations that are not named or cannot be read at all.
    """
    name, data = config.eval.benchmark, config.data
    here = run.surroundings(config, None)
    lines = [f"{benchmarks.BENCHMARKS[name].title}: {config.title}", *_model(here)]
    if not data.test or not data.root:
        lines.append("still to be given: config.data.test (annotations, a file or folder), config.data.root (videos)")
    else:
        try:
            found = read(name, data.test, root=data.root, skip_bad=True)
        except sources.RecordError as error:
            raise ConfigError(str(error)) from None
        lines += _counted("data.test", data.test, found.records, found.errors, found.total)
    lines += [_arm(config, here, key) for key in arms]
    return "\n".join([*lines, *_settings(config)])


def _model(here: run.Run) -> list[str]:
    cfg, mesh = here.cfg, here.mesh
    sizes = {"vision tower": 0, "merger": 0, "decoder": 0}
    for name, x in optim.flatten(qwen25_vl.abstract(cfg)).items():
        part = "merger" if name.startswith("vision/merger") else "vision tower" if "vision" in name else "decoder"
        sizes[part] += int(np.prod(x.shape))
    counted = ", ".join(f"{part} {_count(size)}" for part, size in sizes.items())
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens, width = here.sampling.tokens, 2 if here.config.data.tokens == "bfloat16" else 4
    features = here.sizes.patches * tokens * 4 * cfg.vision.hidden_size * width
    return [
        f"model: {counted} parameters; {mesh.size} {jax.devices()[0].platform} device(s), mesh {axes}",
        f"a video: at most {2 * here.sizes.patches} frames, {tokens} tokens per two of them, "
        f"{features / 2**20:,.0f} MiB of features on disk",
    ]


def _questions(config, key: str, file: str) -> list[str]:
    errors: list[sources.RecordError] = []
    try:
        records = sources.load_records(file, errors=errors)
    except sources.RecordError as error:
        raise ConfigError(str(error)) from None
    total, good = len(records) + len(errors), []
    for record in records:
        try:
            sources.media_path(config.data.root, record.path)
            good.append(record)
        except ValueError as error:
            errors.append(sources.RecordError(file, record.row, "path", str(error), record.line))
    drawn = config.data.sample
    more = f"; {drawn:,} of them are drawn" if 0 < drawn < total else ""
    return _counted(f"config.{key}", file, good, sorted(errors, key=lambda e: e.row), total, more)


def _counted(key: str, file, records, errors, total: int, more: str = "") -> list[str]:
    media = {record.path for record in records}
    lines = [f"{key}: {len(records):,} of {total:,} rows of {file} can be used, {len(media):,} files{more}"]
    lines += [f"  {error}" for error in errors[:SHOWN]]
    return lines + [f"  and {len(errors) - SHOWN:,} more"] * (len(errors) > SHOWN)


def _stage(config, here: run.Run | None, name: str) -> str:
    c = config[name]
    what = f"packed rows of {c.max_length:,} tokens" if c.get("packing", False) else "questions"
    text = f"stage {name} ({c.kind}): {c.steps:,} steps of {c.videos} {what}" + (f", from {c.init}" if c.init else "")
    if "view" in c:
        text += f"; reads {c.view}{_reads(here, c.view)}"
    if stage_settings.needs_teacher(c):
        text += f", its teacher {c.teacher_view}{_reads(here, c.teacher_view)}"
    if here is not None and c.kind in ("sft", "distill", *stage_settings.GROUPED):
        held, most, trained = _held(here, name, c)
        text += f"; trains {_count(trained)} parameters; holds {held / 2**30:.1f} GiB, {most / 2**30:.1f} on a device"
    return text


def _held(here: run.Run, name: str, c) -> tuple[int, int, int]:
    """(bytes of a stage's state and its teacher, those on the fullest device, parameters that train)."""
    whole = qwen25_vl.abstract(here.cfg, mesh=here.mesh)
    trained, frozen = optim.partition(whole, stage_settings.trainable(c))
    if c.lora.rank:
        try:
            trained |= lora.abstract(qwen25_vl.describe(here.cfg), c.lora.rank, tuple(c.lora.patterns), here.mesh)[0]
        except ValueError as error:
            raise ConfigError(f"config.{name}: {error}") from None
    kept = jnp.dtype(here.config.model.frozen_dtype).itemsize
    copies = 1 + MOMENTS + bool(c.optimizer.ema)
    parts = [(x, 4 * copies) for x in trained.values()] + [(x, kept) for x in frozen.values()]
    if stage_settings.needs_teacher(c) and not stage_settings.teacher_within(c):
        parts += [(x, kept) for x in optim.flatten(whole).values()]
    held = sum(int(np.prod(x.shape)) * size for x, size in parts)
    most = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * size for x, size in parts)
    return held, most, sum(int(np.prod(x.shape)) for x in trained.values())


def _arm(config, here: run.Run | None, key: str) -> str:
    arm = config.eval.arms[key]
    who = f"stage {arm.stage}" if arm.stage else "the start"
    return f"arm {key}: {who} through {arm.view}{_reads(here, arm.view)}" + (f" ({arm.label})" if arm.label else "")


def _reads(here: run.Run | None, name: str) -> str:
    """How much a view reads at most."""
    if here is None:
        return ""
    view, sizes = here.views[name], here.sizes
    if view.select == "none":
        return " (0 tokens)"
    most = view.kept(sizes.patches, sizes.event) * here.sampling.tokens
    if view.share is not None:
        most = int(view.count(np.array(sizes.patches), here.sampling.tokens))
    return f" (at most {min(most, view.tokens or most):,} tokens)"


def _settings(config) -> Iterator[str]:
    """The settings that are not the defaults."""
    usual = configs.flat(settings.base())
    given = {key: value for key, value in configs.flat(config).items() if key in usual and value != usual[key]}
    yield "settings:"
    yield from (f"  --config.{key}={value}" for key, value in given.items())


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
