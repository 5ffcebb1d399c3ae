"""Questions about a list of events: pure functions of latents, used for files and for videos recomposed in training.

A type asks about one scene or about two. `colours`, `shapes`, `directions` and `happened` answer with two letters,
"B D", in the order in which the question names the scenes; `happens` and `happened` name them by what they show, every
other type by their background. Every answer is balanced and independent of the question's words, so a reader without
the video stays at chance.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from data_pipelines.synthetic.scenes import COLOURS, DIRECTIONS, LANES, PAIRS, SHAPES, SINGLE, Event

TYPES = SINGLE + PAIRS
FAMILIES = {
    "attribute": ("colour", "shape", "colours", "shapes"),
    "motion": ("direction", "directions"),
    "counting": ("count", "total"),
    "temporal order": ("order",),
    "what happened": ("happens", "happened"),
}
LETTERS = "ABCD"
# Accuracy of the best reader without the video. Two scenes of a video never share colour and shape, so two different
# colours (or shapes) are a little likelier, 4 in 5, than 3 in 4: the best guess of a pair is worth 4/5 / 12 = 1/15.
CHANCE = {
    **{"colour": 1 / 4, "shape": 1 / 4, "direction": 1 / 4, "count": 1 / 3, "happens": 1 / 4},
    **{"colours": 1 / 15, "shapes": 1 / 15, "directions": 1 / 16, "total": 1 / 5, "happened": 1 / 16, "order": 1 / 2},
}
# Multiple choice: the choices of an attribute, the attribute a type asks for, the types that name scenes by content.
_CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS)}
_ATTRIBUTE = {
    **{"colour": "colour", "shape": "shape", "direction": "direction", "happens": "direction"},
    **{"colours": "colour", "shapes": "shape", "directions": "direction", "happened": "direction"},
}
_BY_CONTENT = ("happens", "happened")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question in Video-R1's terms. `needed` holds the indices of the events it is about, in the order named."""

    problem: str
    options: tuple[str, ...]
    problem_type: str
    solution: str
    process: str
    question_type: str
    needed: tuple[int, ...]

    @property
    def target(self) -> str:
        """What SFT learns to say."""
        return self.process + self.solution


def events_needed(question_type: str) -> int:
    """How many scenes a question of this type is about."""
    return 2 if question_type in PAIRS else 1


def make_question(
    rng: np.random.Generator, events: list[Event], question_type: str, *, options: str = "fixed"
) -> Question:
    """Picks what to ask about and asks it. `options="shuffled"` gives every question its own order of choices.

    Raises ValueError for an unknown type or too few events.
    """
    if question_type not in TYPES:
        raise ValueError(f"unknown question type {question_type!r}; known: {', '.join(TYPES)}")
    if len(events) < events_needed(question_type):
        raise ValueError(f"a question of type {question_type!r} needs two events, got {len(events)}")
    if question_type == "total":
        needed = _pick_total(rng, tuple([event.count for event in events]))
    elif question_type in PAIRS:
        first = int(rng.random() * len(events))
        second = int(rng.random() * (len(events) - 1))
        needed = (first, second + (second >= first))
    else:
        needed = (int(rng.random() * len(events)),)
    choices = _CHOICES.get(_ATTRIBUTE.get(question_type))
    if choices and options == "shuffled":
        choices = tuple(choices[i] for i in np.argsort(rng.random(len(choices))).tolist())
    return ask(events, question_type, needed, choices)


