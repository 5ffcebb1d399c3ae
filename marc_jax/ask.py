"""Ask about a video, or about all videos of a memory: the answer, the events it came from, the time of every part.

    python -m marc_jax.ask --memory=DIR --question="how many in blue stripes ?"                # the whole archive
    python -m marc_jax.ask --memory=DIR --video=FILE --question="..."                          # one video of it
    python -m marc_jax.ask --checkpoint=runs/quickstart --video=FILE --question="..."          # no memory

The memory is made by `marc_jax.index` and knows which run's model made it; nothing is decoded or encoded again.
--checkpoint is a run's folder (its main student answers), a stage's folder inside it, or a folder of published
Qwen2.5-VL weights. The question is asked once to
compile, then --repeat times; the times are those of the last. --picture=FILE.html is a timeline in one file,
--picture=FILE.png the film strip with what was merged into what.
"""

import os
from pathlib import Path

from absl import flags

from marc_jax import config as configs

flags.DEFINE_string("checkpoint", None, "A run, a stage of it, or published weights; default the memory's.")
flags.DEFINE_string("video", None, "Video file; default all of the memory.")
flags.DEFINE_string("question", None, "The question.")
flags.DEFINE_string("memory", None, "Folder of a memory.")
flags.DEFINE_string("encoder", None, "PE-Core, SigLIP 2 or a run whose retriever embeds; default: as the memory's.")
flags.DEFINE_enum("pool", None, ["mean", "max"], "An event: the mean of its frames, or its nearest frame.")
flags.DEFINE_string("shots", None, "Folder of TransNetV2 weights that divide videos; default: as the memory's.")
flags.DEFINE_float("decode_seconds", None, "How long decoding a file may take, default 1800.", lower_bound=1)
flags.DEFINE_string("view", None, "A view of the run's config; default that of the stage.")
flags.DEFINE_integer("max_new", None, "Most tokens of the answer; default the run's; published: 256.", lower_bound=1)
flags.DEFINE_bool("approx", False, "Search the archive by lax.approx_max_k: faster on TPU, may miss an event.")
flags.DEFINE_bool("key_frames", False, "Without a memory: choose events by key frames, decode those alone.")
flags.DEFINE_string("picture", "ask.html", "Where the picture goes, .html or .png; empty: none.")
flags.DEFINE_integer("repeat", 1, "How often the question is asked after it has been compiled.", lower_bound=1)


def main() -> None:
    wanted = flags.FLAGS
    if not wanted.question or not (wanted.video or wanted.memory):
        raise configs.ConfigError("--question=TEXT and --memory=FOLDER or --video=FILE are required")
    if wanted.picture and Path(wanted.picture).suffix not in (".html", ".png"):
        raise configs.ConfigError(f"--picture={wanted.picture}: the name ends neither in .html nor in .png")
    if wanted.picture and not Path(wanted.picture).absolute().parent.is_dir():
        raise configs.ConfigError(f"--picture={wanted.picture}: there is no such folder")

    from marc_jax.archive import Archive

    archive = Archive(
        wanted.memory, wanted.checkpoint or "", encoder=wanted.encoder or "", pool=wanted.pool or "",
        shots=wanted.shots or "", view=wanted.view or "", approx=wanted.approx, decode_seconds=wanted.decode_seconds,
        max_new=wanted.max_new, key_frames=wanted.key_frames,
    )  # fmt: skip
    archive.ask(wanted.question, wanted.video)
    answers = [archive.ask(wanted.question, wanted.video) for _ in range(wanted.repeat)]
    answer = answers[-1]

    print(answer.text)
    for event in answer.events:
        place = f"event {event.number} of {event.count}"
        if not wanted.video:
            gone = "" if os.path.isfile(event.video) else " (the file is gone)"
            place = f"{event.video}{gone}, {place}"
        print(f"{place}: {event.begin:.2f} to {event.end:.2f} s, similarity {event.score:.3f}")
    print(f"visual tokens: {answer.tokens} of {answer.all_tokens}")
    for name, seconds in answer.seconds.items():
        print(f"{name:>18}: {1000 * seconds:9.2f} ms")
    print(f"{'first token':>18}: {', '.join(f'{1000 * a.first_token:.2f}' for a in answers)} ms after the question")
    if wanted.picture:
        archive.draw(wanted.picture, answer)
        print(f"picture: {wanted.picture}")


if __name__ == "__main__":
    configs.run_main(main)
