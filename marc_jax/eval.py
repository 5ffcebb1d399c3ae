"""Score checkpoints on the held-out questions; the same code and the same numbers as the run's own report.

    python -m marc_jax.eval --config=experiments/quickstart.py --checkpoint=runs/quickstart
    python -m marc_jax.eval --config=experiments/quickstart.py --checkpoint=runs/quickstart/sft --out=/tmp/sft

With a run's folder all arms of config.eval are answered, with a stage's folder those of that stage and the teacher's.
"""

import time
from pathlib import Path

from absl import flags

from marc_jax import config as configs
from marc_jax import settings

flags.DEFINE_string("config", None, "Config file of the run; its eval section says which arms there are.")
flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its stages.")
flags.DEFINE_string("out", None, "Where the report goes; default <checkpoint>/eval.")


def main() -> None:
    if not flags.FLAGS.config or not flags.FLAGS.checkpoint:
        raise configs.ConfigError("--config=FILE.py and --checkpoint=FOLDER are both required")
    config = settings.experiment(flags.FLAGS.config)
    if settings.on_files(config) and not config.data.test:
        raise configs.ConfigError("config.data.test = '': which question file ? (Video-R1's JSON)")
    started = time.monotonic()

    from marc_jax import run
    from marc_jax.evaluation import experiment

    here, stage = run.opened(flags.FLAGS.checkpoint)
    settings.keep(config, here.workdir / "config.json", write=False)
    here.config = config
    if stage and stage not in config.stages:
        raise configs.ConfigError(f"--checkpoint: {stage!r} is not a stage of {flags.FLAGS.config}")
    arms = [a for a in config.eval.arms if not stage or config.eval.arms[a].stage == stage or a == config.eval.teacher]
    out = Path(flags.FLAGS.out or Path(flags.FLAGS.checkpoint) / "eval")
    results = experiment.report_on(here, {}, started, arms=arms, folder=out)
    for arm in results["arms"]:
        low, high = arm["headline"]["ci95"]
        score = f"{arm['headline']['accuracy']:6.1f}  [{low:5.1f}, {high:5.1f}]"
        print(f"{score}  {arm['visual_tokens']:6.1f} tokens  {arm['label']}")


if __name__ == "__main__":
    configs.run_main(main)
