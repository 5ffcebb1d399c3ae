"""Questions in the caller's own words about files anywhere: what another evaluation harness calls.

    direct = Direct("Qwen2.5-VL-3B-Instruct", "out/memory", view="whole")
    direct.answer([("What happens?", "/data/clip.mp4"), ...], max_new_tokens=64)     # texts, in this order

The text is put to the model as it is, in one user turn behind the video or image; answers are greedy.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines import sources
from marc_jax import records, settings
from marc_jax.config import ConfigError
from marc_jax.evaluation import run
from marc_jax.evaluation.harness import surroundings
from marc_jax.view_settings import unknown

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Direct:
    """A checkpoint, loaded once; what files give is kept in `workdir` for later questions."""

    def __init__(
        self, checkpoint: str, workdir, *, view: str = "full", encoder: str = "", fps: float = 2.0,
        max_frames: int = 64, frame_tokens: int = 128, question_tokens: int = 2048, batch: int = 8,
        dtype: str = "bfloat16",
    ):  # fmt: skip
        """Args:
        checkpoint: a folder of published weights, of a converted checkpoint, or of a training stage.
        view: one of `settings.published`; "marc" and "per_event" retrieve and need `encoder`, a folder of PE-Core or
          SigLIP 2 weights.
        fps, max_frames, frame_tokens: how frames are taken; question_tokens: the longest text.

        Raises ConfigError, WeightsError, TokenizerError: one line.
        """
        config = settings.published(str(checkpoint)).unlock()
        if wrong := unknown("view", view, tuple(config.views)):
            raise ConfigError(*wrong)
        if config.views[view].select == "retrieve" and not encoder:
            raise ConfigError(f"view {view!r} retrieves: name an encoder's folder")
        buckets = tuple(dict.fromkeys(max(max_frames // 2 // d, 1) for d in (8, 4, 2, 1)))
        config.data.update(test="questions asked one by one", root=os.sep, fps=fps, max_frames=max_frames)
        config.data.update(frame_tokens=frame_tokens, question_tokens=question_tokens, buckets=buckets)
        config.model.update(dtype=dtype, frozen_dtype=dtype)
        config.mesh.update(data=-1, fsdp=1)
        config.encoder.path, config.eval.batch = encoder, batch
        config.eval.arms, config.eval.claims = ConfigDict(), ConfigDict()
        settings.validate(config)
        Path(workdir).mkdir(parents=True, exist_ok=True)
        self.here = surroundings(config, Path(workdir))
        self.params, self.view = self.here.parameters(""), view

    def answer(self, questions: Sequence[tuple[str, str]], max_new_tokens: int = 128) -> list[str]:
        """One text per (question, file).

        Raises ConfigError: a file that cannot be used or a text that is too long, with the first one's reason.
        """
        if max_new_tokens != self.here.config.max_new_tokens:
            self.here.config.max_new_tokens = max_new_tokens
            self.here.compiled.clear()
        asked = [_record(i, text, path) for i, (text, path) in enumerate(questions)]
        test = records.over_memory(self.here, "questions", asked, "plain")
        lengths = test.lengths()
        order = sorted(range(len(asked)), key=lambda i: (lengths[i][0], len(asked[i].problem)))
        said = [""] * len(asked)
        for chosen, rows in run.answers(self.here, self.params, self.view, "features", test, "answers", order):
            for i, row in zip(chosen, rows, strict=True):
                said[i] = row["completion"]
        return said


def _record(row: int, text: str, path: str) -> sources.Record:
    kind = "image" if Path(path).suffix.lower() in IMAGES else "video"
    name = os.path.relpath(os.path.abspath(path), os.sep)
    return sources.Record(row, text, kind, "free-form", (), "<answer></answer>", name, row=row)
