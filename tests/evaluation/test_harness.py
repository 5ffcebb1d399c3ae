"""A tiny checkpoint on a benchmark of real videos: answered, interrupted, resumed, scored by every rule, reported."""

import json
import shutil

import numpy as np
import pytest

from marc_jax import settings
from marc_jax.config import ConfigError
from marc_jax.evaluation import compare, harness
from marc_jax.models import qwen25_vl
from tools.bench import published


@pytest.fixture(scope="module")
def place(tmp_path_factory, test_data):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "videos" / "data").mkdir(parents=True)
    for name in ("bikes", "dog"):
        shutil.copyfile(test_data / "videos" / f"{name}.mp4", folder / "videos" / "data" / f"{name}.mp4")
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "videoID": "bikes",
        "task_type": "Counting Problem", "question": "How many?", "options": ["A. 1.", "B. 2.", "C. 3.", "D. 4."],
        "answer": "C",
    }  # fmt: skip
    rows = [row | {"question_id": str(i), "videoID": ("bikes", "dog")[i % 2]} for i in range(5)]
    rows[4] |= {"videoID": "gone", "duration": "long"}
    (folder / "q.json").write_text(json.dumps(rows, indent=1))
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vision_hidden_size": 16}
    published.write_model(folder / "model", qwen25_vl.tiny(**sizes), np.float32, scale=0.1)
    return folder


@pytest.fixture
def config(place, repo):
    overrides = {
        "data.test": str(place / "q.json"), "data.root": str(place / "videos"),
        "data.max_frames": 8, "data.buckets": (2, 4), "data.frame_tokens": 8, "data.fps": 1.0, "data.workers": 0,
        "data.question_tokens": 512, "max_new_tokens": 4, "eval.batch": 8, "model.dtype": "float32",
        "model.frozen_dtype": "float32", "data.memory": str(place / "memory"),
        "data.frames": str(place / "frames"),
    }  # fmt: skip
    told = [f"--config.{key}={value}" for key, value in overrides.items()]
    return settings.experiment(f"{repo}/experiments/eval_benchmark.py:videomme", told).copy_and_resolve_references()


def test_rows_that_cannot_be_used_stop_the_evaluation_and_are_listed(config, place, tmp_path, capsys):
    with pytest.raises(ConfigError, match="1 of 5 rows cannot be used .--skip_bad leaves them out"):
        harness.evaluate(config, str(place / "model"), tmp_path, ["full"])
    assert "row 4, field 'path'" in (told := capsys.readouterr().err) and "(line " in told
    (listed,) = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert listed["row"] == 4 and listed["field"] == "path" and listed["line"] > 1


def test_an_evaluation_resumes_where_it_was_killed(config, place, tmp_path):
    config.data.skip_bad = True
    arms, model = ["full", "blind"], str(place / "model")
    results = harness.evaluate(config, model, tmp_path / "a", arms)
    assert len(list((place / "frames").rglob("*.zip"))) == 2  # of two videos
    own = {arm["key"]: arm for arm in results["arms"] if "paper" not in arm["key"]}
    assert set(own) == {"full", "blind"} and own["full"]["n"] == 4
    assert own["full"]["visual_tokens"] > own["blind"]["visual_tokens"] == 0
    assert set(results["scores"]) == {"videor1", "strict", "published"}
    assert results["split"].startswith("4 of the 5 questions")
    lines = (tmp_path / "a" / "predictions" / "full.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem_id"] for line in lines} == {"0", "1", "2", "3"}
    report = (tmp_path / "a" / "report.md").read_text()
    assert "MARC-3B, 1 frame (paper)" in report and "By length of the video" in report and "Cost" in report
    assert json.loads((tmp_path / "a" / "submission" / "full" / "output_videomme.json").read_text())

    # Killed in the middle of a line: what was whole stays as it is, the rest is answered again.
    file = tmp_path / "a" / "predictions" / "full.jsonl"
    first = json.loads(lines[0]) | {"completion": "kept"}
    file.write_text(json.dumps(first) + "\n" + lines[1][:20])
    again = harness.evaluate(config, model, tmp_path / "a", arms)
    found = {json.loads(line)["problem_id"]: json.loads(line) for line in file.read_text().splitlines()}
    assert len(found) == 4 and found[first["problem_id"]]["completion"] == "kept"
    before = {json.loads(line)["problem_id"]: json.loads(line)["completion"] for line in lines}
    assert all(found[i]["completion"] == text for i, text in before.items() if i != first["problem_id"])
    assert again["scores"]["strict"]["full"]["n"] == 4

    file.write_text(lines[0][:20])  # killed in the very first line
    harness.evaluate(config, model, tmp_path / "a", arms)
    assert {json.loads(line)["problem_id"] for line in file.read_text().splitlines()} == {"0", "1", "2", "3"}

    compared = harness.evaluate(config, model, tmp_path / "b", ["blind"], against=str(tmp_path / "a"))
    (row,) = compare.compared(tmp_path / "a", tmp_path / "b", "strict")
    assert (row["a"], row["b"], row["n"], row["difference"], row["p"]) == ("blind", "blind", 4, 0, 1)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--arms=full,blind"]) == 0
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--arms=full,marc"]) == 2
    assert compare.main([str(tmp_path / "a"), str(tmp_path)]) == 2
    assert {c["b"] for c in compared["comparisons"]} == {"against full", "against blind"}
    assert next(c for c in compared["comparisons"] if c["b"] == "against blind")["difference"] == 0

    config.max_new_tokens = 5
    with pytest.raises(ConfigError, match="made with other decoding"):
        harness.evaluate(config, model, tmp_path / "a", arms)


