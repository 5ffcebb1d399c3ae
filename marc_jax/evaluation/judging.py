"""Judging one completion, on top of the rules that training's accuracy reward uses (`marc_jax.rl.answers`).

    judge        one of the two rules of a run: training's reward, or Video-R1's evaluation with its quirks
    strict       the answer judged, not its spelling, and no answer where there is none
"""

import re
from collections.abc import Sequence

import numpy as np

from marc_jax.rl import answers

_LEADING = re.compile(r"[(\[]?([a-z])(?:[)\].:]|$)")
_ALONE = re.compile(r"(?<![\w'-])(?:([B-HJ-Z])|([AI])(?!\s+(?!or\b|and\b)[a-z]))(?![\w'-])")  # not in "A dog", "I see"
_DECORATION = re.compile(r"\\(?:boxed|text|mathrm)\s*\{([^{}]*)\}|[*_`$]")


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """MRA as Video-R1 computes it: the share of theta in {0.50, 0.55, ..., 0.95} with relative error below 1 - theta.

    Relative error = |predicted - truth| / (|truth| + 1e-8).
    In float32 and strict: only so does (90, 100) score 0.9 and (95, 100) score 1.0. The result is a float32's value.
    """
    theta = (0.5 + 0.05 * np.arange(10)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = np.float32(predicted), np.float32(truth)
        distance = np.abs(a - b) / (np.abs(b) + np.float32(1e-8))
        return float(np.float32(np.sum(distance < np.float32(1) - theta)) / np.float32(10))


def vsi_relative_accuracy(predicted: float, truth: float) -> float:
    """MRA of VSI-Bench's own evaluation: float64, |predicted - truth| / truth <= 1 - theta; theta as above.

    Source: github.com/vision-x-nyu/thinking-in-space, lmms_eval/tasks/vsibench/utils.py.
    """
    if truth == 0:  # its own code divides by zero; no such truth is published
        return float(predicted == 0)
    return float(np.mean(abs(predicted - truth) / truth <= 1 - np.linspace(0.5, 0.95, 10)))


def judge(completion: str, solution: str, problem_type: str, *, rule: str = "training", mode: str = "videor1") -> dict:
    """Judges one completion: {"correct", "score", "format_ok"}, the fields that a prediction row needs.

    Args:
      completion: decoded text, special tokens skipped, not stripped.
      solution: "<answer>X</answer>", or X bare.
      problem_type: Video-R1's type.
      rule: "training" scores as the accuracy reward does; "benchmark" as Video-R1's evaluation does: a completion
        without an answer is an answer as a whole, regression scores MRA, OCR and free-form score 0, and only a score
        of 1 is correct.
      mode: "videor1" or "strict" of `marc_jax.rl.answers`; the benchmark rule knows only the first.
    Raises:
      ValueError: an unknown rule or mode.
    """
    if rule not in ("training", "benchmark"):
        raise ValueError(f"unknown rule {rule!r}; known: training, benchmark")
    truth = solution if "<answer>" in solution else f"<answer>{solution}</answer>"
    format_ok = answers.has_format(completion)
    if rule == "benchmark":
        score = _video_r1(answers.extract_answer(completion) or completion, answers.extract_answer(truth), problem_type)
        return {"correct": score == 1.0, "score": score, "format_ok": format_ok}
    score = answers.accuracy(completion, truth, problem_type, mode)
    return {"correct": score > 0.5, "score": score, "format_ok": format_ok}


def _video_r1(said: str, truth: str, problem_type: str) -> float:
    """The reward of Video-R1's src/eval_bench.py, item by item; its exceptions are zeros here too."""
    if problem_type == "multiple choice":
        return float(said.strip() == truth.strip())
    if problem_type not in ("numerical", "regression"):
        return 0.0
    if problem_type == "numerical" and any(c in truth for c in ".,") != any(c in said for c in ".,"):
        return 0.0
    a, b = answers.parse_number(said), answers.parse_number(truth)
    if a is None or b is None:
        return 0.0
    return mean_relative_accuracy(a, b) if problem_type == "regression" else float(round(a, 2) == round(b, 2))


def answer_block(completion: str) -> str | None:
    """The body of the only answer block; None where there is none, or more than one."""
    return answers.extract_answer(completion, "strict") or None


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that a text names; None where it names none or several.

    By its letter ("B", "(b)", "**B.** a cat", "\\boxed{B}", "The answer is B."), or by all of its words.
    """
    plain = _DECORATION.sub(r"\1", text).strip()
    known = {option[0]: _words(re.sub(r"^[A-Z][.):]\s*", "", option)) for option in options}
    found = {letter for letter, words in known.items() if words and words == _words(plain)}
    if not found:
        leading = _LEADING.match(plain)
        found = {leading[1].upper()} if leading else {b or a for b, a in _ALONE.findall(plain)}
        found &= known.keys()
    return found.pop() if len(found) == 1 else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def strict(completion: str, solution: str, problem_type: str, options: Sequence[str] = ()) -> tuple[float, str | None]:
    """(score in [0, 1], the answer found or None) of one completion, judged by what it says in its one answer block.

    No block, two blocks, a letter of no option or two numbers are no answer: score 0. Regression is VSI-Bench's MRA;
    OCR and free-form are scored as in training.
    """
    said, truth = answer_block(completion), answers.extract_answer(solution)
    if said is None:
        return 0.0, None
    if problem_type == "multiple choice" and (right := option_letter(truth, options)):
        found = option_letter(said, options)
        return float(found == right), found
    if problem_type in ("numerical", "regression"):
        a, b = answers.only_number(said), answers.only_number(truth)
        if a is None or b is None:
            return 0.0, None
        if problem_type == "regression":
            return vsi_relative_accuracy(a, b), str(a)
        return float(round(a, 2) == round(b, 2)), str(a)
    return answers.accuracy(completion, solution, problem_type, "strict"), said
