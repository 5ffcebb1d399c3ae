"""Video-R1 records on real files, a published checkpoint (tiny, random) and a tiny PE-Core: every stage, then eval."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import patches, sandbox
from marc_jax import batches, messages, pretrained, records, run, settings, sharding, stages
from marc_jax.archive import Archive
from marc_jax.config import ConfigError
from marc_jax.memory import indexer, store
from marc_jax.memory import view as views
from marc_jax.models import qwen25_vl
from marc_jax.rl import rollout
from tools import export_weights
from tools.bench import published

PRESET = '''
import runpy


def get_config():
    c = runpy.run_path({preset!r})["get_config"]("")
    c.model = {{}}
    c.max_new_tokens = 6
    c.log_every, c.save_every = 1, 2
    c.data = {{"fps": 1.0, "max_frames": 8, "frame_tokens": 8, "buckets": (4,), "workers": 0}}
    c.data.update(question_tokens=256, answer_tokens=64, root={root!r}, train={train!r})
    c.init_from, c.encoder = {model!r}, {{"path": {encoder!r}}}
    for name, steps in (("sft", 3), ("cgrpo", 2), ("distill", 2)):
        c[name].update(videos=2, steps=steps)
        c[name].optimizer.update(learning_rate=1e-3)
    c.cgrpo.lora = {{"rank": 2, "patterns": ("text/layers/.*/kernel", "vision/merger/.*/kernel")}}
    c.cgrpo.group = c.cgrpo.teacher_group = c.distill.group = 2
    c.eval.arms = {{key: c.eval.arms[key] for key in ("teacher", "cgrpo")}}
    for key, field in (("uniform", "select"), ("evs", "method"), ("fastv", "method")):
        c.views[key] = {{"select": "all", "method": "keep", "share": 0.25, "layer": 1, field: key}}
        c.eval.arms[key] = {{"stage": "", "view": key, "label": key}}
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
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vision_hidden_size": 16}
    published.write_model(folder / "model", qwen25_vl.tiny(**sizes), np.float32, scale=0.1)
    published.write_encoder(folder / "pe")
    preset = str(repo / "experiments" / "marc_qwen25vl_3b.py")
    paths = {"root": media, "train": folder / "train.json", "model": folder / "model", "encoder": folder / "pe"}
    (folder / "tiny.py").write_text(PRESET.format(preset=preset, **{k: str(v) for k, v in paths.items()}))
    return folder


def start(repo, folder: pathlib.Path, entry: str, *arguments: str):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    command = [sys.executable, "-m", f"marc_jax.{entry}", f"--config={folder / 'tiny.py'}", *arguments]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=900)


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
    asked = lines(trained / "teacher.jsonl")
    assert len(asked) == len({row["sample"] for row in asked}) == 4  # the teacher answers each question once


def test_a_resumed_stage_gives_the_same_losses(trained, place, repo):
    before = lines(trained / "sft" / "metrics.jsonl")
    shutil.rmtree(trained / "sft" / "checkpoints" / "step_00000003")
    again = start(repo, place, "train", f"--workdir={trained}", "--config.only=('sft',)")
    assert again.returncode == 0, again.stderr[-3000:]
    assert lines(trained / "sft" / "metrics.jsonl") == before


def test_two_processes_share_the_reading_and_learn_the_same(trained, place, repo, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        told = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
    arguments = (f"--workdir={tmp_path}", "--config.only=('sft',)", told, "--processes=2")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pair = list(pool.map(lambda i: start(repo, place, "train", *arguments, f"--process={i}"), range(2)))
    assert all(done.returncode == 0 for done in pair), [done.stderr[-2000:] for done in pair]
    one, two = (store.MemoryReader(folder / "memory", None) for folder in (trained, tmp_path))
    assert two.shards == 2 and set(one) == set(two) and all((one[k].tokens == two[k].tokens).all() for k in one)
    losses = [[row["loss"] for row in lines(folder / "sft" / "metrics.jsonl")] for folder in (trained, tmp_path)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_decoder_that_dies_costs_only_its_file(trained, place, tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox.Pool.__init__.__kwdefaults__, "decoder", "fake_decoders:read_or_fail")
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "data_pipelines")
    shutil.copytree(place / "media", tmp_path / "media")
    shutil.copyfile(place / "media" / "dog.mp4", tmp_path / "media" / "segfault.mp4")
    made = rows()
    made[1]["path"] = "./segfault.mp4"
    (tmp_path / "train.json").write_text(json.dumps(made))
    config = settings.experiment(str(place / "tiny.py"), [f"--config.data.root={tmp_path / 'media'}"])
    here = run.prepare(config, tmp_path)
    with pytest.raises(ConfigError, match="1 of 5 rows cannot be used .* 1: ./segfault.mp4: its decoder died"):
        records.open_records(here, str(tmp_path / "train.json"), "train")


def test_the_teacher_can_be_asked_beforehand(trained, place, repo):
    """The questions that training met are not asked again; the rest come by the same rollouts in any batch."""
    before = lines(trained / "teacher.jsonl")
    done = start(repo, place, "precompute", f"--workdir={trained}", "--stage=cgrpo")
    assert done.returncode == 0 and "5 questions in " in done.stderr, done.stderr[-3000:]
    after = lines(trained / "teacher.jsonl")
    assert after[: len(before)] == before and len(after) == len({row["sample"] for row in after}) == 5
    refused = start(repo, place, "precompute", f"--workdir={trained}", "--stage=sft")
    assert refused.returncode == 2 and "config.sft compares with no frozen teacher" in refused.stderr


def test_eval_and_export(trained, place, repo):
    asked = (f"--checkpoint={trained}", f"--config.data.test={place / 'train.json'}", f"--out={place / 'eval'}")
    done = start(repo, place, "eval", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((place / "eval" / "results.json").read_text())
    assert results["split"].startswith("5 of 5 questions of ")
    tokens = {arm["key"]: arm["visual_tokens"] for arm in results["arms"]}
    assert tokens["teacher"] > tokens["cgrpo"] > 0 and all(arm["n"] == 5 for arm in results["arms"])
    for baseline in ("uniform", "evs", "fastv"):
        assert abs(tokens[baseline] - 0.25 * tokens["teacher"]) < 0.5, baseline
    checkpoint, out = f"--checkpoint={trained / 'cgrpo' / 'checkpoints'}", place / "exported"
    assert export_weights.main([checkpoint, f"--out={out}", "--dtype=float32"]) == 0
    assert pretrained.config(out) == pretrained.config(place / "model")
    pretrained.check(out, pretrained.config(place / "model"))


def test_a_run_on_files_indexes_and_answers(trained, place, tmp_path):
    videos = [str(place / "media" / name) for name in ("bikes.mp4", "dog.mp4")]
    Archive(tmp_path / "memory", str(trained)).index(videos)
    told = Archive(tmp_path / "memory")
    warm, cold = told.ask("What is there?", videos[1]), Archive(None, str(trained)).ask("What is there?", videos[1])
    assert told.stage == "cgrpo" and told.view == told.here.view("marc") and 0 < warm.tokens < warm.all_tokens
    assert (warm.text, warm.tokens, warm.events) == (cold.text, cold.tokens, cold.events)
    assert Archive(tmp_path / "memory", str(trained / "sft")).ask("What is there?").tokens == warm.tokens


def opened(trained, place, rows=None, **data):
    """(run, its records) in this process, over the memory that training made."""
    file = place / "these.json"
    file.write_text(json.dumps(rows if rows is not None else json.loads((place / "train.json").read_text())))
    changes = {"train": file, "memory": trained / "memory", **data}
    given = [f"--config.data.{key}={value}" for key, value in changes.items()]
    workdir = place / "here"
    workdir.mkdir(exist_ok=True)
    here = run.prepare(settings.experiment(str(place / "tiny.py"), given), workdir)
    return here, records.open_records(here, str(file), "train")


def test_a_batch_reads_what_the_published_processor_would(trained, place):
    """Tokens, positions and visual tokens of the teacher's prompt, from memory and padded, equal those of messages."""
    here, source = opened(trained, place, tokens="float32")
    params = pretrained.load(place / "model", here.cfg, qwen25_vl.abstract(here.cfg))
    model, view = qwen25_vl.bind(here.cfg, params), here.view("full")
    asked = source.asked([0, 1, 2])
    index, texts = asked.index(), [text for row in asked.texts_bg for text in row]
    kept = view.kept(asked.sizes.patches, here.sizes.event)
    prompt = here.prompter.whole(texts, kept, index.mask_bt.sum(1), asked.sizes, asked.shapes)
    visual = views.select(view, index, None, asked.bank, here.sizes.event, None)
    vis_bnd, prompt = views.make_encode(view, here.grid_hw, 1.0)(model, visual, jax.tree.map(jax.numpy.asarray, prompt))
    prompt = rollout.closed_up(prompt)
    for b, (record, text) in enumerate(zip(source.records[:3], texts, strict=True)):
        path, image = str(place / "media" / record["path"]), record["path"].endswith("png")
        part = {"image": path, "max_pixels": 8 * 28 * 28} if image else {"video": path, "fps": 1.0, "max_frames": 8}
        budget = patches.VideoBudget(8 * 28 * 28, frame_limit=8 * 28 * 28)
        turn = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
        want = messages.process(here.tokenizer, turn, budget=budget)
        n = len(want.prompt.tokens)
        assert prompt.mask_bp[b].sum() == n and prompt.tokens_bp[b, :n].tolist() == want.prompt.tokens.tolist()
        np.testing.assert_array_equal(prompt.pos_3bp[:, b, :n], want.prompt.pos)
        assert prompt.next_pos_b[b] == want.prompt.next_pos
        rows = np.asarray(prompt.vis_index_bp[b, :n])
        got = np.asarray(vis_bnd[b])[rows[rows >= 0]]
        encode = lambda pixels, hw: model.vision(jax.numpy.asarray(pixels), hw)  # noqa: E731
        close = np.abs(got - messages.encode_visuals(encode, [want])[0])
        assert close.max() < 0.05 and close.mean() < 0.005  # stored in bfloat16


