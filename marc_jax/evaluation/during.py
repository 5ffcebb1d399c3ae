"""Evaluation while a stage trains: the same held-out questions at every budget the stage knows, greedily.

The synthetic set's are about videos of training scenes set side by side as no step does; on files they are the first of
`config.watch.file`, which no stage may train on. One number per view every so many steps: the retention curve.
"""

import jax.numpy as jnp
import numpy as np

from marc_jax import grades, records, settings, stage_settings
from marc_jax.batches import Asked
from marc_jax.evaluation import run as arms
from marc_jax.memory.view import SELECTORS
from marc_jax.rl import answers
from marc_jax.run import Run
from marc_jax.stage_parts import prompts_of


def questions(run: Run, name: str) -> tuple[Asked, object]:
    """(config.watch.questions held-out questions of a stage, one per video, the source they are from).

    Their number is what is asked for, up to a multiple of the devices a batch is split over.
    """
    stage, watch = run.config[name], run.config.watch
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    count = -(-watch.questions // ways) * ways
    if not settings.on_files(run.config):
        source = run.sources[stage.file]
        return source.draw(f"{name}/held out", 0, count, 1, stage.events, stage.types), source
    key = ("watch", watch.file)
    if key not in run.sources:
        run.sources[key] = records.open_records(run, watch.file, "eval")
    source = run.sources[key]
    return source.asked(np.arange(count) % len(source.records)), source


class During:
    """(state, step) -> (metrics, rows for the table): `eval/VIEW/accuracy`, `tokens`, and `eval/retention`, the
    student's accuracy by the accuracy at every token."""

    def __init__(self, run: Run, name: str):
        stage = run.config[name]
        self.run, self.stage, self.bank = run, stage, None
        self.asked, source = questions(run, name)
        self.full = stage.get("teacher_view", "full")
        names = (*stage_settings.ladder(stage), *([self.full] if self.full in run.views else []))
        self.sizes = source.sizes
        self.views = {name: run.view(name) for name in dict.fromkeys(names) if run.view(name).select not in SELECTORS}
        self.inputs = {name: prompts_of(run, self.asked, view) for name, view in self.views.items()}

    def __call__(self, state, step: int) -> tuple[dict, list[dict]]:
        told, rows, right = {}, [], {}
        if self.bank is None and not settings.on_files(self.run.config):
            self.bank = self.run.bank(self.stage.visual, state.model)
        for name, (own, index, queries, prompt, ids_b) in self.inputs.items():
            answer = arms.make_answerer(self.run, self.views[name], self.sizes)
            looked_at = self.bank if own is None else own, None, index, queries
            done, read_b = answer(state.model, self.run.retriever, *looked_at, prompt=prompt, ids_b=ids_b)
            texts_bg = grades.completion_texts(self.run, done)
            right[name] = right_b = self._accuracy(texts_bg)
            told[f"eval/{name}/accuracy"] = (float(right_b.sum()), float(len(right_b)))
            told[f"eval/{name}/tokens"] = jnp.mean(read_b)
            rows += [{"view": name, **row} for row in grades.rows(self.asked, texts_bg, accuracy=right_b)]
        student, teacher = (right[name].sum() if name in right else 0.0 for name in (self.stage.view, self.full))
        if teacher and self.stage.view != self.full:
            told["eval/retention"] = (float(student), float(teacher))
        return told, rows

    def _accuracy(self, texts_bg) -> np.ndarray:
        pairs = zip(texts_bg, self.asked.questions_bg, strict=True)
        return np.array([answers.accuracy(said[0], row[0].solution, row[0].problem_type) for said, row in pairs])
