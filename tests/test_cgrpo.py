"""C-GRPO's keys: numerics of a family with changes, what a stage needs, rewards of one's own, shuffled frames."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.sources import Record
from marc_jax import cgrpo, config, grades, settings, stage_settings
from marc_jax.batches import Asked
from marc_jax.memory.view import VideoIndex
from marc_jax.rl import advantages, parity
from marc_jax.rl.types import Completions
from marc_jax.watch import Watch


def test_without_options_a_stage_has_its_familys_numerics():
    for family in parity.FAMILIES:
        stage = stage_settings.stage("cgrpo")
        stage.parity = family
        assert cgrpo.numerics(stage) == parity.parity(family, kl_coef=stage.beta)


def test_a_familys_numerics_can_be_changed_one_by_one():
    stage = stage_settings.stage("cgrpo")
    stage.update(parity="trl", skip_dead=True, loss={"ratio": "sequence", "clip_high": float("inf"), "dual_clip": 3.0})
    stage.update(advantage={"ddof": 0, "baseline": "rloo"}, scale="none")
    scale, losses = cgrpo.numerics(stage)
    assert scale == advantages.AdvantageConfig("none", "rloo", 0, 1e-4)
    want = dict(ratio="sequence", clip_high=float("inf"), dual_clip=3.0, count_empty=False, kl_coef=0.02)
    assert losses == dataclasses.replace(parity.parity("trl")[1], **want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loss.ratio=gspo", "cgrpo.loss.ratio = 'gspo': choose one of token, sequence"),
        ("loss.clip_low=-0.1", "cgrpo.loss.clip_low = -0.1 must be a number, at least 0"),
        ("loss.dual_clip=0.5", "cgrpo.loss.dual_clip = 0.5 must be a number, at least 1"),
        ("advantage.ddof=2", "cgrpo.advantage.ddof = 2: choose one of 0, 1"),
        ("a_full=mine", "cgrpo.a_full = 'mine': choose one of frozen, current"),
        ("tau=1.5", "tau = 1.5 must lie in .0, 1."),
        ("views.marc.keep=17", "views.marc.keep = 17 is above the 16 temporal patches that a video can have"),
        ("group=1", "cgrpo.group = 1: group-relative advantages need at least 2 rollouts"),
        ("reward_weights=(1.0,)", "cgrpo.reward_weights has 1 numbers for 2 rewards"),
        ("retention.eta_max=0.1", "eta_max must be at least tau"),
        ("ladder=('marc','none')", "cgrpo.view = 'none' is not one of config.views"),
    ],
)
def test_what_cannot_be_is_one_line(repo, change, words):
    key = change if change.startswith("views") else f"cgrpo.{change}"
    with pytest.raises(config.ConfigError, match=words):
        settings.experiment(str(repo / "experiments" / "quickstart.py"), [f"--config.{key}"])


def test_plain_grpo_asks_no_teacher_and_without_an_anchor_needs_none():
    stage = stage_settings.stage("grpo")
    assert stage.view == "full" and not stage_settings.asks_teacher(stage) and stage_settings.needs_teacher(stage)
    stage.beta = 0.0
    assert not stage_settings.needs_teacher(stage)
    stage = stage_settings.stage("cgrpo")
    stage.update(beta=0.0, a_full="current")
    assert stage_settings.asks_teacher(stage) and not stage_settings.needs_teacher(stage)


def shout(completions, prompts, source, **columns):
    return [float(text.isupper()) + len(prompt) / 100 + (source == "b") for text, prompt, source in
            zip(completions, prompts, source, strict=True)]  # fmt: skip


def moody(completions):
    return [float("nan") if text == "YES" else 1.0 for text in completions]


def test_rewards_of_ones_own_are_weighted_and_their_failures_told(tmp_path, capsys):
    stage = stage_settings.stage("cgrpo")
    stage.rewards = ("accuracy", "tests.test_cgrpo:shout", "tests.test_cgrpo:moody")
    stage.reward_weights = (1.0, 2.0, 0.5)
    words = {1: "<answer>4</answer>", 2: "YES"}
    tokenizer = types.SimpleNamespace(decode=lambda ids: words[ids[0]])
    run = types.SimpleNamespace(config={"c": stage}, workdir=tmp_path, tokenizer=tokenizer, watch=Watch())
    question = ["q" * 5, "q" * 7]
    rows = [[Record(i, text, "image", "numerical", (), "<answer>4</answer>", "x.png", extra={"source": source})]
            for i, (text, source) in enumerate(zip(question, "ab", strict=True))]  # fmt: skip
    asked = Asked(None, rows, np.array([70, 80]), None, style="plain")
    done = Completions(jnp.array([[[1], [2]], [[2], [1]]]), jnp.ones((2, 2, 1), bool), jnp.zeros((2, 2, 1)))
    got = grades.Grader(run, "c")(done, asked)
    np.testing.assert_array_equal(got.accuracy_bg, [[1, 0], [0, 1]])
    # shout: 1 for "YES", a hundredth of the question's length, 1 for source b; moody fails on "YES".
    np.testing.assert_allclose(got.reward_bg, [[1 + 0.1 + 0.5, 2.1], [2 * 2.07, 1 + 2 * 1.07 + 0.5]], rtol=1e-6)
    assert got.told["rewards/failed"] == (2.0, 12.0) and got.told["rewards/accuracy/mean"] == (2.0, 4.0)
    assert "sample 70: tests.test_cgrpo:moody: returned nan" in capsys.readouterr().err
    assert len((tmp_path / "c" / "reward_failures.jsonl").read_text().splitlines()) == 2
    shown = grades.rows(asked, got.texts_bg, accuracy=got.accuracy_bg)
    assert shown[1] == {"sample": 70, "prompt": "qqqqq", "completion": "YES", "solution": "<answer>4</answer>",
                        "accuracy": 0.0}  # fmt: skip
    stage.rewards = ("accuracy", "tests.test_cgrpo:nowhere", "format")
    with pytest.raises(config.ConfigError, match="config.c.rewards: reward 'tests.test_cgrpo:nowhere'"):
        grades.Grader(run, "c")


def test_shuffled_frames_are_the_same_frames():
    mask_bt = np.arange(6) < np.array([[6], [3]])
    patch_bt = np.where(mask_bt, np.arange(6) + 10, 0)
    index = VideoIndex(patch_bt, mask_bt, *[None] * 5)
    got = np.asarray(cgrpo.shuffled(index, jax.random.key(0)).patch_bt)
    np.testing.assert_array_equal(np.sort(got[0]), patch_bt[0])
    np.testing.assert_array_equal(np.sort(got[1, :3]), patch_bt[1, :3])
    np.testing.assert_array_equal(got[1, 3:], 0)
    assert (got[0] != patch_bt[0]).any()