def test_padding_of_patches_and_videos_changes_nothing(trained, place):
    """Merged from three retrieved events, padded and not: the same tokens at the same places."""
    here, source = opened(trained, place)
    model = qwen25_vl.bind(here.cfg, pretrained.load(place / "model", here.cfg, qwen25_vl.abstract(here.cfg)))
    asked, view = source.asked([1]), here.view("marc")
    index, shape = asked.index(), asked.shapes[0]
    own, patches_t = int(np.prod(shape.hw)), int(index.mask_bt.sum())
    assert own < here.prompter.tokens_per_patch and patches_t < asked.sizes.patches

    def look(bank, index, prompter, shapes, grid_hw):
        prompt = jax.tree.map(jax.numpy.asarray, prompter.whole(*asked.texts_bg, 1, [patches_t], asked.sizes, shapes))
        visual = views.select(view, index, asked.query_bd, bank, here.sizes.event, None)
        vis_bnd, prompt = views.make_encode(view, grid_hw, shape.rate)(model, visual, prompt)
        return np.asarray(vis_bnd)[0, :own], rollout.closed_up(prompt)

    padded, there = look(asked.bank, index, here.prompter, asked.shapes, here.grid_hw)
    cut = {"patch_bt": index.patch_bt[:, :patches_t], "mask_bt": index.mask_bt[:, :patches_t]}
    cut = dataclasses.replace(index, **cut, event_bt=index.event_bt[:, :patches_t], shapes=None)
    alone = batches.Prompter(here.tokenizer, shape.hw, shape.rate, here.prompter.system)
    exact, here_too = look(asked.bank[:, :patches_t, : 4 * own], cut, alone, None, (2 * shape.hw[0], 2 * shape.hw[1]))
    np.testing.assert_allclose(padded, exact, atol=1e-5)
    n = int(here_too.mask_bp.sum())
    assert there.mask_bp.sum() == n and (there.pos_3bp[:, :, :n] == here_too.pos_3bp[:, :, :n]).all()


