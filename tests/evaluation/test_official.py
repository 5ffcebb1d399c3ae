"""Scoring of single answers against verdicts of the published code itself (golden_official.json names the commits)."""

import json
import pathlib

import pytest

from marc_jax.evaluation import judging, official

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_official.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("group", GOLDEN["official"], ids=lambda g: f"{g['benchmark']}-{len(str(g['published']))}")
def test_every_verdict_is_that_of_the_published_code(group):
    rule, published = official.rule(group["benchmark"]), group["published"]
    wrong = [(text, want) for text, want in group["verdicts"] if rule(text, published)[0] != want]
    assert not wrong


@pytest.mark.parametrize("group", GOLDEN["video_r1"], ids=lambda g: f"{g['problem_type']}-{g['solution']}")
def test_video_r1_rewards_are_equal_to_the_bit(group):
    for text, want in group["verdicts"]:
        found = judging.judge(text, group["solution"], group["problem_type"], rule="benchmark")
        assert (found["score"], found["correct"]) == (want, want == 1.0), text


def test_what_only_a_judge_model_scores_has_no_score():
    assert official.tempcompass("A man runs.", {"task": "captioning", "answer": "A. run"}) == (None, None)
    assert official.mmvu("Dolly Zoom", {"question_type": "open-ended", "answer": "Dolly Zoom"}) == (None, None)
    with pytest.raises(ValueError, match="qvhighlights"):
        official.rule("qvhighlights")


def test_nextqa_compares_numbers_of_options():
    published = {"answer": 2, "options": ["sit", "run", "eat", "jump", "cry"]}
    assert official.nextqa("C", published) == (1.0, "C") and official.nextqa("(C) eat", published)[0] == 1.0
    assert official.nextqa("D", published) == (0.0, "D") and official.nextqa("no idea", published) == (0.0, None)


OPTIONS = ("A. a red disc", "B. two cats", "C. rain")


SPELLINGS = (
    "B", "b", "(B)", "B.", "B) two cats", "**B**", "\\boxed{B}", "$B$", "two cats", "Two cats.", "The answer is B.",
    "answer: (B)", "Option B", "B: two cats", "B, I think",
)  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_an_option_is_found_in_any_spelling(text):
    assert judging.option_letter(text, OPTIONS) == "B"


@pytest.mark.parametrize("text", ["", "D", "A or B", "A, B", "a cat", "A red disc moves", "I see rain and two cats",
                                  "no", "The answer is A, no, the answer is B", "AB"])  # fmt: skip
def test_what_names_no_option_or_several_is_no_answer(text):
    found = judging.option_letter(text, OPTIONS)
    assert found is None


def test_strict_never_falls_back():
    def strict(text, truth, kind, options=()):
        return judging.strict(text, f"<answer>{truth}</answer>", kind, options)

    assert strict("<think>hm</think><answer>B.</answer>", "B", "multiple choice", OPTIONS) == (1.0, "B")
    assert strict("B", "B", "multiple choice", OPTIONS) == (0.0, None)
    assert strict("<answer>A</answer><answer>B</answer>", "B", "multiple choice", OPTIONS) == (0.0, None)
    assert strict("<answer>D</answer>", "B", "multiple choice", OPTIONS) == (0.0, None)
    assert strict("<answer>about 4 metres</answer>", "4.0", "regression") == (1.0, "4.0")
    assert strict("<answer>4 or 5</answer>", "4", "regression") == (0.0, None)
    assert strict("<answer>3</answer>", "3.00", "numerical") == (1.0, "3.0")
    assert strict("<answer>B D</answer>", "B D", "multiple choice", OPTIONS)[0] == 1.0
    assert strict("<answer>STOP</answer>", "STOP", "OCR") == (1.0, "STOP")


MRA = [(4, 4, 1.0), (3, 4, 0.6), (50, 100, 0.1), (0, 4, 0.0), (0, 0, 1)]


@pytest.mark.parametrize(("predicted", "truth", "mra"), MRA)
def test_vsi_relative_accuracy_includes_its_bounds(predicted, truth, mra):
    assert judging.vsi_relative_accuracy(predicted, truth) == pytest.approx(mra)
