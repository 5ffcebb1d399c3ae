"""The pure helpers of the plots, and that every figure can be drawn from little data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.evaluation import plots

positions = st.lists(st.floats(-50, 150, allow_nan=False), min_size=1, max_size=12)


@given(positions, st.floats(0.1, 8))
def test_spread_labels_do_not_collide_and_keep_their_order(wanted, gap):
    placed = plots.spread(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.asarray(placed)[order]) >= gap - 1e-9)


@given(positions)
def test_spread_leaves_labels_alone_when_there_is_room(wanted):
    wanted = [value + 300 * i for i, value in enumerate(sorted(wanted))]
    assert plots.spread(wanted, 1.0) == pytest.approx(wanted)


@given(positions, st.floats(0.1, 2))
def test_spread_labels_stay_on_the_page(wanted, gap):
    placed = plots.spread(wanted, gap, 0, 100)
    assert min(placed) >= -1e-9 and max(placed) <= 100 + 1e-9


def test_spread_moves_two_equal_labels_apart_evenly():
    assert plots.spread([10, 10], 4) == [8, 12]
    assert plots.spread([], 4) == []


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_running_mean_is_the_mean_of_the_window(values, width):
    smooth = plots.running_mean(np.asarray(values), width)
    half = width // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    assert smooth == pytest.approx(expected, abs=1e-9)


def test_a_series_is_sorted_and_a_step_logged_twice_counts_once():
    rows = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": None}]
    steps, values = plots.series(rows, "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [3.0, 0.5]


def test_panels_prefer_what_a_stage_is_about():
    grpo = [{"step": 1, "loss": 0.1, "reward": 1, "reward/accuracy": 0.5, "frac_reward_zero_std": 0.1, "kl_mean": 0.2}]
    assert [label for label, _, _ in plots.choose_panels(grpo)] == [
        "reward", "accuracy", "dead groups", "KL to the reference"]  # fmt: skip
    assert plots.choose_panels([{"step": 1, "loss": 0.1, "time": 3}]) == [("loss", "loss", False)]
    assert plots.choose_panels([{"step": 1, "odd": 0.1}]) == [("odd", "odd", False)]
    assert plots.choose_panels([]) == []


ARM = {"key": "a", "label": "the $x_1$ arm", "group": "student", "accuracy": 50.0, "ci95": [40, 60],
       "visual_tokens": 4, "per_type": {"colour": {"accuracy": 50.0}, "order": {"accuracy": None}}}  # fmt: skip


@pytest.mark.parametrize("arms", [[ARM], [ARM, {**ARM, "accuracy": None}], [{**ARM, "visual_tokens": 0}] * 3])
@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=lambda theme: theme["name"])
def test_figures_can_be_drawn_from_little(tmp_path, arms, theme):
    figures = [
        plots.accuracy_bars(arms, None, theme),
        plots.type_heat(arms, None, (), theme),
        plots.pareto(arms, 25.0, theme),
        plots.recall_bars({"recall@1": 50.0}, theme),
        plots.stage_curves([{"step": 1, "loss": 2.0}], theme),
    ]
    for i, fig in enumerate(figures):
        assert plots.save(fig, tmp_path / f"{i}.png", dpi=40).stat().st_size > 500


def test_nothing_is_drawn_from_nothing():
    assert plots.recall_bars({}, plots.LIGHT) is None
    assert plots.stage_curves([], plots.LIGHT) is None
    bare = [{"key": "a", "label": "a", "group": "student"}]
    assert plots.type_heat(bare, None, (), plots.LIGHT) is None
    assert plots.pareto(bare, None, plots.LIGHT) is None


def test_the_same_figure_has_the_same_bytes(tmp_path):
    paths = [plots.save(plots.pareto([ARM], 25.0, plots.LIGHT), tmp_path / f"{i}.png", dpi=40) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    fig = plots.figure(1, 1, plots.LIGHT)
    fig.savefig = lambda *a, **k: (_ for _ in ()).throw(OSError("No space left on device"))
    with pytest.raises(OSError, match="No space"):
        plots.save(fig, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
