"""Settings may not import jax, so they repeat names of the rooms that do: both must say the same."""

import dataclasses
import pathlib

import pytest

from marc_jax import config, settings, stage_settings, stages, view_settings
from marc_jax.evaluation import experiment
from marc_jax.memory import choose, encoders, view
from marc_jax.rl import advantages, loss, parity, rewards, step

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_settings_know_the_names_of_the_rooms_they_may_not_import():
    assert view_settings.SELECT == view.SELECT
    assert view_settings.METHOD == view.METHOD
    assert view_settings.TOKENS == choose.TOKENS and view_settings.SELECTORS == tuple(choose.SELECTORS)
    assert view_settings.SCENIC == choose.SCENIC
    assert view_settings.WATCHERS == tuple(choose.WATCHERS)
    assert settings.POOL == encoders.POOLS
    assert stage_settings.PARITY == parity.FAMILIES
    assert stage_settings.DIVERGENCE == step.KINDS
    assert stage_settings.LOSS["kl"] == loss.KL_ESTIMATORS and stage_settings.LOSS["aggregation"] == loss.AGGREGATIONS
    fields = {field.name for field in dataclasses.fields(loss.LossConfig)}
    assert set(stage_settings.LOSS) == fields - {"kl_coef", "count_empty"}  # beta, skip_dead
    fields = {field.name for field in dataclasses.fields(advantages.AdvantageConfig)}
    assert set(stage_settings.ADVANTAGE) == fields - {"scale"}
    fields = {field.name: field.default for field in dataclasses.fields(rewards.RetentionConfig)}
    stage = stage_settings.stage("cgrpo")
    assert fields == {"alpha": stage.alpha, "tau": stage.tau, **stage.retention.to_dict()}
    assert sorted(settings.GROUPS) == sorted(experiment.GROUP_ORDER)
    assert set(view_settings.view()) == {field.name for field in view.dataclasses.fields(view.View)}
    assert set(stage_settings.KINDS) == {*stages.KINDS, "encoder"}  # of contrastive


@pytest.mark.parametrize("kind", stage_settings.KINDS)
def test_every_kind_of_stage_has_its_keys(kind):
    assert stage_settings.stage(kind).kind == kind


def test_an_unknown_kind_is_one_line_with_the_known_ones(tmp_path):
    path = tmp_path / "e.py"
    path.write_text("def get_config():\n    return {'stages': ('a',), 'a': {'kind': 'dpo'}}\n")
    with pytest.raises(config.ConfigError, match="config.a.kind is 'dpo'; known: sft, retriever, distill, cgrpo, grpo"):
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lora.rank=-1", "cgrpo.lora: rank must not be negative"),
        ("lora.alpha=0.0", "cgrpo.lora: rank must not be negative and alpha must be positive"),
        ("scale=std", "cgrpo.scale = 'std': choose one of '', 'group', 'batch', 'none'"),
        ("weight=eta", "cgrpo.weight = 'eta': choose one of '', 'lost'"),
        ("iterations=2", "the loss of parity 'videor1' has no clipping"),
        ("refill=-1", "cgrpo: iterations must be at least 1, refill and credit not negative"),
        ("optimizer.ema=1.0", "cgrpo.optimizer.ema = 1.0 must lie in"),
    ],
)
def test_what_a_c_grpo_stage_cannot_do_is_one_line(repo, change, words):
    with pytest.raises(config.ConfigError, match=words.replace("[", ".")):
        settings.experiment(str(repo / "experiments" / "quickstart.py"), [f"--config.cgrpo.{change}"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distill.divergence=hinge", "distill.divergence = 'hinge': choose one of reverse, forward, jsd, sampled"),
        ("sft.records=100", "sft.records = 100 must be a multiple of sft.videos = 64"),
        ("views.full.budgets=(8,4)", "views.full.budgets = (8, 4): rising numbers of tokens"),
    ],
)
def test_a_divergence_records_or_ladder_that_cannot_be_is_one_line(repo, change, words):
    with pytest.raises(config.ConfigError) as error:
        settings.experiment(str(repo / "experiments" / "quickstart.py"), [f"--config.{change}"])
    assert words in str(error.value)


def test_adapters_alone_train_above_the_teacher_only_where_both_start_alike(repo):
    read = lambda *more: settings.experiment(  # noqa: E731
        str(repo / "experiments" / "quickstart.py"), ["--config.cgrpo.lora.rank=4", *more]
    ).cgrpo
    assert stage_settings.trainable(read()) == () and stage_settings.teacher_within(read())
    whole = read("--config.cgrpo.lora.whole=('vision/merger/.*',)")
    assert stage_settings.trainable(whole) == ("vision/merger/.*",) and not stage_settings.teacher_within(whole)
    assert not stage_settings.teacher_within(read("--config.cgrpo.init=sft"))
    assert stage_settings.trainable(read("--config.cgrpo.lora.rank=0")) == ("text/.*", "vision/merger/.*")
