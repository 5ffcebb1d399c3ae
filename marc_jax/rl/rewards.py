"""Rewards of a group of completions: Video-R1's terms, the gated retention reward, and functions users bring.

A reward function is what TRL users write: `fn(completions, **columns) -> list of floats`, where `completions` are
decoded strings and every column is a list of the same length. Pure numpy, nothing here touches a device.
"""

import dataclasses
import importlib
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from marc_jax.rl import answers


@dataclasses.dataclass(frozen=True)
class BonusConfig:
    """Video-R1's optional bonuses (rl.md 2.5); both are off at their default of 0.

    Attributes:
      length_bonus: added to a correct rollout whose length is inside length_range (Video-R1: 0.2).
      length_range: tokens, including the stop token, both ends included.
      temporal_bonus: T-GRPO: added to a correct rollout when the frames' order helped the group (Video-R1: 0.3).
      temporal_factor: the group passes if its accuracy >= factor * accuracy on shuffled frames (paper: 1.0).
      correct_above: a rollout is correct when its accuracy is larger than this.
    """

    length_bonus: float = 0.0
    length_range: tuple[int, int] = (320, 512)
    temporal_bonus: float = 0.0
    temporal_factor: float = 0.8
    correct_above: float = 0.1


@dataclasses.dataclass(frozen=True)
class RetentionConfig:
    """Every choice the paper leaves open about r_c = alpha * max(0, eta - tau), eta = a_comp / a_full.

    Attributes:
      alpha: size of the bonus.
      tau: the ratio from which retention is rewarded, in [0, 1].
      eta_max: cap on the ratio: a student better than its teacher earns no more than this.
      teacher_zero: what a_full = 0 means: "none" pays nothing; "cap" gives eta_max to any group with a right answer
        (the student beat a teacher that never answers); "floor" divides by max(a_full, teacher_floor).
      teacher_floor: used by "floor" only; 1/G is the smallest accuracy G rollouts can show.
      correct_above: the gate: a rollout is correct when its accuracy is larger than this (Video-R1 uses 0.1).
      images: whether image questions may earn it (the paper: no).
    """

    alpha: float = 0.3
    tau: float = 0.6
    eta_max: float = 2.0
    teacher_zero: str = "none"
    teacher_floor: float = 0.125
    correct_above: float = 0.5
    images: bool = False

    def __post_init__(self):
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"retention.tau = {self.tau}: must lie in [0, 1]")
        if self.alpha < 0.0:
            raise ValueError(f"retention.alpha = {self.alpha}: must not be negative")
        if self.eta_max < self.tau:
            raise ValueError(f"retention.eta_max = {self.eta_max} is below tau = {self.tau}: nothing could be earned")
        if self.teacher_zero not in ("none", "cap", "floor"):
            raise ValueError(f"retention.teacher_zero = {self.teacher_zero!r}: choose none, cap or floor")
        if self.teacher_zero == "floor" and not 0.0 < self.teacher_floor <= 1.0:
            raise ValueError(f"retention.teacher_floor = {self.teacher_floor}: must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Retention:
    """The retention term of B groups of G rollouts: bonus_bg = correct_bg * r_b; eta is NaN where it is undefined."""

    bonus_bg: np.ndarray
    r_b: np.ndarray
    eta_b: np.ndarray
    correct_bg: np.ndarray


def retention_ratio(a_comp_b, a_full_b, config: RetentionConfig = RetentionConfig()) -> np.ndarray:
    """eta = min(a_comp / a_full, eta_max); NaN where a_full = 0 and the policy for that pays nothing."""
    a_comp_b, a_full_b = np.asarray(a_comp_b, np.float64), np.asarray(a_full_b, np.float64)
    if config.teacher_zero == "floor":
        a_full_b = np.maximum(a_full_b, config.teacher_floor)
    dead_b = a_full_b <= 0
    with np.errstate(over="ignore"):  # a tiny a_full gives inf, which the cap turns into eta_max
        eta_b = np.minimum(a_comp_b / np.where(dead_b, 1.0, a_full_b), config.eta_max)
    instead_b = np.where(a_comp_b > 0, config.eta_max, 0.0) if config.teacher_zero == "cap" else np.nan
    return np.where(dead_b, instead_b, eta_b)


def retention(accuracy_bg, a_full_b, is_image_b, config: RetentionConfig = RetentionConfig()) -> Retention:
    """The gated retention reward of C-GRPO: R_i = r_i + 1[i correct] * alpha * max(0, eta - tau).

    Args:
      accuracy_bg: float [B, G]; accuracy of each rollout; a_comp is its mean over g.
      a_full_b: float [B]; the teacher's accuracy on the same question; NaN means unknown and earns nothing.
      is_image_b: bool [B].
      config: every open choice.

    Returns:
      A Retention; add `bonus_bg` to the rewards.
    """
    accuracy_bg = np.asarray(accuracy_bg, np.float64)
    eta_b = retention_ratio(accuracy_bg.mean(axis=1), a_full_b, config)
    r_b = config.alpha * np.maximum(0.0, np.nan_to_num(eta_b, nan=0.0) - config.tau)
    if not config.images:
        is_image_b = np.asarray(is_image_b, bool)
        r_b, eta_b = np.where(is_image_b, 0.0, r_b), np.where(is_image_b, np.nan, eta_b)
    correct_bg = accuracy_bg > config.correct_above
    return Retention(correct_bg * r_b[:, None], r_b, eta_b, correct_bg)


def retention_metrics(kept: Retention, rewards_bg) -> dict[str, tuple[float, float]]:
    """(sum, count) of what the retention reward does.

    `retention/eta` and a histogram of it (`eta_0.4` counts [0.4, 0.6), `eta_1.0` all above) over questions where it is
    defined; `gate_rate`, rollouts that are right in groups that keep more than tau, of all; `alone`, groups that
    have a gradient only through it, of all.

    Args:
      kept: of `retention`.
      rewards_bg: float [B, G]; rewards without the bonus.
    """
    eta_b = kept.eta_b[~np.isnan(kept.eta_b)]
    total, groups = float(eta_b.size), float(len(kept.r_b))
    slot_b = np.minimum((eta_b * 5 + 1e-9).astype(int), 5)
    told = {"retention/eta": (float(eta_b.sum()), total)}
    told |= {f"retention/eta_{i / 5:.1f}": (float((slot_b == i).sum()), total) for i in range(6)}
    spread = lambda x: x.max(axis=1) > x.min(axis=1)  # noqa: E731
    rewards_bg = np.asarray(rewards_bg, np.float64)
    alone_b = spread(rewards_bg + kept.bonus_bg) & ~spread(rewards_bg)
    told["retention/gate_rate"] = (float((kept.bonus_bg > 0).sum()), float(kept.bonus_bg.size))
    return told | {"retention/alone": (float(alone_b.sum()), groups)}


def retention_weight(eta_b) -> np.ndarray:
    """Float32 [B]: 1 - eta within [0, 1], what compression still loses of a question; 1 where eta is undefined."""
    return np.clip(1.0 - np.nan_to_num(np.asarray(eta_b, np.float64), nan=0.0), 0.0, 1.0).astype(np.float32)


def length_bonus(accuracy_bg, length_bg, config: BonusConfig) -> np.ndarray:
    """Float [B, G]: the bonus for correct rollouts of a wanted length, if more than one of the group is correct."""
    correct_bg = np.asarray(accuracy_bg) > config.correct_above
    length_bg = np.asarray(length_bg)
    low, high = config.length_range
    fits_bg = correct_bg & (length_bg >= low) & (length_bg <= high)
    return config.length_bonus * (fits_bg & (correct_bg.sum(axis=1, keepdims=True) > 1))


def temporal_bonus(accuracy_bg, shuffled_bh, is_image_b, config: BonusConfig) -> np.ndarray:
    """Float [B, G]: T-GRPO's bonus for correct rollouts of groups no worse than `factor` x their shuffled twins.

    Args:
      accuracy_bg: accuracy of the G rollouts that saw the frames in order.
      shuffled_bh: accuracy of the H (Video-R1: G/2) rollouts that saw them shuffled.
      is_image_b: images earn nothing.
      config: bonus size, factor and the threshold for "correct".
    """
    accuracy_bg = np.asarray(accuracy_bg, np.float64)
    pass_b = accuracy_bg.mean(axis=1) >= config.temporal_factor * np.asarray(shuffled_bh, np.float64).mean(axis=1)
    pass_b = pass_b & ~np.asarray(is_image_b, bool)
    return config.temporal_bonus * ((accuracy_bg > config.correct_above) & pass_b[:, None])


def accuracy_reward(completions: Sequence[str], solution: Sequence[str], problem_type: Sequence[str], **columns):
    """Video-R1's accuracy, as a reward function. Each sample is judged by its own problem_type."""
    del columns
    return [answers.accuracy(*row) for row in zip(completions, solution, problem_type, strict=True)]


def strict_accuracy_reward(completions: Sequence[str], solution: Sequence[str], problem_type: Sequence[str], **columns):
    """Accuracy in the strict mode of `answers`, as a reward function."""
    del columns
    return [answers.accuracy(*row, mode="strict") for row in zip(completions, solution, problem_type, strict=True)]


def format_reward(completions: Sequence[str], **columns):
    """1 for a completion that is exactly a think block followed by an answer block, else 0."""
    del columns
    return [float(answers.has_format(text)) for text in completions]


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One weighted reward function."""

    name: str
    fn: Callable[..., Sequence[float | None]]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RewardFailure:
    """A sample on which a reward function raised, hung or answered something that is not a finite number."""

    term: str
    row: int
    reason: str

    def __str__(self):
        return f"reward {self.term!r}, sample {self.row}: {self.reason}; scored 0"


@dataclasses.dataclass(frozen=True)
class RewardTable:
    """Scores of N completions under F terms.

    Attributes:
      values_nf: float64 [N, F]; NaN where a term answered None (it does not apply to that sample).
      total_n: float64 [N]; weighted sum over the terms that apply.
      applies_n: bool [N]; False where no term applies.
      failures: what went wrong, one entry per (term, sample).
    """

    names: tuple[str, ...]
    values_nf: np.ndarray
    total_n: np.ndarray
    applies_n: np.ndarray
    failures: tuple[RewardFailure, ...]


def load_reward(path: str) -> Callable:
    """The function behind "package.module:function".

    Raises:
      ValueError: the path has another form, the module cannot be imported or has no such callable.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward {path!r}: write it as package.module:function")
    try:
        fn = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {path!r}: {error}") from error
    if not callable(fn):
        raise ValueError(f"reward {path!r}: is not callable")
    return fn


def reward_terms(paths: Mapping[str, float] | Sequence[str]) -> tuple[RewardTerm, ...]:
    """Terms from {"package.module:fn": weight} or a list of paths; "accuracy", "strict_accuracy", "format" are ours."""
    ours = {"accuracy": accuracy_reward, "strict_accuracy": strict_accuracy_reward, "format": format_reward}
    weights = dict(paths) if isinstance(paths, Mapping) else dict.fromkeys(paths, 1.0)
    return tuple(RewardTerm(p, ours[p] if p in ours else load_reward(p), float(w)) for p, w in weights.items())


def score(terms: Sequence[RewardTerm], completions: Sequence[str], columns: Mapping[str, Sequence],
          timeout: float | None = None) -> RewardTable:
    """Calls every term on all completions at once; a term that fails is asked again sample by sample.

    So one bad sample costs its own score only: it is reported in `failures` and scores 0 for that term.

    Args:
      terms: what to compute, with weights.
      completions: N decoded texts.
      columns: lists of length N, passed by keyword.
      timeout: seconds a call may take; None waits for ever. A call that hangs keeps its daemon thread.

    Raises:
      ValueError: a column has another length.
    """
    for name, column in columns.items():
        if len(column) != len(completions):
            raise ValueError(f"reward column {name!r} has {len(column)} rows for {len(completions)} completions")
    values_nf = np.zeros((len(completions), len(terms)))
    failures = []
    for f, term in enumerate(terms):
        for row, answer in enumerate(_call_term(term, list(completions), dict(columns), timeout)):
            if isinstance(answer, RewardFailure):
                failures.append(answer)
            else:
                values_nf[row, f] = answer
    weights_f = np.array([term.weight for term in terms])
    applies_nf = ~np.isnan(values_nf)
    total_n = (np.where(applies_nf, values_nf, 0.0) * weights_f).sum(axis=1)
    names = tuple(term.name for term in terms)
    return RewardTable(names, values_nf, total_n, applies_nf.any(axis=1), tuple(failures))


def _call_term(term: RewardTerm, completions: list[str], columns: dict, timeout: float | None) -> list:
    """One float (NaN: does not apply) or RewardFailure per completion."""
    if not completions:
        return []
    whole = _Call(term.fn, completions, columns, threaded=timeout is not None)
    if whole.failure(timeout) is None and len(_as_list(whole.result)) == len(completions):
        return [_check(term, row, value) for row, value in enumerate(_as_list(whole.result))]
    singles = [
        _Call(term.fn, [text], {name: [column[row]] for name, column in columns.items()}, threaded=timeout is not None)
        for row, text in enumerate(completions)
    ]
    end = None if timeout is None else time.monotonic() + timeout
    rows = []
    for row, call in enumerate(singles):
        reason = call.failure(None if end is None else max(0.0, end - time.monotonic()))
        result = _as_list(call.result)
        if reason is None and len(result) != 1:
            reason = f"returned {len(result)} values for 1 completion"
        rows.append(RewardFailure(term.name, row, reason) if reason else _check(term, row, result[0]))
    return rows


def _as_list(result) -> list:
    return list(result) if isinstance(result, Sequence | np.ndarray) else [result]


def _check(term: RewardTerm, row: int, value):
    if value is None:
        return math.nan
    try:
        value = float(value)
    except (TypeError, ValueError):
        return RewardFailure(term.name, row, f"returned {value!r}, not a number")
    return value if math.isfinite(value) else RewardFailure(term.name, row, f"returned {value}")


class _Call:
    """A call of a user's function; threaded (as a daemon), one that hangs can be given up."""

    def __init__(self, fn: Callable, completions: list[str], columns: dict, *, threaded: bool):
        self.result = None
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(fn, completions, columns), daemon=True)
        if threaded:
            self._thread.start()
        else:
            self._run(fn, completions, columns)

    def _run(self, fn, completions, columns):
        try:
            self.result = fn(completions, **_accepted(fn, columns))
        except Exception as error:  # a user's function may raise anything
            self._error = f"raised {type(error).__name__}: {error}"

    def failure(self, timeout: float | None) -> str | None:
        """None when it returned within `timeout` more seconds, else why not."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return "gave no answer in time" if self._thread.is_alive() else self._error


def _accepted(fn: Callable, columns: dict) -> dict:
    """The columns a function takes: all if it has **columns, else those it names."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return columns
    names = {p.name for p in parameters}
    return {name: column for name, column in columns.items() if name in names}
