"""Score checkpoints on the held-out questions; the same code and the same numbers as the run's own report.

    python -m marc_jax.eval --config=experiments/quickstart.py --checkpoint=runs/quickstart
    python -m marc_jax.eval --config=experiments/quickstart.py --checkpoint=runs/quickstart/sft --out=/tmp/sft

With a run's folder all arms of config.eval are answered (or --arms), with a stage's folder those of that stage and the
teacher's.

On a published benchmark the checkpoint is a folder of weights or a stage's; the same command goes on where it stopped:

    python -m marc_jax.eval --config=experiments/eval_benchmark.py:videomme --checkpoint=Qwen2.5-VL-3B-Instruct \\
        --config.data.test=eval_videomme.json --config.data.root=VIDEOS --arms=full,whole --out=OUT
"""

import time
from pathlib import Path

from absl import flags

from marc_jax import config as configs
from marc_jax import settings

flags.DEFINE_string("config", None, "Config file of the run; its eval section says which arms there are.")
flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its stages.")
flags.DEFINE_string("out", None, "Where the report goes; default <checkpoint>/eval.")
flags.DEFINE_string("against", "", "On a benchmark: --out of another evaluation, compared question by question.")
flags.DEFINE_list("arms", [], "Only these arms of config.eval.arms.")
flags.DEFINE_bool("answers", False, "Only answers of arms that have none in --out yet, no report: processes can share.")
flags.DEFINE_bool("skip_bad", False, "On a benchmark: leave out rows and videos that cannot be used, and count them.")
flags.DEFINE_bool("dry_run", False, "On a benchmark: say what would be answered, of which files; do nothing.")


def main() -> None:
    if not flags.FLAGS.config or not flags.FLAGS.checkpoint:
        raise configs.ConfigError("--config=FILE.py and --checkpoint=FOLDER are both required")
    config = settings.experiment(flags.FLAGS.config)
    if config.eval.benchmark:
        on_benchmark(config)
        return
    if settings.on_files(config) and not config.data.test:
        raise configs.ConfigError("config.data.test = '': which question file ? (Video-R1's JSON)")
    started = time.monotonic()

    from marc_jax import run
    from marc_jax.evaluation import experiment

    here, stage = run.opened(flags.FLAGS.checkpoint)
    settings.keep(config, here.workdir / "config.json", write=False)
    here.config, here.views = config, run.views_of(config, here.cfg)
    if stage and stage not in config.stages:
        raise configs.ConfigError(f"--checkpoint: {stage!r} is not a stage of {flags.FLAGS.config}")
    if unknown := [a for a in flags.FLAGS.arms if a not in config.eval.arms]:
        raise configs.ConfigError(f"--arms: {unknown[0]!r} is none of config.eval.arms")
    arms = [a for a in config.eval.arms if not stage or config.eval.arms[a].stage == stage or a == config.eval.teacher]
    arms = [a for a in arms if not flags.FLAGS.arms or a in flags.FLAGS.arms]
    out = Path(flags.FLAGS.out or Path(flags.FLAGS.checkpoint) / "eval")
    if flags.FLAGS.answers:
        experiment.answer_missing(here, arms, out)
        return
    show(experiment.report_on(here, {}, started, arms=arms, folder=out))


def on_benchmark(config) -> None:
    from marc_jax.evaluation import grounding, harness

    config.data.skip_bad |= flags.FLAGS.skip_bad
    if flags.FLAGS.dry_run:
        from marc_jax import plan

        config.init_from = flags.FLAGS.checkpoint
        print(plan.benchmark(config, harness.chosen(config, flags.FLAGS.arms)))
        return
    out = Path(flags.FLAGS.out or Path(flags.FLAGS.checkpoint) / "eval" / config.eval.benchmark)
    if config.eval.benchmark == "qvhighlights":
        found = grounding.evaluate(config, flags.FLAGS.checkpoint, out)
        for name, value, _ in grounding.headline(found["metrics"]):
            print("     –" if value is None else f"{value:6.2f}", f" {name}")
        print(f"{found['n']} of {found['total']} queries; report: {out / 'report.md'}")
        return
    results = harness.evaluate(config, flags.FLAGS.checkpoint, out, flags.FLAGS.arms, flags.FLAGS.against)
    show({"arms": [arm for arm in results["arms"] if (arm.get("headline") or {}).get("accuracy") is not None]})
    print(f"report: {out / 'report.html'}")


def show(results: dict) -> None:
    for arm in results["arms"]:
        low, high = arm["headline"]["ci95"]
        score = f"{arm['headline']['accuracy']:6.1f}  [{low:5.1f}, {high:5.1f}]"
        print(f"{score}  {arm['visual_tokens']:6.1f} tokens  {arm['label']}")


if __name__ == "__main__":
    configs.run_main(main)
