"""Index videos into a memory on disk: once per video, for any number of later questions.

    python -m marc_jax.index VIDEO_OR_FOLDER... --memory=DIR --checkpoint=runs/quickstart
    python -m marc_jax.index VIDEO_OR_FOLDER... --memory=DIR --checkpoint=Qwen2.5-VL-3B --encoder=weights/pe-l14

Folders are searched for videos by the endings of their names. A video that is there already, unchanged, is skipped,
whatever its name; one that cannot be read is reported, and the others go on. A run that was stopped or killed goes on
with the same command. Events are embedded by the run's own retriever, or by PE-Core, SigLIP 2 or another run's
retriever (--encoder=FOLDER), and divided without weights, or by TransNetV2 (--shots=FOLDER); the memory remembers
which, so ask need not be told. Files are decoded in child processes: one that takes longer than --decode_seconds or
kills its decoder has failed.

Exit code: 0 all are in the memory, 1 some could not be read, 2 none could or the command is wrong, 130 or 143
when stopped by Ctrl-C or SIGTERM.
"""

import os
import sys

from absl import flags

from marc_jax import config as configs

flags.DEFINE_string("checkpoint", None, "A run or published weights; default what the memory was made with.")
flags.DEFINE_string("memory", None, "Folder of the memory; made if absent.")
flags.DEFINE_string("encoder", None, "PE-Core, SigLIP 2 or a run whose retriever embeds; default: config.encoder.path.")
flags.DEFINE_enum("pool", None, ["mean", "max"], "An event: the mean of its frames, or its nearest frame.")
flags.DEFINE_string("shots", None, "Folder of TransNetV2 weights that divide videos (tools.convert_transnetv2).")
flags.DEFINE_enum("tokens", "keep", ["keep", "float32", "bfloat16", "int8"], "How visual tokens are stored.")
flags.DEFINE_integer("workers", 2, "Processes that decode, ahead of the model; 0: one, when the model waits for it.")
flags.DEFINE_float("decode_seconds", None, "How long decoding one file may take, default 1800.", lower_bound=1)
flags.DEFINE_list("videos", [], "Video files or folders too, separated by commas.")


def main(arguments: list[str]) -> int:
    wanted = flags.FLAGS
    places = [*arguments, *wanted.videos]
    if not wanted.memory or not places:
        raise configs.ConfigError("VIDEO_OR_FOLDER... and --memory=FOLDER are required")

    from data_pipelines.folders import find_videos
    from marc_jax import metrics
    from marc_jax.archive import Archive
    from marc_jax.interrupt import Interrupt

    archive = Archive(
        wanted.memory, wanted.checkpoint or "", encoder=wanted.encoder or "", pool=wanted.pool or "",
        shots=wanted.shots or "", decode_seconds=wanted.decode_seconds,
    )  # fmt: skip
    found = find_videos(places)
    with Interrupt() as interrupt, metrics.Progress("index", found.total) as bar:

        def progress(done, _, so_far):
            rate = so_far.frames / max(so_far.seconds, 1e-9)
            bar.update(done, frames_per_s=rate, events=so_far.events, failed=len(so_far.failed))

        def report(name, reason):
            print(f"error: {name}: {reason}", file=sys.stderr)

        done = archive.index(
            found, workers=wanted.workers, tokens=wanted.tokens, progress=progress, report=report,
            stop=interrupt.requested,
        )  # fmt: skip
        if done.stopped:
            so_far = f"stopped after {len(done.new)} new videos, which are in {wanted.memory}"
            raise configs.Stopped(so_far, 128 + interrupt.received)
    print(summary(done, wanted.memory))
    return 0 if not done.failed else 1 if done.new or done.same else 2


def summary(done, memory: str) -> str:
    """The last words: what is in the memory, how fast it came there, what it takes, what failed."""
    there = len(done.new) + len(done.same)
    copies = sum(video != os.path.realpath(name) for name, video in done.same.items())
    counts = f"{len(done.new)} new, {len(done.same) - copies} there before, {copies} copies of others"
    lines = [f"{there} of {done.videos} videos in {memory}: {counts}"]
    if done.new:
        hours = done.video_seconds / 3600
        size = f"{done.bytes / hours / 1e6:,.1f} MB per hour of video" if hours else f"{done.bytes} bytes"
        lines.append(
            f"{done.frames} frames, {done.frames / done.seconds:.1f} frames/s, {done.events} events, {size}, "
            f"{done.seconds:.1f} s"
        )
    if done.failed:
        lines.append(f"{len(done.failed)} failed:")
        lines += [f"  {name}: {reason}" for name, reason in done.failed.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    configs.run_main(main, arguments=True)
