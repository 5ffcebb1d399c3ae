"""Answers are scored as Video-R1 scores them, quirk by quirk, and strictly when asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.rl import answers


def full(answer):
    return f"<think>so</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> B </answer>", "B"),
        ("<answer>\n B\n c </answer> then <answer>D</answer>", "B\n c"),
        ("B", ""),
        ("<answer>B", ""),
        ("<answer></answer>", ""),
    ],
)
def test_first_answer_block_counts(text, expected):
    assert answers.extract_answer(text) == expected


def test_strict_extraction_wants_exactly_one_block():
    assert answers.extract_answer("<answer>A</answer><answer>B</answer>", "strict") == ""
    assert answers.extract_answer("x <answer> A </answer>", "strict") == "A"


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (full("B"), True),
        ("<think>a\nb</think> \n\t<answer>B</answer>", True),
        ("\n" + full("B"), False),
        (full("B") + "\n", False),
        ("<think>a</think>x<answer>B</answer>", False),
        ("<answer>B</answer>", False),
        ("<think></think><answer></answer>", True),
    ],
)
def test_format_is_a_match_of_the_whole_text(text, ok):
    assert answers.has_format(text) is ok


@pytest.mark.parametrize(
    ("kind", "predicted", "truth", "videor1", "strict"),
    [
        ("multiple choice", "B", "B", 1, 1),
        ("multiple choice", "b", "B", 0, 1),
        ("multiple choice", "B.", "B", 0, 1),
        ("multiple choice", "(B) a red disc", "B", 0, 1),
        ("multiple choice", "B. A red disc", "B", 0, 1),
        ("multiple choice", "A red disc", "A", 0, 0),
        ("multiple choice", "C", "B", 0, 0),
        ("multiple choice", "B D", "B D", 1, 1),
        ("multiple choice", "b, d", "B D", 0, 1),
        ("multiple choice", "(B) (D)", "B D", 0, 1),
        ("multiple choice", "D B", "B D", 0, 0),
        ("multiple choice", "B", "B D", 0, 0),
        ("multiple choice", "B D", "B", 0, 0),
        ("multiple choice", "", "B", 0, 0),
        ("numerical", "3", "3", 1, 1),
        ("numerical", "3.0", "3", 0, 1),
        ("numerical", "3.001", "3.0", 1, 1),
        ("numerical", "1,000", "1000.0", 1, 1),
        ("numerical", "1,000", "1000", 0, 1),
        ("numerical", "three", "3", 0, 0),
        ("numerical", "3 m", "3", 0, 1),
        ("numerical", "3 or 4", "3", 0, 0),
        ("numerical", "nan", "3", 0, 0),
        ("regression", "90", "100", 0.9, 0.9),
        ("regression", "300", "100", 0, 0),
        ("regression", "x", "100", 0, 0),
        ("regression", "nan", "100", 0, 0),
        ("regression", "inf", "100", 0, 0),
        ("OCR", "STOP", "STOP", 1, 1),
        ("OCR", "stop", "STOP", 0, 0),
        ("OCR", "the cat", "the cat sat", 2 / 3, 2 / 3),
        ("OCR", "x y z w", "a b", 0, 0),
        ("free-form", "a red disc moves", "a red disc moves", 1, 1),
        ("free-form", "", "a red disc", 0, 0),
        ("Multiple Choice", "B", "B", 0, 0),
    ],
)
def test_problem_types(kind, predicted, truth, videor1, strict):
    solution = f"<answer>{truth}</answer>"
    assert answers.accuracy(full(predicted), solution, kind) == pytest.approx(videor1, abs=1e-10)
    assert answers.accuracy(full(predicted), solution, kind, "strict") == pytest.approx(strict, abs=1e-10)


def test_published_regression_vector_to_1e_11():
    assert answers.accuracy(full("90"), "<answer>100</answer>", "regression") == pytest.approx(0.9, abs=1.1e-11)


def test_free_form_is_the_mean_of_three_rouges():
    # One of two words shared: ROUGE-1 = ROUGE-L = 0.5, ROUGE-2 = 0. The stemmer joins "moving" and "moves".
    assert answers.rouge_mean("disc moves", "ball moving") == pytest.approx(1 / 3)


def test_no_answer_block_matches_an_empty_solution_as_published_but_not_strictly():
    assert answers.accuracy("nothing", "nothing", "multiple choice") == 1.0
    assert answers.accuracy("nothing", "nothing", "multiple choice", "strict") == 0.0


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="lenient"):
        answers.accuracy("a", "b", "OCR", "lenient")


@pytest.mark.parametrize(
    ("ref", "hyp", "expected"),
    [("the cat sat", "the cat", 1 / 3), ("a b", "x y z w", 2), ("STOP", "stop", 1), ("", "", 0), ("", "a b", 2)],
)
def test_word_error_rate_vectors(ref, hyp, expected):
    assert answers.word_error_rate(ref, hyp) == pytest.approx(expected)


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@given(words, words)
def test_word_error_rate_equals_the_full_table(ref, hyp):
    table = [[i + j if i * j == 0 else 0 for j in range(len(hyp) + 1)] for i in range(len(ref) + 1)]
    for i in range(1, len(ref) + 1):
        for j in range(1, len(hyp) + 1):
            same = ref[i - 1] == hyp[j - 1]
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (not same))
    assert answers.word_error_rate(" ".join(ref), " ".join(hyp)) == table[-1][-1] / max(1, len(ref))


kinds, modes = st.sampled_from(answers.PROBLEM_TYPES), st.sampled_from(answers.MODES)


@given(st.text(max_size=40), st.text(max_size=20), kinds, modes)
def test_any_text_scores_between_0_and_1(text, truth, kind, mode):
    assert 0.0 <= answers.accuracy(full(text), f"<answer>{truth}</answer>", kind, mode) <= 1.0
