"""Events of a file by TransNetV2: every frame at the file's own rate, shot borders as times, spans in patches.

    shots = Shots.load("weights/transnetv2")           # made by tools/convert_transnetv2.py
    shots.borders("film.mp4")                          # seconds at which each shot but the first begins, and the
                                                       # begin and end of the transition to it

It sees cuts and gradual transitions, not changes inside one take: `memory.events` is the default.
"""

from collections.abc import Callable

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
        network = store.tree_sha256(jax.device_get(params))
        self.fingerprint = f"transnetv2, threshold {threshold}, {events.FINGERPRINT}, {network}"

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

    def borders(self, path, read: Callable = video.read_frames) -> np.ndarray:
        """float64 [E - 1, 3] in seconds: when each shot but the first begins, and its transition's first frame and end.

        A gradual transition divides the shots at its middle; a cut is over when it begins. `read` is called in place of
        `video.read_frames`.

        Raises VideoError as `video.read_frames`.
        """
        clip = read(path, fps=None, resize=(self.cfg.height, self.cfg.columns))
        count = int(clip.index[-1]) + 1  # without the repeated last frame of an odd number
        one_hot, _ = transnetv2.predict(self.cfg, self.params, clip.frames[:count], batch=self.batch)
        scenes = transnetv2.scenes(one_hot, self.threshold)
        return clip.seconds[np.stack([middles(scenes), scenes[:-1, 1] + 1, scenes[1:, 0]], axis=1)]

    def spans(
        self, path, seconds_f: np.ndarray, options: events.Options | None = None, read: Callable = video.read_frames
    ) -> list[tuple[int, int]]:
        """Event spans [start, end) in temporal patches of frames shown at `seconds_f`; as `events.segment`."""
        return spans_of_times(self.borders(path, read), seconds_f, options)


def middles(scenes_e2: np.ndarray) -> np.ndarray:
    """First frame of each scene but the first, transitions divided in the middle: int [E - 1]."""
    return (scenes_e2[:-1, 1] + scenes_e2[1:, 0] + 1) // 2


def spans_of_times(borders_s3, seconds_f, options: events.Options | None = None) -> list[tuple[int, int]]:
    """Borders in seconds (`Shots.borders`) -> spans in patches of the frames shown at `seconds_f`, as `events.segment`.

    A shot begins with the first of these frames that is not before it. Events shorter than `options.min_len` join the
    one before, longer than `max_len` are cut.
    """
    options = options or events.Options()
    found, patch, last = [], options.frames_per_patch, 0
    for times in np.asarray(borders_s3).reshape(-1, 3):
        border = events.Border(*np.searchsorted(seconds_f, times - 1e-6).tolist())
        if border.frame // patch - last >= options.min_len:
            found.append(border)
            last = border.frame // patch
    return events.spans(found, len(seconds_f), options)
