"""Judging one completion as Video-R1's evaluation does, on top of the rules that training's accuracy reward uses."""

import numpy as np

from marc_jax.rl import answers


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """MRA of VSI-Bench: the share of theta in {0.50, 0.55, ..., 0.95} with relative error below 1 - theta.

    Relative error = |predicted - truth| / (|truth| + 1e-8).
    In float32 and strict, as Video-R1 computes it: only so does (90, 100) score 0.9 and (95, 100) score 1.0.
    """
    theta = (0.5 + 0.05 * np.arange(10)).astype(np.float32)
    distance = np.abs(np.float32(predicted) - np.float32(truth)) / (np.abs(np.float32(truth)) + np.float32(1e-8))
    return float(np.mean(distance < np.float32(1) - theta))


def judge(completion: str, solution: str, problem_type: str, *, rule: str = "training", mode: str = "videor1") -> dict:
    """Judges one completion: {"correct", "score", "format_ok"}, the fields that a prediction row needs.

    Args:
      completion: decoded text, special tokens skipped, not stripped.
      solution: "<answer>X</answer>", or X bare.
      problem_type: Video-R1's type.
      rule: "training" scores as the accuracy reward does; "benchmark" as Video-R1's evaluation does: a completion
        without an answer tag is an answer as a whole, regression scores MRA, OCR and free-form score 0.
      mode: "videor1" or "strict", see `marc_jax.rl.answers`.
    Raises:
      ValueError: an unknown rule or mode.
    """
    if rule not in ("training", "benchmark"):
        raise ValueError(f"unknown rule {rule!r}; known: training, benchmark")
    truth = solution if "<answer>" in solution else f"<answer>{solution}</answer>"
    format_ok, text = answers.has_format(completion), completion
    if rule == "benchmark" and "<answer>" not in completion:
        text = f"<answer>{completion}</answer>"
    if rule == "benchmark" and problem_type == "regression":
        a, b = (answers.parse_number(answers.extract_answer(x)) for x in (text, truth))
        score = 0.0 if a is None or b is None else mean_relative_accuracy(a, b)
    elif rule == "benchmark" and problem_type in ("OCR", "free-form"):
        score = 0.0
    else:
        score = answers.accuracy(text, truth, problem_type, mode)
    return {"correct": score > 0.5, "score": score, "format_ok": format_ok}
