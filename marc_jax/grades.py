"""Completions judged on the host: the reward functions of a stage over decoded texts, and what is told of them."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from marc_jax import sharding
from marc_jax.config import ConfigError
from marc_jax.rl import rewards
from marc_jax.rl.types import Completions
from marc_jax.run import Run

SPOKEN = 3  # failures said on stderr in a step; all are in the file


@dataclasses.dataclass(frozen=True)
class Grades:
    """Of B groups of G completions.

    Attributes:
      texts_bg: decoded, special tokens skipped.
      accuracy_bg: float32 [B, G], of the first reward function: what retention compares.
      reward_bg: float32 [B, G], weighted sum of all, with Video-R1's bonuses where a stage has some.
      told: metrics.
      values_bgf: float64 [B, G, F] of the functions `names`; NaN where one does not apply.
    """

    texts_bg: list[list[str]]
    accuracy_bg: np.ndarray
    reward_bg: np.ndarray
    told: dict
    values_bgf: np.ndarray
    names: tuple[str, ...]


class Grader:
    """A stage's reward functions: `rewards` (names of ours, or package.module:function) with `reward_weights`.

    Raises ConfigError: a function that cannot be imported.
    """

    def __init__(self, run: Run, name: str):
        stage = run.config[name]
        self.run, self.seconds = run, stage.reward_seconds or None
        self.folder = run.workdir / name
        paths = tuple(stage.rewards)
        weights = dict(zip(paths, stage.reward_weights or [1.0] * len(paths), strict=True))
        try:
            self.terms = rewards.reward_terms(weights)
        except ValueError as e:
            raise ConfigError(f"config.{name}.rewards: {e}") from None

    def __call__(self, done: Completions, asked) -> Grades:
        """Judges completions about `asked`, one question per video. What fails is told, and scores 0."""
        texts_bg = completion_texts(self.run, done)
        b, g = len(texts_bg), len(texts_bg[0])
        texts = [text for group in texts_bg for text in group]
        table = rewards.score(self.terms, texts, columns(asked, g), self.seconds)
        self._report(table.failures, asked, g)
        values_bgf = table.values_nf.reshape(b, g, -1)
        told = {"rewards/failed": (float(len(table.failures)), float(table.values_nf.size))}
        for f, term in enumerate(table.names):
            seen = values_bgf[..., f][~np.isnan(values_bgf[..., f])]
            short = term.rpartition(":")[2]
            told[f"rewards/{short}/mean"] = (float(seen.sum()), float(seen.size))
            told[f"rewards/{short}/std"] = float(seen.std(ddof=1)) if seen.size > 1 else 0.0
        accuracy_bg = np.nan_to_num(values_bgf[..., 0]).astype(np.float32)
        reward_bg = table.total_n.reshape(b, g).astype(np.float32)
        return Grades(texts_bg, accuracy_bg, reward_bg, told, values_bgf, table.names)

    def _report(self, failures, asked, g: int) -> None:
        if not failures or jax.process_index():
            return
        step = self.run.watch.step
        said = [f"step {step}, sample {asked.ids_b[x.row // g]}: {x.term}: {x.reason}" for x in failures]
        for line in said[:SPOKEN]:
            print(f"warning: reward scored 0: {line}", file=sys.stderr)
        rows = [
            {"step": step, "sample": int(asked.ids_b[x.row // g]), "rollout": x.row % g, "reward": x.term,
             "reason": x.reason} for x in failures
        ]  # fmt: skip
        path = Path(self.folder) / "reward_failures.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def columns(asked, g: int) -> dict[str, list]:
    """What reward functions may name: `prompts` and every field that all questions have, each G times."""
    questions = [row[0] for row in asked.questions_bg]
    fields = [dataclasses.asdict(question) for question in questions]
    fields = [row.pop("extra", {}) | row for row in fields]
    fields = [row | {"prompts": texts[0]} for row, texts in zip(fields, asked.texts_bg, strict=True)]
    names = [name for name in fields[0] if all(name in row for row in fields)]
    return {name: [row[name] for row in fields for _ in range(g)] for name in names if name != "completions"}


def completion_texts(run: Run, done: Completions) -> list[list[str]]:
    """Decoded text of every completion, special tokens skipped."""
    tokens_bgr, mask_bgr = sharding.fetch((done.tokens_bgr, done.mask_bgr))
    return [
        [run.tokenizer.decode(tokens[mask].tolist()) for tokens, mask in zip(*group, strict=True)]
        for group in zip(tokens_bgr, mask_bgr, strict=True)
    ]


def rows(asked, texts_bg, **columns_bg) -> list[dict]:
    """A table of completions: question, what was said, and [B, G] or [B] arrays of numbers beside it."""
    made = []
    for i, group in enumerate(texts_bg):
        question = asked.questions_bg[i][0]
        for j, text in enumerate(group):
            numbers = {k: np.asarray(v)[i] if np.ndim(v) == 1 else np.asarray(v)[i, j] for k, v in columns_bg.items()}
            row = {"sample": int(asked.ids_b[i]), "prompt": asked.texts_bg[i][0], "completion": text}
            made.append(row | {"solution": question.solution} | {k: round(float(x), 4) for k, x in numbers.items()})
    return made
