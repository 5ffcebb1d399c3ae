"""Settings may not import jax, so they repeat names of the rooms that do: both must say the same."""

import pytest

from marc_jax import config, settings, stages
from marc_jax.evaluation import experiment
from marc_jax.memory import encoders, view
from marc_jax.rl import parity


def test_settings_know_the_names_of_the_rooms_they_may_not_import():
    assert settings.SELECT == view.SELECT
    assert settings.METHOD == view.METHOD
    assert settings.POOL == encoders.POOLS
    assert settings.PARITY == parity.FAMILIES
    assert sorted(settings.GROUPS) == sorted(experiment.GROUP_ORDER)
    assert set(settings.view()) == {field.name for field in view.dataclasses.fields(view.View)}
    assert set(settings.KINDS) == {*stages.KINDS, "encoder"}  # of contrastive


@pytest.mark.parametrize("kind", settings.KINDS)
def test_every_kind_of_stage_has_its_keys(kind):
    assert settings.stage(kind).kind == kind


def test_an_unknown_kind_is_one_line_with_the_known_ones(tmp_path):
    path = tmp_path / "e.py"
    path.write_text("def get_config():\n    return {'stages': ('a',), 'a': {'kind': 'dpo'}}\n")
    with pytest.raises(config.ConfigError, match="config.a.kind is 'dpo'; known: sft, retriever, distill, cgrpo"):
        settings.experiment(str(path), [])
