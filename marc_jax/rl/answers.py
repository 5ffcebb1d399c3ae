"""From the text of a completion to an accuracy in [0, 1], as Video-R1 scores it, or strictly.

Two modes everywhere:
  "videor1": the published training rewards with their quirks (rl.md 2.4): the first answer block counts, letters
    compare as whole strings ("B." is not "B"), "3" and "3.0" differ because only one of them has a decimal mark.
  "strict": for people who want the answer judged, not its spelling: exactly one answer block, a choice letter may
    carry a dot, brackets or its option text, several letters ("B D") compare one by one, numbers as numbers.

Pure Python: no jax, no numpy. Source of the rules: github.com/tulerfeng/Video-R1, src/r1-v/src/open_r1/grpo.py.
"""

import functools
import math
import re

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
MODES = ("videor1", "strict")

_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_LETTER = re.compile(r"(?is)(?:option|answer|choice)?[\s:]*[(\[]?\s*([a-z])\s*(?:[)\].:,].*|$)")
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def extract_answer(text: str, mode: str = "videor1") -> str:
    """The body of the first answer block, stripped; "" when there is none (or, strictly, not exactly one)."""
    if mode == "strict" and (text.count("<answer>") != 1 or text.count("</answer>") != 1):
        return ""
    match = _ANSWER.search(text)
    return match.group(1).strip() if match else ""


def has_format(text: str) -> bool:
    """Whether the whole text is one think block, optional whitespace, one answer block. A leading newline fails."""
    return _FORMAT.fullmatch(text) is not None


def parse_number(text: str) -> float | None:
    """The text without thousands commas as a float, or None."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def choice_letter(text: str) -> str | None:
    """The option letter a free spelling stands for: "B", "(b)", "B.", "B) a red disc" give "B"; None if unclear."""
    match = _LETTER.fullmatch(text.strip())
    return match.group(1).upper() if match else None


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Levenshtein distance over whitespace-separated words / max(1, reference words); case-sensitive, may exceed 1."""
    ref, hyp = reference.split(), hypothesis.split()
    row = list(range(len(hyp) + 1))
    for i, ref_word in enumerate(ref, start=1):
        diagonal, row[0] = row[0], i
        for j, hyp_word in enumerate(hyp, start=1):
            substitution = diagonal + (ref_word != hyp_word)
            diagonal, row[j] = row[j], min(substitution, row[j] + 1, row[j - 1] + 1)
    return row[-1] / max(1, len(ref))


@functools.lru_cache(maxsize=1)
def _rouge_scorer():
    from rouge_score import rouge_scorer  # imported on first use: it brings nltk along

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge_mean(reference: str, hypothesis: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L with the Porter stemmer."""
    scores = _rouge_scorer().score(reference, hypothesis)
    return sum(scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")) / 3


def _numerical(predicted: str, truth: str, mode: str) -> float:
    if mode == "videor1" and _has_mark(predicted) != _has_mark(truth):
        return 0.0
    a, b = _number(predicted, mode), _number(truth, mode)
    if a is None or b is None:
        return 0.0
    return float(round(b, 2) == round(a, 2))


def _has_mark(text: str) -> bool:
    return "." in text or "," in text


def only_number(text: str) -> float | None:
    """The one number in a text, units allowed; None where there is none or several, or it is not finite."""
    found = _NUMBER.findall(text)
    value = parse_number(found[0]) if len(found) == 1 else None
    return value if value is not None and math.isfinite(value) else None


def _number(text: str, mode: str) -> float | None:
    """videor1: the whole text must be a number. strict: the only number in it."""
    return parse_number(text) if mode == "videor1" else only_number(text)


def _regression(predicted: str, truth: str, mode: str) -> float:
    a, b = _number(predicted, mode), _number(truth, mode)
    if a is None or b is None or not math.isfinite(a):  # "nan" must never be worth a reward
        return 0.0
    return 1.0 - min(1.0, (abs(a - b) + 1e-9) / (abs(b) + 1e-9))


def _multiple_choice(predicted: str, truth: str, mode: str) -> float:
    if mode == "videor1":
        return float(predicted.strip() == truth.strip())
    letter = choice_letter(truth)
    if letter is None:  # several letters, "B D": the same words in the same order
        return float(_WORD.findall(predicted.upper()) == _WORD.findall(truth.upper()))
    return float(letter == choice_letter(predicted))


def accuracy(completion: str, solution: str, problem_type: str, mode: str = "videor1") -> float:
    """Accuracy reward of one completion.

    Args:
      completion: decoded text, special tokens skipped, not stripped.
      solution: the record's solution, wrapped as "<answer>X</answer>"; passes through the same extractor.
      problem_type: one of PROBLEM_TYPES (case- and space-sensitive); any other scores 0, as published.
      mode: "videor1" or "strict".

    Returns:
      A float in [0, 1].

    Raises:
      ValueError: on an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown accuracy mode {mode!r}; known: {', '.join(MODES)}")
    predicted, truth = extract_answer(completion, mode), extract_answer(solution, mode)
    if mode == "strict" and not predicted:
        return 0.0
    if problem_type == "multiple choice":
        return _multiple_choice(predicted, truth, mode)
    if problem_type == "numerical":
        return _numerical(predicted, truth, mode)
    if problem_type == "OCR":
        return min(1.0, max(0.0, 1.0 - word_error_rate(truth, predicted)))
    if problem_type == "free-form":
        return min(1.0, max(0.0, rouge_mean(truth, predicted)))
    if problem_type == "regression":
        return _regression(predicted, truth, mode)
    return 0.0
