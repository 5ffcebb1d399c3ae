"""Compute the teacher's accuracy on every question before a C-GRPO stage trains, so that no step waits for it.

    python -m marc_jax.precompute --config=experiments/marc_qwen25vl_3b.py --workdir=runs/3b --stage=cgrpo

It is kept where the stage looks for it, `<workdir>/teacher.jsonl`, by question, weights and sampling settings: stop it
and start it again as you like, or train at once; what is there is never asked again. Runs on files only: the synthetic
set makes new questions in every step.
"""

import sys
from pathlib import Path

from absl import flags

from marc_jax import config as configs
from marc_jax import settings

configs.define_flags(workdir="runs/run")
flags.DEFINE_string("stage", "cgrpo", "The stage whose teacher is asked.")


def main() -> None:
    if not flags.FLAGS.config:
        raise configs.ConfigError("--config=FILE.py is required")
    config, name = settings.experiment(flags.FLAGS.config), flags.FLAGS.stage
    if name not in config.stages:
        raise configs.ConfigError(f"--stage={name} is not one of the stages: {', '.join(config.stages)}")
    if not settings.on_files(config):
        raise configs.ConfigError("the synthetic set asks new questions in every step: there is nothing to precompute")
    workdir = Path(flags.FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    settings.keep(config, workdir / "config.json")
    fill(config, workdir, name)


def fill(config, workdir: Path, name: str) -> int:
    """Asks the teacher of stage `name` what its cache lacks; returns how many questions it then has.

    Raises ConfigError: the stage compares with no frozen teacher.
    """
    import numpy as np

    from marc_jax import cgrpo, metrics, records, run, stage_parts, stage_settings

    stage = config[name]
    if not stage_settings.asks_teacher(stage) or stage.a_full != "frozen":
        raise configs.ConfigError(f"config.{name} compares with no frozen teacher's accuracy: nothing to precompute")
    here = run.prepare(config, workdir)
    source = records.open_records(here, stage.file or config.data.train, "train")
    teacher = here.parameters(stage.teacher)
    cache = stage_parts.teacher_cache(here, stage, teacher)
    begun = stage_parts.Begun(None, None, None, teacher, here.bank("features", teacher), cache)
    view, full, how = here.view(stage.view), here.view(stage.teacher_view), here.decoding(stage.temperature)
    attempt = cgrpo.Attempt(here, name, begun, view, full, how)
    lengths = source.lengths()
    order = sorted(range(len(lengths)), key=lambda i: lengths[i][0])  # batches of one bucket share what is compiled
    with metrics.Progress("teacher", len(order)) as bar:
        for start in range(0, len(order), stage.videos):
            rows = np.resize(order[start : start + stage.videos], stage.videos)
            asked = source.asked(rows)
            if cache.missing(asked.ids_b.tolist()):
                attempt.precompute((asked, stage_parts.prompts_of(here, asked, view, full)))
            bar.update(min(start + stage.videos, len(order)))
    print(f"{len(cache)} questions in {cache.path}", file=sys.stderr)
    return len(cache)


if __name__ == "__main__":
    configs.run_main(main)