def test_steps_are_functions_of_their_number_and_epochs_meet_every_question_once(trained, place):
    _, source = opened(trained, place)
    draws = [source.draw("sft", step, 2, 1, None, None) for step in range(5)]
    again = source.draw("sft", 3, 2, 1, None, None)
    assert again.ids_b.tolist() == draws[3].ids_b.tolist() and (again.bank == draws[3].bank).all()
    seen = [i for asked in draws for i in asked.ids_b.tolist()]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5)) and seen[:5] != seen[5:]
    assert [asked.image_b.sum() for asked in draws] == [(asked.ids_b == 2).sum() for asked in draws]
    packed = [source.draw("sft", step, 1, 2, None, None) for step in range(3)]  # two videos of two, a picture of one
    met = [[record.row for record in asked.questions_bg[0]] for asked in packed]
    assert sorted(map(tuple, met)) == [(0, 4), (1, 3), (2,)]
    assert [asked.ids_b.tolist() for asked in packed] == [row[:1] for row in met]
    assert all(len({record.path for record in asked.questions_bg[0]}) == 1 for asked in packed)


def test_several_questions_about_one_video_share_a_row(trained, place):
    """Their loss is that of the same questions in rows of their own, token by token."""
    here, source = opened(trained, place)
    shared, own = (sft_step(here, source, view="whole", questions=n, videos=rows) for n, rows in ((2, 3), (1, 5)))
    assert shared["loss"][1] == own["loss"][1]
    np.testing.assert_allclose(shared["loss"][0], own["loss"][0], rtol=1e-5)


