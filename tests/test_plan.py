"""--dry_run: what each experiment would do, without weights, videos or anything written."""

import json
import pathlib

import pytest

from marc_jax import config, plan, settings
from marc_jax.evaluation import harness

TRAINED = [f"marc_ablations.py:{name}" for name in ("main", "no_retrieval", "no_retention", "sft", "sft_whole")]
TRAINED += ["marc_qwen25vl_3b.py", "marc_qwen25vl_7b.py", "synthetic.py", "quickstart.py"]
ASKED = ["eval_benchmark.py:mmvu", "eval_frames.py:videomme,16", "eval_frames.py:videomme,4", "eval_budgets.py:mvbench"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_experiment_says_what_it_would_do(name, repo, monkeypatch):
    monkeypatch.chdir(repo)
    config = settings.experiment(f"{repo}/experiments/{name}", [])
    told = plan.training(config)
    assert all(f"stage {stage} (" in told for stage in config.stages) and "settings:" in told
    if config.model.size == "3b":
        assert "decoder 3.09 B parameters" in told and "still to be given: config.init_from" in told
        retrieves = any(view.select == "retrieve" for view in config.views.values())
        assert ("config.encoder.path" in told) == retrieves


def test_only_the_named_setting_differs_between_ablations(repo):
    configs = {name.split(":")[1]: settings.experiment(f"{repo}/experiments/{name}", []) for name in TRAINED[:5]}
    flat = {name: config.flat(c) for name, c in configs.items()}
    main, without = flat["main"], flat["no_retention"]
    assert {k for k in main if main[k] != without[k]} == {"title", "cgrpo.alpha"} and without["cgrpo.alpha"] == 0
    assert configs["no_retrieval"].views[configs["no_retrieval"].cgrpo.view].select == "all"
    assert configs["main"].views[configs["main"].cgrpo.view].select == "retrieve"
    assert configs["sft"].stages == ("sft",) and configs["sft"].sft.view == "marc"


@pytest.mark.parametrize("name", ASKED)
def test_an_evaluation_says_what_it_would_ask(name, repo, tmp_path):
    given = [f"--config.{key}" for key in ("model.size=3b", f"encoder.path={tmp_path}")]
    experiment = settings.experiment(f"{repo}/experiments/{name}", given)
    told = plan.benchmark(experiment, harness.chosen(experiment, ()))
    assert all(f"arm {key}: the start through" in told for key in experiment.eval.arms)
    assert "still to be given: config.data.test" in told


def test_rows_that_cannot_be_used_are_counted_with_their_lines(repo, tmp_path):
    row = {"problem_id": 0, "problem": "What?", "data_type": "video", "problem_type": "free-form", "path": "./a.mp4",
           "solution": "<answer>x</answer>"}  # fmt: skip
    (tmp_path / "a.mp4").write_bytes(b"")
    rows = [row, {**row, "problem_id": 1, "path": "../b.mp4"}, {**row, "problem_id": 2, "problem": 3}]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    given = {"data.train": tmp_path / "train.json", "data.root": tmp_path, "data.sample": 1}
    overrides = [f"--config.{key}={value}" for key, value in given.items()]
    before = sorted(pathlib.Path(tmp_path).iterdir())
    told = plan.training(settings.experiment(f"{repo}/experiments/marc_qwen25vl_3b.py", overrides))
    assert f"1 of 3 rows of {tmp_path / 'train.json'} can be used, 1 files; 1 of them are drawn" in told
    assert "row 1, field 'path': ../b.mp4 leads out of the data root (line 10)" in told
    assert "row 2, field 'problem': is 3, not a text (line 18)" in told
    assert sorted(pathlib.Path(tmp_path).iterdir()) == before
