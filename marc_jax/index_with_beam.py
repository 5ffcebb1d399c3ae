"""Index a corpus with Apache Beam: what `marc_jax.index` does to files, on as many workers as a runner has.

    python -m marc_jax.index_with_beam VIDEO_OR_FOLDER... --memory=DIR --checkpoint=RUN [--BEAM_FLAG=VALUE ...]
    python -m marc_jax.index_with_beam /data/videos --memory=/data/memory --checkpoint=runs/quickstart \\
        --runner=FnApiRunner --direct_running_mode=multi_processing --direct_num_workers=4

Videos, memory and weights are paths that every worker sees. Each list of --batch files goes through `Archive.index`:
what is there already is skipped, what cannot be read is counted and named in --failed, and a list is safe in the memory
when it is done, so the same command goes on after anything. Flags that are not below are Beam's, written --FLAG=VALUE.

Exit code: 0 all are in the memory, 1 some could not be read, 2 none could or the command is wrong.
"""

import argparse
import dataclasses
import functools
import json
import sys
import threading
from collections.abc import Iterator

from data_pipelines.folders import find_videos
from marc_jax import config as configs

COUNTED = ("new", "same", "failed", "frames", "events", "bytes")
_one_at_a_time = threading.Lock()  # a worker process may run several threads; they share one model


@dataclasses.dataclass(frozen=True)
class Task:
    """What every worker is told; see `archive.Archive` and `Archive.index`."""

    memory: str
    checkpoint: str
    encoder: str
    pool: str
    shots: str
    decode_seconds: float | None
    tokens: str
    workers: int


@functools.lru_cache(maxsize=1)
def _archive(task: Task):
    """One per process: loaded and compiled once."""
    from marc_jax.archive import Archive

    return Archive(
        task.memory, task.checkpoint, encoder=task.encoder, pool=task.pool, shots=task.shots,
        decode_seconds=task.decode_seconds,
    )  # fmt: skip


def lists(places: list[str], batch: int) -> Iterator[list[str]]:
    """All files of these places in lists of `batch`; a place without videos stands as it is, to fail by name."""
    files, failed = find_videos(places)
    files += failed
    yield from (files[i : i + batch] for i in range(0, len(files), batch))


def index(names: list[str], task: Task) -> Iterator[dict]:
    """Adds files to the memory and counts them; yields {path, reason} of those that could not be.

    What the user has to mend (a memory of another model, no such checkpoint) is every file's reason: a runner's retries
    would not mend it.
    """
    from apache_beam.metrics import Metrics

    counts, failed = dict.fromkeys(COUNTED, 0), {}
    with _one_at_a_time:
        try:
            done = _archive(task).index(names, tokens=task.tokens, workers=task.workers)
        except Exception as e:
            if not isinstance(getattr(e, "exit_code", None), int):
                raise
            failed = dict.fromkeys(names, str(e))
        else:
            failed = done.failed
            counts |= {"new": len(done.new), "same": len(done.same)}
            counts |= {"frames": done.frames, "events": done.events, "bytes": done.bytes}
    counts["failed"] = len(failed)
    for name, count in counts.items():
        Metrics.counter("marc_jax", name).inc(count)
    for path, reason in failed.items():
        yield {"path": path, "reason": reason}


def build(pipeline, places: list[str], task: Task, batch: int, failed: str) -> None:
    """Appends the steps to a beam.Pipeline."""
    import apache_beam as beam

    _ = (
        pipeline
        | "Places" >> beam.Create([places])
        | "Files" >> beam.FlatMap(lists, batch)
        | "Spread" >> beam.Reshuffle()
        | "Index" >> beam.FlatMap(index, task)
        | "Text" >> beam.Map(json.dumps, ensure_ascii=False)
        | "Failed" >> beam.io.WriteToText(failed, shard_name_template="")
    )


def counters(result) -> dict[str, int]:
    """The pipeline's counts by the names of `COUNTED`; committed ones where the runner tells them apart."""
    from apache_beam.metrics import MetricsFilter

    found = result.metrics().query(MetricsFilter().with_namespace("marc_jax"))["counters"]
    return dict.fromkeys(COUNTED, 0) | {c.key.metric.name: c.result for c in found if c.result is not None}


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(our flags, files and folders, Beam's flags)."""
    about, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="python -m marc_jax.index_with_beam VIDEO_OR_FOLDER... --memory=DIR [--FLAG=VALUE ...]",
        description=about, epilog=rest, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--memory", required=True, help="folder of the memory; made if absent")
    parser.add_argument("--checkpoint", default="", help="folder of a run; default the one the memory was made with")
    parser.add_argument("--encoder", default="", help="PE-Core, SigLIP 2 or a run whose retriever embeds")
    parser.add_argument("--pool", choices=["", "mean", "max"], default="", help="an event: its mean or nearest frame")
    parser.add_argument("--shots", default="", help="folder of TransNetV2 weights that divide videos")
    parser.add_argument("--tokens", choices=["keep", "float32", "bfloat16", "int8"], default="keep")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode for each worker process")
    parser.add_argument("--decode_seconds", type=float, help="how long decoding one file may take, default 1800")
    parser.add_argument("--batch", type=int, default=64, help="files that are one piece of work, and one shard")
    parser.add_argument("--failed", help="JSON lines {path, reason}; default MEMORY/failed.jsonl")
    known, rest = parser.parse_known_args(argv)
    places = [argument for argument in rest if not argument.startswith("-")]
    if not places:
        parser.error("VIDEO_OR_FOLDER... is required")
    if known.batch < 1:
        parser.error(f"--batch={known.batch} must be at least 1")
    return known, places, [argument for argument in rest if argument.startswith("-")]


def main(argv: list[str] | None = None) -> int:
    known, places, beams = arguments(sys.argv[1:] if argv is None else argv)
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        reason = f"{e}; pip install 'marc_jax[beam]' -c requirements/constraints-beam.txt"
        raise configs.UserError(f"{reason}, in an environment of its own") from None
    task = Task(*(getattr(known, field.name) for field in dataclasses.fields(Task)))
    failed = known.failed or f"{known.memory.rstrip('/')}/failed.jsonl"
    pipeline = beam.Pipeline(options=PipelineOptions(beams))
    build(pipeline, places, task, known.batch, failed)
    result = pipeline.run()
    result.wait_until_finish()
    count = counters(result)
    there = count["new"] + count["same"]
    print(f"{there} of {there + count['failed']} videos in {known.memory}: {count['new']} new, {count['same']} there "
          f"before\n{count['frames']} frames, {count['events']} events, {count['bytes']} bytes")  # fmt: skip
    if count["failed"]:
        print(f"{count['failed']} failed; their reasons are in {failed}")
    return 0 if not count["failed"] else 1 if there else 2


if __name__ == "__main__":
    from marc_jax import index_with_beam  # workers find what they run by this name, not as __main__

    configs.run_main(index_with_beam.main, argv=sys.argv[:1])
