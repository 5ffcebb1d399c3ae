"""Builds the data set; also `python -m data_pipelines.video_r1`.

    build("Video-R1-260k.json", root="VIDEOS", out="DATA")          # DATA/video_r1/1.0.0/*.array_record

Every row of the question file becomes one example: Video-R1's fields, the rest of the row as JSON, and the medium's
path or, with `media="bytes"`, the encoded file itself. Pictures and frames are never stored decoded: TFDS' Image and
Video features need TensorFlow, and the readers here decode better.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import sources
from data_pipelines.benchmarks.read import BadRows
from data_pipelines.rows import RecordError

NAME = "video_r1"
MEDIA = ("path", "bytes")
TEXTS = ("problem_id", "problem", "data_type", "problem_type", "solution", "process", "path", "data_source", "extra")


class VideoR1(tfds.core.GeneratorBasedBuilder):
    """Records of `sources`, in their order."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)  # TFDS 4.9.10 would ask a package that it does not require (importlib_resources)

    def __init__(self, splits: dict[str, Sequence[sources.Record]], root: str, media: str = "path", **options):
        self._records, self._root, self._media = splits, root, media
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
        features = {name: text for name in TEXTS} | {"options": tfds.features.Sequence(text), "row": number}
        features["medium"] = tfds.features.Tensor(shape=(None,), dtype=np.uint8)  # empty where only the path is kept
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(records) for split, records in self._records.items()}

    def _generate_examples(self, records: Sequence[sources.Record]):
        for i, record in enumerate(records):
            yield i, example(record, self._root, self._media)


def example(record: sources.Record, root: str, media: str) -> dict:
    """A record as TFDS stores it. `problem_id` is kept as JSON, so that 7 and "7" stay apart."""
    texts = {name: getattr(record, name) for name in TEXTS if name not in ("problem_id", "extra")}
    medium = b""
    if media == "bytes":
        with open(sources.media_path(root, record.path), "rb") as file:
            medium = file.read()
    return texts | {
        "problem_id": json.dumps(record.problem_id), "extra": json.dumps(record.extra, ensure_ascii=False),
        "options": list(record.options), "row": record.row, "medium": np.frombuffer(medium, np.uint8),
    }  # fmt: skip


def build(
    file, *, root: str, out, split: str = "train", media: str = "path", skip_bad: bool = False
) -> tuple[Path, list[RecordError]]:
    """Builds <out>/video_r1/1.0.0 of one question file.

    Args:
      root: folder that the paths are relative to; every medium must lie there.
      split: its name in the set.
      media: "path", or "bytes" to put the encoded files into the set.
      skip_bad: leave out rows that cannot be used instead of stopping.
    Returns:
      (folder of the set, errors of rows left out).
    Raises:
      BadRows: rows that cannot be used, all of them. RecordError: a file that cannot be read. FileExistsError: a set is
        there already. Nothing half-written stays behind.
    """
    if media not in MEDIA:
        raise ValueError(f"media {media!r} is not one of {', '.join(MEDIA)}")
    target = Path(out) / NAME / str(VideoR1.VERSION)
    if target.exists():
        raise FileExistsError(f"{target} is there already; remove it, or give another folder")
    errors: list[RecordError] = []
    records = []
    for record in sources.load_records(file, errors=errors):
        try:
            sources.media_path(root, record.path)
            records.append(record)
        except ValueError as error:
            errors.append(RecordError(file, record.row, "path", str(error), record.line))
    errors.sort(key=lambda error: error.row)
    if errors and not (skip_bad and records):
        raise BadRows(os.fspath(file), errors, len(records) + len(errors))
    builder = VideoR1({split: records}, root, media, data_dir=os.fspath(out))
    with _cleaned(target):
        builder.download_and_prepare(file_format="array_record")
    return target, errors


@contextlib.contextmanager
def _cleaned(target: Path):
    """Removes what TFDS leaves of a set that was not finished."""
    try:
        yield
    except BaseException:
        for left in target.parent.glob(f"{target.name}.incomplete*") if target.parent.is_dir() else ():
            shutil.rmtree(left, ignore_errors=True)
        raise
