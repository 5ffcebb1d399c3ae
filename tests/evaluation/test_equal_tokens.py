"""An adaptive budget beside the mixture of fixed ones that reads as much."""

import types

import pytest

from marc_jax.evaluation import equal_tokens


def rows(scores, tokens):
    return [
        {"problem_id": i, "question_type": "t", "problem_type": "multiple choice", "video": str(i), "score": score,
         "visual_tokens": read, "duration": "", "extracted": True}
        for i, (score, read) in enumerate(zip(scores, tokens, strict=True))
    ]  # fmt: skip


ONE, FOUR = rows([1, 0, 0, 1], [10] * 4), rows([1, 1, 0, 0], [40] * 4)
ADAPTIVE = rows([1, 1, 1, 0], [10, 30, 10, 30])  # 20 on average: two thirds of the way are 10s


def test_the_rival_reads_as_much_and_scores_what_the_coin_expects():
    mixed, weights = equal_tokens.rival(ADAPTIVE, {"one": ONE, "four": FOUR})
    assert weights == pytest.approx({"one": 2 / 3, "four": 1 / 3})
    assert [row["score"] for row in mixed] == pytest.approx([1, 1 / 3, 0, 2 / 3])
    same, weights = equal_tokens.rival(ADAPTIVE, {"two": rows([0] * 4, [20] * 4), "four": FOUR})
    assert weights == {"two": 1} and [row["score"] for row in same] == [0] * 4


def test_no_rival_where_fixed_budgets_lie_on_one_side_or_share_no_question():
    assert equal_tokens.rival(ADAPTIVE, {"four": FOUR}) is None
    assert equal_tokens.rival(ADAPTIVE, {"one": [], "four": FOUR}) is None
    assert equal_tokens.rival([{"problem_id": 0, "error": "unreadable video"}], {"one": ONE, "four": FOUR}) is None


def test_the_table_names_the_mixture():
    def view(**changed):
        usual = {"select": "retrieve", "method": "merge", "represent": "mean", "weighted": False, "share": None}
        return types.SimpleNamespace(**usual, **({"adaptive": False, "rule": None} | changed))

    views = {"one": view(), "four": view(), "adaptive": view(adaptive=True)}
    arms = {key: types.SimpleNamespace(view=key, stage="", label=key) for key in views}
    said = {"one": ONE, "four": FOUR, "adaptive": ADAPTIVE}
    (table,) = equal_tokens.tables("videomme", said, arms, views, "strict")
    ((label, tokens, coin, difference, _),) = table["rows"]
    assert (label, tokens, coin) == ("adaptive", "20.0", "67 % one + 33 % four") and difference.startswith("+25.0 (")
    assert equal_tokens.tables("videomme", {"one": ONE, "four": FOUR}, arms, views, "strict") == []
