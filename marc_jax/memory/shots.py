"""Events of a file by TransNetV2: every frame at the file's own rate, shot borders as times, spans in patches.

    shots = Shots.load("weights/transnetv2")           # made by tools/convert_transnetv2.py
    shots.borders("film.mp4")                          # seconds at which each shot but the first begins

It sees cuts and gradual transitions, not changes inside one take: `memory.events` is the default.
"""

import dataclasses

import jax
import numpy as np

from data_pipelines import video
from marc_jax import checkpoint
from marc_jax.memory import events, store
from marc_jax.models import transnetv2


class Shots:
    """TransNetV2 over whole files; compiled once.

    Attributes:
      fingerprint: what a memory made with it depends on.
    """

    def __init__(self, cfg: transnetv2.Config, params: dict, *, threshold: float = 0.5, batch: int = 8):
        self.cfg, self.params, self.threshold, self.batch = cfg, params, threshold, batch
        self.fingerprint = {"transnetv2": store.tree_sha256(jax.device_get(params)), "threshold": threshold}

    @classmethod
    def load(cls, folder, *, threshold: float = 0.5, batch: int = 8) -> "Shots":
        """From a checkpoint of converted weights. CheckpointError: none there, damaged, or of another model."""
        steps = checkpoint.steps(folder)
        if not steps:
            raise checkpoint.CheckpointError(f"no checkpoint in {folder}; make one with tools.convert_transnetv2")
        model = dict(checkpoint.read_meta(folder, steps[-1]).get("model", {}))
        if model.pop("model_type", None) != "transnetv2":
            raise checkpoint.CheckpointError(f"{folder} holds no TransNetV2; make one with tools.convert_transnetv2")
        cfg = transnetv2.Config(**model)
        tree, _ = checkpoint.restore(folder, {"params": transnetv2.abstract(cfg)}, steps[-1])
        return cls(cfg, tree["params"], threshold=threshold, batch=batch)

    def borders(self, path) -> np.ndarray:
        """float64 [E - 1]: when each shot but the first begins [s]; a gradual transition counts at its middle.

        Raises VideoError as `video.read_frames`.
        """
        clip = video.read_frames(path, fps=None, resize=(self.cfg.height, self.cfg.columns))
        count = int(clip.index[-1]) + 1  # without the repeated last frame of an odd number
        one_hot, _ = transnetv2.predict(self.cfg, self.params, clip.frames[:count], batch=self.batch)
        return clip.seconds[middles(transnetv2.scenes(one_hot, self.threshold))]

    def spans(self, path, seconds_t: np.ndarray, options: events.Options | None = None) -> list[tuple[int, int]]:
        """Event spans [start, end) in temporal patches that begin at `seconds_t`; as `events.segment`."""
        return spans_of_times(self.borders(path), seconds_t, options)


def middles(scenes_e2: np.ndarray) -> np.ndarray:
    """First frame of each scene but the first, transitions divided in the middle: int [E - 1]."""
    return (scenes_e2[:-1, 1] + scenes_e2[1:, 0] + 1) // 2


def spans_of_times(borders_s, seconds_t, options: events.Options | None = None) -> list[tuple[int, int]]:
    """Borders in seconds -> spans in patches; a border inside a patch gives that patch to the new event.

    Events shorter than `options.min_len` join the one before, longer than `max_len` are cut.
    """
    options = options or events.Options()
    seconds = np.asarray(seconds_t)
    found = []
    for patch in (np.searchsorted(seconds, np.asarray(borders_s) + 1e-6, side="right") - 1).tolist():
        if patch - (found[-1] if found else 0) >= options.min_len:
            found.append(patch)
    plain = dataclasses.replace(options, frames_per_patch=1)
    return events.spans(found, len(seconds), plain)
