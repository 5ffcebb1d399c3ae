"""Fine-tuning dual encoders on pairs: tiny random towers, real files, any number of devices, and what comes out."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_archive import write_run
from tokenizers import Tokenizer, models

from data_pipelines import clips, sandbox, sources
from marc_jax import checkpoint, contrastive, settings, sharding
from marc_jax.archive import Archive
from marc_jax.clip_tokenizer import OTHER_SPECIAL
from marc_jax.config import ConfigError
from marc_jax.memory import encoders
from marc_jax.models import perception_encoder, siglip2

PE = perception_encoder.tiny(image=(32, 1, 2, 64, 28, 14), text=(32, 1, 2, 64, 90, 12), output=16)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def film(path, colours, fps=8):
    """One second of each colour."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (64, 48))
    for colour in colours:
        for _ in range(fps):
            writer.write(np.full((48, 64, 3), COLOURS[colour][::-1], np.uint8))
    writer.release()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Towers as tools.convert_pe leaves them, videos, and a file of pairs."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    (folder / "videos").mkdir()
    pairs = []
    for i in range(8):
        colours = rng.permutation(list(COLOURS))[:3]
        film(folder / "videos" / f"{i}.mp4", colours)
        for j, colour in enumerate(colours):
            pairs.append({"path": f"videos/{i}.mp4", "text": f"all {colour}", "start": j + 0.1, "end": j + 0.9})
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "pe").mkdir()
    tokens = [*"abcdefghijklmnopqrstuvwxyz?", *OTHER_SPECIAL]
    vocab = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(folder / "pe" / "tokenizer.json"))
    meta = {"model": dataclasses.asdict(PE), "dtype": "bfloat16"}
    params = perception_encoder.init(PE, jax.random.key(0), jnp.bfloat16)
    checkpoint.save(folder / "pe", 0, {"params": params}, meta)
    return folder


