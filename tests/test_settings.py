"""Settings may not import jax, so they repeat names of the rooms that do: both must say the same."""

import pathlib

import pytest

from marc_jax import config, settings, stages, view_settings
from marc_jax.evaluation import experiment
from marc_jax.memory import choose, encoders, view
from marc_jax.rl import parity

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_settings_know_the_names_of_the_rooms_they_may_not_import():
    assert view_settings.SELECT == view.SELECT
    assert view_settings.METHOD == view.METHOD
    assert view_settings.TOKENS == choose.TOKENS and view_settings.SELECTORS == tuple(choose.SELECTORS)
    assert view_settings.SCENIC == choose.SCENIC
    assert view_settings.WATCHERS == tuple(choose.WATCHERS)
    assert settings.POOL == encoders.POOLS
    assert settings.PARITY == parity.FAMILIES
    assert sorted(settings.GROUPS) == sorted(experiment.GROUP_ORDER)
    assert set(view_settings.view()) == {field.name for field in view.dataclasses.fields(view.View)}
    assert set(settings.KINDS) == {*stages.KINDS, "encoder"}  # of contrastive


@pytest.mark.parametrize("kind", settings.KINDS)
def test_every_kind_of_stage_has_its_keys(kind):
    assert settings.stage(kind).kind == kind


def test_an_unknown_kind_is_one_line_with_the_known_ones(tmp_path):
    path = tmp_path / "e.py"
    path.write_text("def get_config():\n    return {'stages': ('a',), 'a': {'kind': 'dpo'}}\n")
    with pytest.raises(config.ConfigError, match="config.a.kind is 'dpo'; known: sft, retriever, distill, cgrpo"):
        settings.experiment(str(path), [])


QUICKSTART = "experiments/quickstart.py"


def test_a_finished_run_is_evaluated_through_views_that_no_stage_used(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    path = tmp_path / "config.json"
    settings.keep(settings.experiment(QUICKSTART, []), path)
    baselines = settings.experiment("experiments/baselines.py:quickstart", [])
    assert len(baselines.eval.arms) > 40 and "random_2_5" in baselines.views
    settings.keep(baselines, path, write=False)
    baselines.views.full.method = "merge"
    with pytest.raises(config.ConfigError, match=r"different: views"):
        settings.keep(baselines, path, write=False)


@pytest.mark.parametrize(
    "view,message",
    [
        ({"method": "vidcom2"}, "views.full: method 'vidcom2' needs a share"),
        ({"method": "merge", "share": 2.0}, "views.full.share = 2.0 must lie between"),
        ({"method": "mean", "share": 0.1}, "views.full: share goes with neither"),
        ({"method": "visionzip", "share": 0.1}, "teacher.view needs the vision tower to run"),
        ({"select": "bolt", "share": 0.1}, "teacher.view chooses patches by 'bolt': that is for evaluation"),
        ({"method": "fastv", "share": 0.1, "layer": 3}, "views.full.layer = 3: 'fastv' needs layers after it"),
        ({"method": "fastv", "share": 0.1}, "teacher.view drops tokens inside the decoder"),
        ({"method": "adjacent_merge", "select": "uniform", "share": 0.1}, "select must be 'all'"),
    ],
)
def test_a_baseline_that_does_not_fit_is_one_line(view, message, monkeypatch):
    monkeypatch.chdir(REPO)
    overrides = [f"--config.views.full.{key}={value!r}" for key, value in view.items()]
    with pytest.raises(config.ConfigError) as error:
        settings.experiment(QUICKSTART, [o.replace("'", "") for o in overrides])
    assert message in str(error.value)
