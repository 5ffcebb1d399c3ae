"""Ask about any video file: which events were used, what was merged, how long each part took, and a picture.

    python -m marc_jax.ask --checkpoint=runs/quickstart --video=FILE --question="how many in blue stripes ?"

--checkpoint is a run's folder (its main student answers) or a stage's folder inside it. With --memory the video is
read from a memory made by `marc_jax.index`, and neither decoded nor encoded again.
"""

import time
from pathlib import Path

from absl import flags

from marc_jax import config as configs

flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its stages.")
flags.DEFINE_string("video", None, "Video file.")
flags.DEFINE_string("question", None, "The question.")
flags.DEFINE_string("memory", None, "Folder of a memory that holds the video.")
flags.DEFINE_string("encoder", None, "Folder of PE-Core or SigLIP 2 weights that embed; default: config.encoder.path.")
flags.DEFINE_enum("pool", None, ["mean", "max"], "An event: the mean of its frames, or its nearest frame.")
flags.DEFINE_string("view", None, "A view of the run's config; default that of the stage.")
flags.DEFINE_string("picture", "ask.png", "Where the picture goes; empty: none.")


class Clock:
    """Seconds per part; the first call of a compiled function is not counted, `twice` runs it again."""

    def __init__(self):
        self.parts: dict[str, float] = {}

    def once(self, name: str, fn):
        begun = time.perf_counter()
        result = fn()
        self.parts[name] = time.perf_counter() - begun
        return result

    def twice(self, name: str, fn):
        import jax

        jax.block_until_ready(fn())
        return self.once(name, lambda: jax.block_until_ready(fn()))


def main() -> None:
    wanted = flags.FLAGS
    if not wanted.checkpoint or not wanted.video or not wanted.question:
        raise configs.ConfigError("--checkpoint=FOLDER, --video=FILE and --question=TEXT are all required")

    from marc_jax import run
    from marc_jax.evaluation import single

    clock = Clock()
    # ---------------------------------------------------------------- the file first: a bad one needs no model
    path = Path(wanted.video)
    here, stage = run.opened(wanted.checkpoint)
    clip = clock.once("decode", lambda: here.sampling.read(path))

    # ---------------------------------------------------------------- who answers, looking how
    arms = here.config.eval.arms
    stage = stage or arms[here.config.eval.main].stage
    if stage not in here.config.stages:
        raise configs.ConfigError(f"--checkpoint: {stage!r} is not a stage of this run")
    view = here.view(wanted.view or here.config[stage].get("view", "full"))
    encoder, pool = run.chosen_encoder(here, wanted.encoder, wanted.pool)
    answer = single.ask(here, stage, view, path, clip, wanted.question, clock, wanted.memory, encoder, pool)

    # ---------------------------------------------------------------- say it
    print(answer.text)
    for event, score in answer.looked["retrieved_events"].items():
        begin, end = answer.entry.event_seconds[event]
        place = f"event {event + 1} of {len(answer.entry.event_spans)}"
        print(f"{place}: {begin:.2f} to {end:.2f} s, similarity {score:.3f}")
    print(f"visual tokens: {answer.tokens} of {answer.all_tokens}")
    for name, seconds in clock.parts.items():
        print(f"{name:>18}: {1000 * seconds:9.2f} ms")
    if wanted.picture:
        single.draw(wanted.picture, clip, answer, wanted.question)
        print(f"picture: {wanted.picture}")


if __name__ == "__main__":
    configs.run_main(main)