def made(place, repo, *changes):
    told = {"init": place / "pe", "pairs": place / "pairs.json", "videos": 4, "clips": 3, "frames": 2, "steps": 12}
    told |= {"optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 0, "remat": "false"}
    changes = [*(f"--config.towers.{key}={value}" for key, value in told.items()), *changes]
    return settings.experiment(f"{repo / 'experiments' / 'retriever.py'}:towers", changes)


def losses(workdir) -> list[float]:
    rows = (workdir / "towers" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def mesh_of(ways: int):
    if len(jax.devices()) < ways:
        pytest.skip(f"needs {ways} (simulated) devices")
    return sharding.make_mesh(data=ways, fsdp=1, devices=jax.devices()[:ways])


@pytest.fixture(scope="module")
def trained(place, repo, tmp_path_factory):
    """(workdir, folder of the encoder) of 12 steps on one device."""
    workdir, config = tmp_path_factory.mktemp("trained"), made(place, repo, "--config.log_every=1")
    config.unlock().save_every = 8
    return workdir, contrastive.train_stage(config, "towers", workdir, mesh_of(1))


def test_the_loss_falls_and_the_result_opens(place, trained):
    workdir, folder = trained
    found = losses(workdir)
    assert len(found) == 12 and np.mean(found[-3:]) < 0.8 * np.mean(found[:3])
    before, after = encoders.open_encoder(place / "pe"), encoders.open_encoder(folder)
    assert after.cfg == before.cfg and after.fingerprint != before.fingerprint
    frame = np.full((1, 48, 64, 3), COLOURS["red"], np.uint8)
    texts = [f"all {colour}" for colour in COLOURS]
    assert after.embed_texts(texts).shape == (4, 16)
    score = [float((e.embed_frames(frame) @ e.embed_texts(texts).T)[0, 0]) for e in (before, after)]
    assert np.isfinite(score).all()


@pytest.mark.parametrize("ways", [2, 4])
def test_the_same_losses_on_any_number_of_devices(place, repo, trained, tmp_path, ways):
    contrastive.train_stage(made(place, repo, "--config.log_every=1"), "towers", tmp_path, mesh_of(ways))
    np.testing.assert_allclose(losses(tmp_path)[:4], losses(trained[0])[:4], atol=1e-5)  # then roundings add up


def test_a_run_that_was_killed_goes_on(place, repo, trained, tmp_path):
    """From its checkpoint of step 8, whatever came after it being lost."""
    workdir, folder = trained
    config = made(place, repo, "--config.log_every=1")
    shutil.copytree(workdir / "towers", tmp_path / "towers")
    shutil.rmtree(tmp_path / "towers" / "encoder")
    shutil.rmtree(tmp_path / "towers" / "checkpoints" / "step_00000012")
    again = contrastive.train_stage(config, "towers", tmp_path, mesh_of(1))
    assert losses(tmp_path) == losses(workdir)
    for a, b in zip(*(jax.tree.leaves(encoders.load_towers(f)[1]) for f in (folder, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_stage_is_left_alone_on_any_mesh(place, repo, trained, tmp_path):
    if 8 % len(jax.devices()):
        pytest.skip("8 videos a step do not divide over these devices")
    shutil.copytree(trained[0] / "towers", tmp_path / "towers")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.name != ".lock")
    contrastive.train(made(place, repo, "--config.towers.videos=8"), tmp_path)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.name != ".lock")


def test_index_takes_what_was_trained(place, repo, trained, tmp_path):
    write_run(tmp_path / "run", repo)
    video = place / "videos" / "0.mp4"
    done = Archive(tmp_path / "memory", tmp_path / "run", encoder=str(trained[1])).index([video])
    assert done.new == [str(video)] and not done.failed
    archive = Archive(tmp_path / "memory")
    assert archive.reader[str(video)].event_embeddings.shape[1] == 16 and archive.ask("all red").events


def test_siglip_and_parts_of_a_model(place, repo, tmp_path):
    cfg = siglip2.tiny()
    params, batch = siglip2.init(cfg, jax.random.key(0)), random_batch(cfg, 2, 2)
    run = jax.jit(lambda params: contrastive.loss(siglip2.bind(cfg, params), batch, 1.0)[0])
    value = [run(params | {"logit_bias": jnp.full(1, bias)}) for bias in (0.0, -10.0)]
    assert np.isfinite(value).all() and value[0] == value[1]  # the sigmoid loss's bias has no say in a softmax
    config = made(place, repo, "--config.towers.trainable=('text/.*',)", "--config.towers.steps=2")
    folder = contrastive.train_stage(config, "towers", tmp_path, mesh_of(1))
    before, after = (encoders.load_towers(f)[1] for f in (place / "pe", folder))
    same = jax.tree.map(lambda a, b: bool((a.astype(b.dtype) == b).all()), before, after)
    assert all(jax.tree.leaves(same["image"])) and not all(jax.tree.leaves(same["text"]))


def random_batch(cfg, v, c, f=2, seed=0):
    rng, n, size = np.random.default_rng(seed), v * c, cfg.image.size
    apart = rng.random((n, n)) < 0.7
    apart &= apart.T & ~np.eye(n, dtype=bool)
    own = np.stack([apart[i : i + c, i : i + c] for i in range(0, n, c)])
    tokens = rng.integers(1, cfg.text.vocab, (v, c, cfg.text.context)).astype(np.int32)
    mask = np.arange(c) < rng.integers(1, c + 1, v)[:, None]
    return contrastive.Batch(rng.integers(0, 256, (v, c, f, size, size, 3), np.uint8), tokens, mask, own, apart)


@pytest.mark.parametrize("in_batch", [0.0, 1.0, 0.3])
def test_the_loss_against_plain_numpy(in_batch):
    params = perception_encoder.init(PE, jax.random.key(1))
    model = perception_encoder.bind(PE, params)
    v, c, f = 4, 3, 2
    batch = random_batch(PE, v, c, f)
    total, count, values = jax.jit(lambda p: contrastive.loss(perception_encoder.bind(PE, p), batch, in_batch))(params)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    frames = np.asarray(model.embed_images(batch.frames.reshape(-1, *batch.frames.shape[3:])), np.float64)
    shown = unit(unit(frames).reshape(v * c, f, -1).mean(1))
    logit = np.exp(float(params["logit_scale"])) * unit(
        np.asarray(model.embed_texts(batch.tokens.reshape(v * c, -1)), np.float64)
    ) @ shown.T
    there, want, right = batch.mask.reshape(-1), 0.0, 0
    for i in np.flatnonzero(there):
        rivals = [j for j in range(v * c) if j == i or (there[j] and batch.apart[i, j])]
        own = [j for j in rivals if j // c == i // c]
        want += np.log(np.exp(logit[i, own]).sum()) - logit[i, i]
        for row in (logit[i], logit[:, i]):
            want += in_batch / 2 * (np.log(np.exp(row[rivals]).sum()) - row[i])
        right += logit[i, i] == logit[i, rivals].max()
    assert count == there.sum() and abs(float(total) - want) < 1e-3
    assert values["accuracy"][0] == right and 0 <= values["own_video"][0] <= count


def test_what_may_be_a_negative():
    pairs = [
        sources.Pair("a.mp4", "A dog", 0.0, 2.0), sources.Pair("./a.mp4", "a cat", 1.0, 3.0),
        sources.Pair("a.mp4", "rain", 3.0), sources.Pair("b.mp4", " a  DOG", 0.0, 2.0), sources.Pair("b.mp4", "all"),
    ]  # fmt: skip
    groups = clips.by_video(pairs, 2)
    assert [(g.path, len(g.pairs)) for g in groups] == [("a.mp4", 2), ("a.mp4", 1), ("b.mp4", 2)]
    apart = clips.apart(groups, 2)
    kept = [0, 1, 2, 4, 5]
    expected = np.ones((5, 5), bool) & ~np.eye(5, dtype=bool)
    for i, j in ((0, 1), (0, 3), (3, 4)):  # overlapping clips, one text, overlapping clips
        expected[i, j] = expected[j, i] = False
    np.testing.assert_array_equal(apart[np.ix_(kept, kept)], expected)


def test_a_file_that_cannot_be_read_is_masked_and_named(place, repo, tmp_path):
    rows = json.loads((place / "pairs.json").read_text())
    many = [row | {"path": f"videos/{i % 8}.mp4"} for i in range(25) for row in rows]
    for i, row in enumerate(many):  # 200 groups of three and one that is no video
        row["text"] = f"text {i}"
    shutil.copytree(place / "videos", tmp_path / "videos")
    (tmp_path / "wrong.mp4").write_text("no video\n")
    many.append(rows[0] | {"path": "wrong.mp4"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    stage = made(place, repo, f"--config.towers.pairs={tmp_path / 'pairs.jsonl'}").towers
    batches = contrastive.Batches(stage, lambda texts: np.ones((len(texts), 4), np.int32), 28, 0, mesh_of(1),
                                  tmp_path / "bad.jsonl")  # fmt: skip
    bad = len(batches.groups) - 1
    step = next(i for i in range(100) if bad in batches._rows[i]["row"])
    batch = batches.draw(step)
    place_in = int(np.flatnonzero(batches._rows[step]["row"] == bad)[0])
    assert not batch.mask[place_in].any() and batch.mask.any(1).sum() == 3
    assert json.loads((tmp_path / "bad.jsonl").read_text())["path"].endswith("wrong.mp4")
    assert "wrong.mp4" in [about["video"] for about in batches.samples(step).values()]


def test_a_decoder_that_dies_or_hangs_costs_only_its_video(place, repo, tmp_path, monkeypatch):
    monkeypatch.setitem(sandbox.Pool.__init__.__kwdefaults__, "decoder", "fake_decoders:read_or_fail")
    monkeypatch.syspath_prepend(repo / "tests" / "data_pipelines")
    bad = {"segfault.mp4": "its decoder died (signal SIGSEGV)", "hang.mp4": "decoding took longer than 5 s"}
    monkeypatch.setitem(contrastive.loader.iterate.__kwdefaults__, "max_bad_fraction", 1.0)
    rows = [{"path": name, "text": name} for name in ("0.mp4", *bad)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    for name in ("0.mp4", *bad):
        shutil.copyfile(place / "videos" / "0.mp4", tmp_path / name)
    told = f"--config.towers.pairs={tmp_path / 'pairs.json'}"
    stage = made(place, repo, told, "--config.towers.videos=3", "--config.towers.clips=1").towers
    batches = contrastive.Batches(stage, lambda texts: np.ones((len(texts), 4), np.int32), 28, 0, mesh_of(1),
                                  tmp_path / "bad.jsonl", seconds=5.0)  # fmt: skip
    with contextlib.closing(batches):
        batch = batches.draw(0)
    assert sorted(batch.mask[:, 0].tolist()) == [False, False, True] and batch.frames.any()
    told = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {pathlib.Path(line["path"]).name: line["reason"] for line in told} == bad


@pytest.mark.parametrize("row, reason", [
    ({"path": "a.mp4"}, "field 'text': is missing"),
    ({"path": "a.mp4", "text": " "}, "field 'text': is ' ', not a text"),
    ({"path": "a.mp4", "text": "x", "start": "1"}, "field 'start': is '1', not a number of seconds"),
    ({"path": "a.mp4", "text": "x", "start": 2, "end": 2}, "field 'end': is 2, not after the start 2"),
])  # fmt: skip
def test_a_wrong_pair_is_named(place, repo, tmp_path, row, reason):
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    with pytest.raises(ConfigError, match=f"pairs.json, row 0, {reason}"):
        contrastive.train_stage(
            made(place, repo, f"--config.towers.pairs={tmp_path / 'pairs.json'}"), "towers", tmp_path, mesh_of(1)
        )


def test_impossible_settings_are_refused(place, repo, tmp_path):
    for change, reason in (
        ("init=nowhere", "neither an earlier stage nor a folder"), ("pairs=nowhere.json", "is not a file of"),
        ("dtype=float8", "choose one of auto"), ("in_batch=-1.0", "must not be negative"), ("clips=0", "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            made(place, repo, f"--config.towers.{change}")
    with pytest.raises(ConfigError, match="trainable pattern 'nothing' matches no parameter"):
        contrastive.train_stage(made(place, repo, "--config.towers.trainable=nothing"), "towers", tmp_path, mesh_of(1))
