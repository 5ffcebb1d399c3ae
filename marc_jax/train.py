"""Train a run, all its stages, and report on it.

    python -m marc_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]

A run that was stopped goes on where it was: finished stages are skipped, a started one resumes from its newest
checkpoint that verifies. The order of stages is config.stages; what they are is in `marc_jax.stages`. A run of several
processes (`marc_jax.distributed`) is the same command in each, with --coordinator, --processes and --process.
"""

import functools
import sys
from pathlib import Path

from absl import flags

from marc_jax import config as configs
from marc_jax import settings

configs.define_flags(workdir="runs/run")
flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0 of a run of several, or auto where the cluster says it.")
flags.DEFINE_integer("processes", 0, "How many processes the run has.")
flags.DEFINE_integer("process", -1, "Which of them this one is, from 0.")
flags.DEFINE_bool("dry_run", False, "Say what would be done, of which files, in how much memory; do nothing.")


def main() -> None:
    # ---------------------------------------------------------------- config: everything is checked before jax starts
    if not flags.FLAGS.config:
        raise configs.ConfigError("--config=FILE.py is required, e.g. --config=experiments/quickstart.py")
    config = settings.experiment(flags.FLAGS.config)
    if flags.FLAGS.dry_run:
        from marc_jax import plan

        print(plan.training(config))
        return
    workdir = Path(flags.FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    from marc_jax import distributed

    with distributed.joined(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process):
        train(config, workdir)


def train(config, workdir: Path) -> None:
    """All stages of a checked config, and the report."""
    import time

    import jax

    from marc_jax import contrastive, locks, loop, optim, records, run, stages, synthetic
    from marc_jax.evaluation import experiment
    from marc_jax.interrupt import Interrupt
    from marc_jax.models import weights

    with locks.held(workdir / ".lock", f"the config of {workdir}", wait=True):
        settings.keep(config, workdir / "config.json")
    timings, started = {}, time.monotonic()

    if config[config.stages[0]].kind == "encoder":  # then all are: towers beside the model, with data of their own
        return contrastive.train(config, workdir)

    # ---------------------------------------------------------------- data: files, then patches and events in memory
    here = run.prepare(config, workdir)
    wanted = [name for name in config.stages if not any(config.only) or name in config.only]
    for name in wanted:
        run.check_batch(here, name)
    on_files = settings.on_files(config)
    (records if on_files else synthetic).load_training(here)
    timings["data"] = time.monotonic() - started

    # ---------------------------------------------------------------- stages: each from its checkpoint or from its init
    with Interrupt() as stop:
        for name in wanted:
            begun = time.monotonic()
            watch = here.watch = watched(here, name)
            first, draw, step_fn, trainable = stages.build(here, name)
            draw, step_fn = watch.drawing(draw), watch.around(step_fn, first)
            skip = config[name].optimizer.skip
            pace = loop.Pace(config[name].steps, config.log_every, config.save_every, skip=skip)
            meta = {"trainable": list(trainable), "init": config[name].init, "model": weights.hf_config(here.cfg)}
            told = functools.partial(stages.samples, here, name)
            with watch:
                state, _ = loop.fit(name, workdir, first, draw, step_fn, pace, stop=stop, meta=meta, samples=told)
            if config[name].kind == "retriever":
                here.use_retriever(optim.unflatten(state.params), config[name].init)
            timings[name] = time.monotonic() - begun

    # ---------------------------------------------------------------- evaluation and report
    reports = config.eval.arms and not any(config.only) and (config.data.test or not on_files)
    if jax.process_count() > 1:
        print("a run of several processes leaves its report to: python -m marc_jax.eval", file=sys.stderr)
    elif reports:
        with locks.held(workdir / "report" / ".lock", f"the report of {workdir}"):
            experiment.report_on(here, timings, started)


def watched(here, name: str):
    """What watches stage `name` of a run, as config.watch says."""
    from marc_jax.evaluation.during import During
    from marc_jax.watch import Watch

    how, kind = here.config.watch, here.config[name].kind
    evaluated = how.evaluate if kind != "retriever" else 0
    return Watch(
        here.workdir / name, every=here.config.log_every, samples=how.samples, rows=how.rows,
        evaluate=functools.cache(functools.partial(During, here, name)), evaluate_every=evaluated,
        profile=(how.profile, how.profile_steps),
    )  # fmt: skip


if __name__ == "__main__":
    configs.run_main(main)