def sft_step(here, source, **keys):
    """Metrics of an SFT stage's first step, with these keys of its settings."""
    config = here.config.copy_and_resolve_references()
    config.sft.update(init="", **keys)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    now = dataclasses.replace(here, config=config, mesh=mesh, sources={config.sft.file: source})
    first, draw, learn, _ = stages.build(now, "sft")
    return jax.device_get(learn(first, draw(0))[1])


def packed_rows(here, source, view):
    """(Packs, their max_length): as long as the two longest questions through this view together."""
    max_length = int(np.sort(source._lengths([here.view(view)])[0])[-2:].sum())
    return source.packs("sft", {view: here.view(view)}, max_length, 3), max_length


@pytest.mark.parametrize("view", ["full", "marc"])
def test_packed_questions_have_the_loss_and_gradient_of_rows_of_their_own(trained, place, view):
    """All five about two videos and a picture, through every token and through what a question retrieves."""
    here, source = opened(trained, place)
    packs, max_length = packed_rows(here, source, view)
    keys = {"view": view, "max_length": max_length, "max_segments": 3}
    packed = sft_step(here, source, packing=True, videos=len(packs.rows), **keys)
    own = sft_step(here, source, videos=5, **keys)
    assert len(packs.rows) == 3 and packed["loss"][1] == own["loss"][1]
    np.testing.assert_allclose(packed["loss"][0], own["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(packed["grad_norm"], own["grad_norm"], rtol=1e-4)
    real, places = packed["packed_fill"]
    assert places == 3 * max_length and real == packed["num_tokens"] == packs.tokens


def test_packed_steps_are_functions_of_their_number_and_meet_every_question_once(trained, place):
    here, source = opened(trained, place)
    packs, max_length = packed_rows(here, source, "full")
    assert len(packs.rows) == 3 and packs is source.packs("sft", {"full": here.view("full")}, max_length, 3)
    draws = [source.draw_packed("sft", step, 1, packs) for step in range(2 * len(packs.rows))]
    again = source.draw_packed("sft", 3, 1, packs)
    assert again.ids_b.tolist() == draws[3].ids_b.tolist() and (again.bank == draws[3].bank).all()
    seen = [asked.ids_b[asked.real_b].tolist() for asked in draws]
    for epoch in (seen[: len(packs.rows)], seen[len(packs.rows) :]):
        assert sorted(i for row in epoch for i in row) == list(range(5))
    assert all(len(asked.ids_b) == packs.segments for asked in draws)


def test_a_question_that_no_packed_row_holds_is_one_line(trained, place):
    here, source = opened(trained, place)
    lengths = source._lengths([here.view("full")])[0]
    most, i = lengths.max(), lengths.argmax()
    for shorter, count in ((1, (lengths == most).sum()), (most, 5)):
        words = f"max_length = {most - shorter}: {count} of 5 questions are longer, .*'full'; the longest, row {i} .*"
        with pytest.raises(ConfigError, match=f"{words}has {most} tokens: set max_length to {most}"):
            source.packs("sft", {"full": here.view("full")}, most - shorter, 3)


def test_rows_that_cannot_be_used_are_listed_and_left_out_only_on_request(trained, place):
    (place / "media" / "broken.mp4").write_bytes(b"no video")
    good = rows()
    changes = (
        {"path": "./absent.mp4"}, {"path": "../secret.mp4"}, {"path": "./broken.mp4"}, {"solution": 3},
        {"problem": "why " * 300},
    )  # fmt: skip
    bad = [good[1] | change for change in changes]
    with pytest.raises(ConfigError, match="4 of 10 rows cannot be used .* line 1: ./absent.mp4: .*does not exist") as e:
        opened(trained, place, good + bad)  # before anything is decoded
    assert "--config.data.skip_bad=True" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="1 of 6 rows cannot be used .* line 1: ./broken.mp4: "):
        opened(trained, place, [*good, bad[2]])
    _, source = opened(trained, place, good + bad, skip_bad=True)
    assert len(source.records) == 5 and len(source.unreadable) == 5
    listed = lines(place / "here" / "these.bad.jsonl")
    assert [(line["row"], line["line"]) for line in listed] == [(row, 1) for row in (5, 6, 7, 8, 9)]
    assert "leads out of the data root" in listed[1]["reason"] and "solution: is 3, not a text" in listed[3]["reason"]
    assert "tokens, config.data.question_tokens = 256" in listed[4]["reason"]
    _, some = opened(trained, place, good * 4, sample=7)
    _, same = opened(trained, place, good * 4, sample=7)
    assert [r["problem_id"] for r in some.records] == [r["problem_id"] for r in same.records]
    assert len(some.records) == 7 == len({r["problem_id"] for r in some.records})
    with pytest.raises(ConfigError, match="5 of 5 rows cannot be used"):
        opened(trained, place, bad, skip_bad=True)


def test_a_file_that_changed_is_read_anew(trained, place):
    path = place / "media" / "dog.mp4"
    shutil.copyfile(place / "media" / "bikes.mp4", place / "media" / "other.mp4")
    one = [rows()[0] | {"path": "./other.mp4"}]
    _, before = opened(trained, place, one)
    shutil.copyfile(path, place / "media" / "other.mp4")
    _, after = opened(trained, place, one)
    assert before.asked([0]).shapes != after.asked([0]).shapes


def test_fastv_needs_layers_of_the_model_that_is_there(place):
    config = settings.experiment(str(place / "tiny.py"), ["--config.views.fastv.layer=2"])
    with pytest.raises(ConfigError, match="views.fastv.layer = 2: 'fastv' needs layers after it, the model has 2"):
        run.prepare(config, place)


def test_what_a_preset_cannot_know_is_asked_for_at_once(place):
    given = [f"--config.{key}=" for key in ("init_from", "data.train", "encoder.path")] + ["--config.model.size=3b"]
    config = settings.experiment(str(place / "tiny.py"), given)
    with pytest.raises(ConfigError, match="needs config.init_from, .*; config.data.train, .*; config.encoder.path, "):
        run.prepare(config, place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.buckets=(1, 3)", "data.buckets = .* must end with data.max_frames / 2 = 4"),
        ("sft.visual=pixels", "sft: training on files takes visual = 'features'"),
        ("views.whole.method=pooled", "views.whole: 'pooled' needs videos of one size"),
        ("views.full.adaptive=True", "views.full.adaptive shares the budget of a merge: method must be 'merge'"),
        ("views.evs.method=token_learner", "views.evs: 'token_learner' needs videos of one size"),
        ("views.evs.method=visionzip", "views.evs: 'visionzip' needs the pixels, and a run on files reads stored"),
        ("views.uniform.shrink=2", "views.uniform: shrink = 2 needs the pixels"),
        ("views.uniform.select=bolt", "views.uniform: 'bolt' needs an embedding of every patch, and files have those"),
        ("sft.packing=True --config.sft.questions=2", "sft.packing: sft.questions = 2 share one video's"),
        ("cgrpo.micro_batches=3", "cgrpo.micro_batches = 3 must divide cgrpo.videos = 2"),
    ],
)
def test_settings_that_cannot_be_are_one_line(place, change, words):
    with pytest.raises(ConfigError, match=words):
        settings.experiment(str(place / "tiny.py"), [f"--{part}" for part in f"config.{change}".split(" --")])


@pytest.mark.parametrize("height,width,want", [(270, 480, 120), (480, 640, 130), (240, 320, 140), (320, 320, 144)])
def test_frames_have_video_r1s_sizes_and_never_more_than_their_padding(height, width, want):
    sampling = indexer.Published(2.0, 64, 128, 128)
    h, w = sampling.budget.size(height, width, 64)
    assert h * w // 28**2 == want <= sampling.tokens == 144
    assert np.prod(sampling.budget.size(20, 2000, 64)) <= 144 * 28**2