def ask(
    events: list[Event], question_type: str, needed: tuple[int, ...], choices: tuple[str, ...] | None = None
) -> Question:
    """The question of this type about the events `needed`, in that order, with multiple choices in the order given."""
    event = events[needed[0]]
    place = event.background
    options = ()
    if question_type in _ATTRIBUTE:
        attribute = _ATTRIBUTE[question_type]
        choices = choices or _CHOICES[attribute]
        options = _lettered(choices)
        asked = [events[i] for i in needed]
        values = [getattr(e, attribute) for e in asked]
        names = [e.content if question_type in _BY_CONTENT else e.background for e in asked]
        answer = " ".join(LETTERS[choices.index(value)] for value in values)
        verb = "what happens to" if question_type in _BY_CONTENT else f"{question_type} in"
        problem = f"{verb} {' and '.join(names)} ?"
        pairs = zip(names, values, strict=True)
        think = _caption(event) if len(asked) == 1 else " ".join(f"{name} {value}" for name, value in pairs)
    elif question_type == "count":
        answer, problem, think = event.count, f"how many in {place} ?", _caption(event)
    elif question_type == "total":
        other = events[needed[1]]
        answer, problem = event.count + other.count, f"how many in {place} and {other.background} ?"
        think = f"{place} {event.count} {other.background} {other.count}"
    elif question_type == "order":
        names = (place, events[needed[1]].background)
        problem, options = f"{names[0]} or {names[1]} first ?", _lettered(names)
        late = needed[0] > needed[1]
        answer, think = LETTERS[late], f"first {names[late]} then {names[not late]}"
    else:
        raise ValueError(f"unknown question type {question_type!r}; known: {', '.join(TYPES)}")
    kind = "multiple choice" if options else "numerical"
    return Question(
        problem, options, kind, f"<answer>{answer}</answer>", f"<think>{think}</think>", question_type, needed
    )


def _caption(event: Event) -> str:
    return f"{event.background} {event.content} {event.direction} {event.count}"


@functools.lru_cache(maxsize=4096)
def _lettered(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _pick_total(rng: np.random.Generator, counts: tuple[int, ...]) -> tuple[int, int]:
    cumulative, pairs = _pairs_by_total(counts)
    u = rng.random() * cumulative[-1]
    group = pairs[next(i for i, edge in enumerate(cumulative) if u < edge)]
    u = rng.random() * 2 * len(group)
    a, b = group[int(u) // 2]
    return (a, b) if int(u) % 2 else (b, a)


@functools.lru_cache(maxsize=16384)
def _pairs_by_total(counts: tuple[int, ...]):
    """Cumulative weights of the totals that some pair of events reaches, and those pairs."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for a, b in itertools.combinations(range(len(counts)), 2):
        groups.setdefault(counts[a] + counts[b], []).append((a, b))
    weights = total_weights(len(counts))
    totals = sorted(groups)
    return list(itertools.accumulate(weights[t] for t in totals)), [groups[t] for t in totals]


@functools.lru_cache(maxsize=32)
def total_weights(n: int) -> dict[int, float]:
    """Weight of each total 2..6, so that over videos of n events with uniform counts all five are asked equally often.

    A total can be asked only where two events reach it: with weights w, P(s) = sum over videos that reach s of
    P(video) w_s / (sum of w over the totals it reaches). Solved for P(s) = 1/5 by proportional fitting; exact from
    n = 3 on (n = 2 has no choice to make).
    """
    totals = range(2, 2 * LANES + 1)
    if n < 3:
        return dict.fromkeys(totals, 1.0)
    cases: dict[frozenset, float] = {}
    for ones, twos in itertools.product(range(n + 1), repeat=2):
        threes = n - ones - twos
        if threes < 0:
            continue
        have = {1: ones, 2: twos, 3: threes}
        reach = frozenset(a + b for a in have for b in have if have[a] and have[b] > (a == b))
        ways = math.factorial(n) / math.prod(math.factorial(k) for k in have.values())
        cases[reach] = cases.get(reach, 0.0) + ways / LANES**n
    weights = dict.fromkeys(totals, 1.0)
    for _ in range(500):
        asked = dict.fromkeys(totals, 0.0)
        for reach, p in cases.items():
            norm = sum(weights[s] for s in reach)
            for s in reach:
                asked[s] += p * weights[s] / norm
        weights = {s: weights[s] * (1 / len(totals)) / max(asked[s], 1e-9) for s in totals}
    return weights
