"""The teacher's accuracy on each question, a_full, computed once and kept on disk.

One JSON line per question: sample id, hash of the teacher's weights, sampling settings, the G accuracies. Lines are
only ever appended, each by a single write, so a run that is killed loses at most its last line.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from marc_jax import sharding


def weights_hash(params: Mapping) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and bytes of a nested or flat dict of arrays.

    Brings one array at a time to the host; a collective where they are split over processes. Nesting and order do not
    matter.
    """
    digest = hashlib.sha256()
    for path, value in sorted(_flat(params)):
        value = np.asarray(sharding.fetch(value))
        digest.update(f"{path} {value.shape} {value.dtype.name};".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]


def _flat(tree: Mapping, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


class TeacherCache:
    """Accuracies of one teacher under one setting, read from and appended to a JSONL file shared by all of them.

    Attributes:
      path: the file; its folder is made when the first line is written.
      weights: hash of the teacher's weights.
      settings: whatever else the numbers depend on: a JSON-able dict, or a dataclass (Sampling), with the number of
        rollouts, the seed, the budget of frames ...
    """

    def __init__(self, path, weights: str, settings):
        self.path, self.weights = pathlib.Path(path), weights
        settings = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        self._accuracies: dict[str, list[float]] = {}
        self.skipped_lines = 0
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["weights"] == self.weights and row["settings"] == self.settings:
                    self._accuracies[row["sample"]] = [float(x) for x in row["accuracy"]]
            except (ValueError, KeyError, TypeError):
                self.skipped_lines += 1  # cut short by a kill: that question is computed again

    def __len__(self) -> int:
        return len(self._accuracies)

    def __contains__(self, sample) -> bool:
        return str(sample) in self._accuracies

    def a_full(self, samples: Sequence) -> np.ndarray:
        """float64 [B]: mean accuracy of the teacher's rollouts on each sample; NaN where unknown."""
        known = (self._accuracies.get(str(sample)) for sample in samples)
        return np.array([float(np.mean(x)) if x else math.nan for x in known])

    def missing(self, samples: Sequence) -> list:
        """The samples without an entry, each once, in order."""
        return [sample for sample in dict.fromkeys(samples) if str(sample) not in self._accuracies]

    def add(self, samples: Sequence, accuracy_bg) -> None:
        """Appends the accuracies of B samples' G rollouts and flushes them to the disk.

        Raises:
          ValueError: an accuracy is outside [0, 1] or NaN, or the row counts differ; nothing is then written.
        """
        accuracy_bg = np.asarray(accuracy_bg, np.float64)
        if accuracy_bg.ndim != 2 or len(samples) != accuracy_bg.shape[0]:
            raise ValueError(f"{len(samples)} samples for accuracies of shape {accuracy_bg.shape}")
        if not ((accuracy_bg >= 0) & (accuracy_bg <= 1)).all():
            raise ValueError("the teacher's accuracies must lie in [0, 1]")
        rows = {str(s): [round(float(a), 6) for a in row] for s, row in zip(samples, accuracy_bg, strict=True)}
        key = {"weights": self.weights, "settings": self.settings}
        if jax.process_index() == 0:  # of several processes all have the same rows
            self._append([{"sample": sample, "accuracy": row, **key} for sample, row in rows.items()])
        self._accuracies.update(rows)

    def _append(self, rows: list[dict]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        with open(self.path, "ab+", buffering=0) as file:
            if file.tell() and _last_byte(file) != b"\n":
                text = "\n" + text  # after a line that was cut short
            file.write(text.encode())
            os.fsync(file.fileno())

    def fill(self, samples: Sequence, compute: Callable[[list], np.ndarray], batch: int = 64) -> np.ndarray:
        """a_full of the samples; those without an entry are computed `batch` at a time and written at once.

        Args:
          samples: ids.
          compute: ids -> accuracies [len(ids), G] of the teacher's rollouts.
          batch: how many to compute per call.
        """
        todo = self.missing(samples)
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            self.add(part, compute(part))
        return self.a_full(samples)


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