def test_what_cannot_be_is_said_before_anything_is_read(config, place, tmp_path):
    with pytest.raises(ConfigError, match="arms marc retrieve.*--arms=blind,full,whole"):
        harness.evaluate(config, str(place / "model"), tmp_path, ["marc"])
    with pytest.raises(ConfigError, match="'half' is not one of"):
        harness.evaluate(config, str(place / "model"), tmp_path, ["half"])
    with pytest.raises(ConfigError, match="--against.*no finished evaluation"):
        harness.evaluate(config, str(place / "model"), tmp_path, ["full"], against=str(tmp_path))
    config.data.root = ""
    with pytest.raises(ConfigError, match="config.data.root"):
        harness.evaluate(config, str(place / "model"), tmp_path, ["full"])


def test_questions_in_ones_own_words(place, tmp_path):
    from marc_jax.evaluation.direct import Direct

    options = {"max_frames": 4, "fps": 1.0, "frame_tokens": 8, "batch": 8, "question_tokens": 64, "dtype": "float32"}
    with pytest.raises(ConfigError, match="name an encoder"):
        Direct(str(place / "model"), tmp_path, view="marc", **options)
    direct = Direct(str(place / "model"), tmp_path, **options)
    dog, bikes = (str(place / "videos" / "data" / f"{name}.mp4") for name in ("dog", "bikes"))
    said = direct.answer([("What?", dog), ("What?", bikes), ("Who is there?", dog)], 3)
    assert len(said) == 3 and direct.answer([("What?", dog)], 3) == said[:1]
    with pytest.raises(ConfigError, match="does not exist"):
        direct.answer([("What?", "/no/such/file.mp4")], 3)


def test_events_as_moments(place, tmp_path, repo, config):
    from marc_jax.evaluation import grounding

    published.write_encoder(tmp_path / "pe")
    shutil.copyfile(place / "videos" / "data" / "dog.mp4", place / "videos" / "dog.mp4")
    row = {"query": "A dog.", "duration": 10, "vid": "dog", "relevant_windows": [[0, 4]], "relevant_clip_ids": [0, 1],
           "saliency_scores": [[4, 3, 2], [1, 4, 3]]}  # fmt: skip
    rows = [row | {"qid": 1}, row | {"qid": 2, "relevant_windows": [[2, 1]]}]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config.eval.benchmark, config.data.test, config.data.skip_bad = "qvhighlights", str(tmp_path / "val.jsonl"), True
    config.data.memory = ""
    with pytest.raises(ConfigError, match="encoder"):
        grounding.evaluate(config, str(place / "model"), tmp_path / "out")
    config.encoder.path = str(tmp_path / "pe")
    found = grounding.evaluate(config, str(place / "model"), tmp_path / "out")
    assert (found["n"], found["total"]) == (1, 2) and 0 <= found["metrics"]["MR-full-R1@0.5"] <= 100
    (line,) = (tmp_path / "out" / "hl_submission.jsonl").read_text().splitlines()
    said = json.loads(line)
    scores = [score for _, _, score in said["pred_relevant_windows"]]
    assert said["qid"] == 1 and scores == sorted(scores, reverse=True) and len(said["pred_saliency_scores"]) == 5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 of 2 queries" in report and "| R1@0.5 | " in report and " | 53.94 |" in report


def test_events_become_windows_and_clips():
    from marc_jax.evaluation import grounding

    truth = {"qid": 1, "query": "q", "vid": "v", "duration": 10}
    said = grounding.predicted(truth, np.array([[0.0, 4.0], [6.0, 10.0]]), np.array([0.2, 0.9]))
    assert said["pred_relevant_windows"] == [[6.0, 10.0, 0.9], [0.0, 4.0, 0.2]]
    assert said["pred_saliency_scores"] == pytest.approx([0.2, 0.2, -0.8, 0.9, 0.9])


def test_clips_and_folders_of_pictures(place, tmp_path, config):
    import cv2

    root = tmp_path / "videos"
    (root / "star" / "Charades_v1_480").mkdir(parents=True)
    shutil.copyfile(place / "videos" / "data" / "dog.mp4", root / "star" / "Charades_v1_480" / "v.mp4")
    pictures = root / "tvqa" / "frames_fps3_hq" / "s01"
    pictures.mkdir(parents=True)
    for number in range(1, 25):
        cv2.imwrite(str(pictures / f"{number:05d}.jpg"), np.full((60, 80, 3), 9 * number, np.uint8))
    row = {"question": "What?", "candidates": ["x", "y"], "answer": "y", "start": 0.5, "end": 3}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "action_sequence.json").write_text(json.dumps(
        [row | {"video": "v.mp4"}, row | {"video": "v.mp4", "start": 2, "end": 6}]
    ))  # fmt: skip
    (tmp_path / "json" / "episodic_reasoning.json").write_text(json.dumps([row | {"video": "s01"}]))
    config.eval.benchmark, config.data.test, config.data.root = "mvbench", str(tmp_path / "json"), str(root)
    config.data.memory = str(tmp_path / "memory")
    found = harness.evaluate(config, str(place / "model"), tmp_path / "out", ["whole"])
    assert found["scores"]["strict"]["whole"]["n"] == 3 and not (tmp_path / "out" / "bad_rows.jsonl").exists()
    assert set(found["scores"]["strict"]["whole"]["per_type"]) == {"action_sequence", "episodic_reasoning"}
