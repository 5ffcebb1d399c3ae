"""Index videos into a memory on disk: once per video, for any number of later questions.

    python -m marc_jax.index --checkpoint=runs/quickstart --memory=/data/memory VIDEO [VIDEO ...]

Events are embedded by the run's own retriever, or by PE-Core or SigLIP 2 (--encoder=FOLDER; ask with the same).
A video that is already there, unchanged, is skipped; one that cannot be read is reported, and the others go on.
"""

import sys
import time
from pathlib import Path

from absl import flags

from marc_jax import config as configs

flags.DEFINE_string("checkpoint", None, "Folder of a run.")
flags.DEFINE_string("memory", None, "Folder of the memory; made if absent.")
flags.DEFINE_string("encoder", None, "Folder of PE-Core or SigLIP 2 weights that embed; default: config.encoder.path.")
flags.DEFINE_enum("pool", None, ["mean", "max"], "An event: the mean of its frames, or its nearest frame.")
flags.DEFINE_list("videos", [], "Video files, separated by commas.")


def main() -> int:
    if not flags.FLAGS.checkpoint or not flags.FLAGS.memory or not flags.FLAGS.videos:
        raise configs.ConfigError("--checkpoint=FOLDER, --memory=FOLDER and --videos=FILE[,FILE...] are all required")

    from data_pipelines.video import VideoError
    from marc_jax import metrics, run
    from marc_jax.memory import indexer, store

    here, _ = run.opened(flags.FLAGS.checkpoint)
    encoder, pool = run.chosen_encoder(here, flags.FLAGS.encoder, flags.FLAGS.pool)
    params = here.parameters(here.config.eval.teacher)
    worker = indexer.Indexer(here.cfg, params, here.retriever, here.sampling, encoder=encoder, pool=pool)
    bad, begun, videos = 0, time.monotonic(), flags.FLAGS.videos
    with (
        store.MemoryWriter(flags.FLAGS.memory, worker.fingerprint) as writer,
        metrics.Progress("index", len(videos)) as bar,
    ):
        for i, name in enumerate(videos):
            try:
                key = str(Path(name).resolve())
                if key not in writer:
                    writer.add(key, worker.file(name))
            except VideoError as error:
                bad += 1
                print(f"error: {error}", file=sys.stderr)
            bar.update(i + 1, unreadable=bad)
    print(f"{len(videos) - bad} of {len(videos)} videos in {flags.FLAGS.memory}, {time.monotonic() - begun:.1f} s")
    return 2 if bad else 0


if __name__ == "__main__":
    configs.run_main(main)
