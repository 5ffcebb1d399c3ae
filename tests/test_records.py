"""Video-R1 records on real files, a published checkpoint (tiny, random) and a tiny PE-Core: every stage, then eval."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from test_end_to_end import tiny_encoder

from data_pipelines import sources
from marc_jax import pretrained, records, run, settings, stages
from marc_jax.config import ConfigError
from marc_jax.models import qwen25_vl
from marc_jax.tokenizer import QWEN25_ADDED
from tools import export_weights

PRESET = '''
import runpy


def get_config():
    c = runpy.run_path({preset!r})["get_config"]("")
    c.model = {{}}
    c.max_new_tokens = 6
    c.log_every, c.save_every = 1, 2
    c.data = {{"fps": 1.0, "max_frames": 8, "frame_tokens": 8, "buckets": (1, 2, 4), "workers": 0}}
    c.data.update(question_tokens=256, answer_tokens=64, root={root!r}, train={train!r}, test={train!r})
    c.init_from, c.encoder = {model!r}, {{"path": {encoder!r}}}
    for name, steps in (("sft", 3), ("cgrpo", 2), ("distill", 2)):
        c[name].update(videos=2, steps=steps)
        c[name].optimizer.update(learning_rate=1e-3)
    c.cgrpo.group = c.cgrpo.teacher_group = c.distill.group = 2
    c.eval.arms = {{key: c.eval.arms[key] for key in ("teacher", "blind", "untrained", "cgrpo")}}
    c.eval.batch = 2
    return c
'''


def rows():
    """Questions of every type about two videos and a picture."""
    kinds = ("multiple choice", "numerical", "OCR", "free-form", "regression")
    made = []
    for i, kind in enumerate(kinds):
        path, data_type = ("./photo.png", "image") if kind == "OCR" else (f"./{('bikes', 'dog')[i % 2]}.mp4", "video")
        options = ["A. two", "B. three"] if kind == "multiple choice" else []
        made.append({
            "problem_id": i, "problem": f"What is there, number {i}?", "data_type": data_type, "problem_type": kind,
            "options": options, "process": "<think>I look.</think>", "path": path, "data_source": "test",
            "solution": f"<answer>{'A' if options else i}</answer>",
        })  # fmt: skip
    return made


def tiny_model(folder: pathlib.Path) -> None:
    """A random model in the published form, with a byte-level tokenizer that has merges of the prompt's words."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([sources.TRAIN_TEMPLATE, *sources.TYPE_SUFFIX.values()] * 3, trainer)
    tok.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in QWEN25_ADDED[:14]])
    ids = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "pad_token_id": "<|endoftext|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    ids = {field: tok.token_to_id(name) for field, name in ids.items()}
    stops = (tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>"))
    cfg = qwen25_vl.tiny(
        vocab_size=tok.get_vocab_size() + 3, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        vision_hidden_size=16, eos_token_ids=stops, **ids,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    draw = lambda w: (0.1 * rng.standard_normal(w.shape) + ("norm" in str(w.axes))).astype(np.float32)  # noqa: E731
    export_weights.export(cfg, jax.tree.map(draw, qwen25_vl.describe(cfg)), folder, "float32")
    tok.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, repo, test_data):
    import cv2

    folder = tmp_path_factory.mktemp("files")
    media = folder / "media"
    media.mkdir()
    for name in ("bikes.mp4", "dog.mp4"):
        shutil.copyfile(test_data / "videos" / name, media / name)
    cv2.imwrite(str(media / "photo.png"), np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8))
    (folder / "train.json").write_text(json.dumps(rows()))
    tiny_model(folder / "model")
    tiny_encoder(folder / "pe")
    preset = str(repo / "experiments" / "marc_qwen25vl_3b.py")
    paths = {"root": media, "train": folder / "train.json", "model": folder / "model", "encoder": folder / "pe"}
    (folder / "tiny.py").write_text(PRESET.format(preset=preset, **{k: str(v) for k, v in paths.items()}))
    return folder


def start(repo, folder: pathlib.Path, entry: str, *arguments: str):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    command = [sys.executable, "-m", f"marc_jax.{entry}", f"--config={folder / 'tiny.py'}", *arguments]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=300)


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(place, repo):
    done = start(repo, place, "train", f"--workdir={place / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "run"


def test_every_stage_learns_from_files(trained):
    for stage, steps in (("sft", 3), ("cgrpo", 2), ("distill", 2)):
        logged = lines(trained / stage / "metrics.jsonl")
        assert [row["step"] for row in logged] == list(range(1, steps + 1))
        assert all(np.isfinite(row["loss"]) for row in logged), stage
