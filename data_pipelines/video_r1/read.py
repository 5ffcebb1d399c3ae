"""The built set as a sequence of `sources.Record`s, random access, without TensorFlow.

    records = Stored("DATA/video_r1/1.0.0", "train")
    records[17]                          # sources.Record
    records.medium(17)                   # the encoded file, where the set holds it
"""

import json
import os
from collections.abc import Sequence

from data_pipelines import sources


class Stored(Sequence):
    """Records of one split. Pickles as its folder and split, so worker processes open the files themselves."""

    def __init__(self, folder, split: str = "train"):
        """Raises ValueError: no set there, or not this split."""
        self.folder, self.split, self._source = os.fspath(folder), split, None
        self._rows()

    def _rows(self):
        if self._source is None:
            import tensorflow_datasets as tfds

            try:
                self._source = tfds.builder_from_directory(self.folder).as_data_source(self.split)
            except Exception as error:  # TFDS raises many kinds for a missing or foreign folder
                raise ValueError(f"{self.folder}: no set with a split {self.split!r} there ({error})") from None
        return self._source

    def __getstate__(self) -> dict:
        return vars(self) | {"_source": None}

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, i: int) -> sources.Record:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = self._rows()[i % len(self)]
        texts = {name: _text(row[name]) for name in ("problem", "data_type", "problem_type", "solution", "process",
                                                      "path", "data_source")}  # fmt: skip
        return sources.Record(
            **texts, problem_id=json.loads(_text(row["problem_id"])), extra=json.loads(_text(row["extra"])),
            options=tuple(map(_text, row["options"])), row=int(row["row"]),
        )  # fmt: skip

    def medium(self, i: int) -> bytes | None:
        """The encoded file of row i; None where the set holds paths only."""
        return self._rows()[i]["medium"].tobytes() or None


def _text(value) -> str:
    return value if isinstance(value, str) else value.decode("utf-8")
