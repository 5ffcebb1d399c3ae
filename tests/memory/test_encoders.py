"""Encoders of events and questions: preprocessing, pooling, padding, opening from disk, and in the indexer."""

import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data_pipelines import video
from marc_jax.clip_tokenizer import OTHER_SPECIAL
from marc_jax.memory import embed, encoders, indexer, store
from marc_jax.models import clip_weights, perception_encoder, qwen25_vl, siglip2
from marc_jax.models.safetensors_io import WeightsError, write_folder
from marc_jax.tokenizer import TokenizerError
from tools import convert_pe

PE = perception_encoder.tiny()
SMALL = 28
CLIP_TOKENS = [*"abcdefghijklmnopqrstuvwxyz?", *OTHER_SPECIAL]


def words(texts):
    rows = np.zeros((len(texts), 12), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [88, *(ord(c) % 80 + 1 for c in text)][:11]
        row[: len(ids) + 1] = [*ids, 89]
    return rows


@pytest.fixture(scope="module")
def encoder():
    return encoders.DualEncoder(PE, perception_encoder.init(PE, jax.random.key(0)), words, chunk=4)


def frames(count=7, height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_squash_is_the_published_resize():
    image = pytest.importorskip("PIL.Image")
    got = encoders.squash(frames(2), 56)
    want = image.fromarray(frames(2)[1]).resize((56, 56), image.Resampling.BILINEAR)
    np.testing.assert_array_equal(got[1], np.asarray(want))
    ramp = np.broadcast_to(np.arange(0, 240, dtype=np.uint8)[None, :, None], (1, 60, 240, 3))
    np.testing.assert_allclose(encoders.squash(ramp, 60)[0, 30, 5:-5, 0], 4 * np.arange(60)[5:-5] + 1.5, atol=0.51)
    with pytest.raises(ValueError, match="uint8"):
        encoders.squash(np.zeros((1, 4, 4, 3), np.float32), 8)


def test_rows_do_not_depend_on_chunks(encoder):
    whole = encoder.embed_frames(frames())
    assert whole.shape == (7, 24) and whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_frames(frames()[5:6]), whole[5:6], atol=1e-5)
    texts = ["a", "red car", "the third", "x" * 40, "five"]
    both = encoder.embed_texts(texts)
    np.testing.assert_allclose(encoder.embed_texts(texts[1:2]), both[1:2], atol=1e-5)
    assert encoder.embed_frames(frames()[:0]).shape == encoder.embed_texts([]).shape == (0, 24)


def test_chunks_over_a_mesh_give_the_same(encoder):
    from marc_jax import sharding

    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    spread = encoders.DualEncoder(PE, encoder.params, words, chunk=4, mesh=sharding.make_mesh(data=8, fsdp=1))
    np.testing.assert_allclose(spread.embed_frames(frames()), encoder.embed_frames(frames()), atol=1e-5)
    np.testing.assert_allclose(spread.embed_texts(["a", "b"]), encoder.embed_texts(["a", "b"]), atol=1e-5)


def test_pooling_against_plain_numpy(encoder):
    emb, spans = encoder.embed_frames(frames()).astype(np.float64), [(0, 1), (1, 4), (4, 7)]
    query = encoder.embed_texts(["what"])[0]
    mean = encoders.pool_frames(emb, spans)
    for row, (a, b) in zip(mean, spans, strict=True):
        total = sum(emb[i] for i in range(a, b))
        np.testing.assert_allclose(row, total / np.sqrt((total**2).sum()), atol=1e-6)
    np.testing.assert_array_equal(encoders.nearest_frames(mean, query), mean)
    every = encoders.pool_frames(emb, spans, "max")
    assert every.shape == (3, 3, 24)
    score = encoders.nearest_frames(every, query) @ query
    np.testing.assert_allclose(score, [max(emb[a:b] @ query) for a, b in spans], atol=1e-6)
    with pytest.raises(ValueError, match="mean, max"):
        encoders.pool_frames(emb, spans, "median")


def clip_json(path, special=OTHER_SPECIAL):
    vocab = {text: i for i, text in enumerate([*CLIP_TOKENS[:-2], *special])}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(path))


def test_opened_from_safetensors_and_from_orbax_alike(tmp_path, monkeypatch):
    params = perception_encoder.init(PE, jax.random.key(3))
    tensors = list(clip_weights.published(PE, "open_clip", jax.device_get(params)))
    (tmp_path / "hub").mkdir()
    write_folder(tmp_path / "hub", [(n, t.dtype, t.shape) for n, t in tensors], iter(tensors))
    with pytest.raises(WeightsError, match="not PE-Core"):  # a size that nobody published
        encoders.open_encoder(tmp_path / "hub")
    monkeypatch.setattr(perception_encoder, "pe_core", lambda name: PE)
    with pytest.raises(TokenizerError, match="hub: holds neither"):
        encoders.open_encoder(tmp_path / "hub")
    clip_json(tmp_path / "hub" / "tokenizer.json")
    convert_pe.convert(tmp_path / "hub", tmp_path / "orbax", cfg=PE, dtype="float32")
    a, b = encoders.open_encoder(tmp_path / "hub"), encoders.open_encoder(tmp_path / "orbax")
    np.testing.assert_array_equal(a.embed_frames(frames()), b.embed_frames(frames()))
    np.testing.assert_array_equal(a.embed_texts(["a red car?"]), b.embed_texts(["a red car?"]))
    assert a.fingerprint != b.fingerprint and encoders.open_encoder(tmp_path / "hub").fingerprint == a.fingerprint
    convert_pe.convert(tmp_path / "hub", tmp_path / "half", cfg=PE)
    half = encoders.open_encoder(tmp_path / "half")
    assert half.params["image"]["proj"]["kernel"].dtype == "bfloat16"
    assert (half.embed_frames(frames()) * a.embed_frames(frames())).sum(1).min() > 0.99
    shutil.rmtree(tmp_path / "half")
    with pytest.raises(WeightsError, match="no safetensors"):
        encoders.open_encoder(tmp_path / "half")


def test_siglip_has_the_same_interface():
    cfg = siglip2.tiny()
    other = encoders.DualEncoder(cfg, siglip2.init(cfg, jax.random.key(0)), words, chunk=4)
    assert other.embed_frames(frames()).shape == (7, 32) and other.embed_texts(["a"]).shape == (1, 32)


@pytest.fixture(scope="module")
def tower():
    cfg = qwen25_vl.tiny()
    sizes = embed.Sizes(cfg.vision.hidden_size, cfg.text.vocab_size, length=12)
    return cfg, qwen25_vl.init(cfg, jax.random.key(0)), embed.init(jax.random.key(1), sizes)


def clip_of(count=8):
    big = frames(count, 56, 84)
    return video.Clip(big, np.arange(count) / 2, None, np.arange(count))


def test_the_small_retriever_has_the_same_interface(tower):
    cfg, params, retriever = tower
    queries = lambda texts: (words(texts), words(texts) > 0)  # noqa: E731
    small = encoders.SmallEncoder(cfg, params, retriever, SMALL, queries)
    sampling = indexer.Sampling(SMALL, 2.0, 8)
    entry = indexer.Indexer(cfg, params, retriever, sampling).entry(sampling.shrink(clip_of()), "x")
    emb_td = small.embed_frames(clip_of().frames)
    assert emb_td.shape[0] == 8
    np.testing.assert_allclose(entry.event_embeddings, encoders.pool_frames(emb_td, 2 * entry.event_spans), atol=1e-5)
    want = embed.embed_questions(retriever, *queries(["a car"]))
    np.testing.assert_allclose(small.embed_texts(["a car"]), want, atol=1e-6)


def test_the_indexer_takes_any_encoder(tower, encoder, tmp_path):
    cfg, params, retriever = tower
    sampling = indexer.Sampling(SMALL, 2.0, 8)
    make = lambda **how: indexer.Indexer(cfg, params, retriever, sampling, **how)  # noqa: E731
    plain, other, nearest = make(), make(encoder=encoder), make(encoder=encoder, pool="max")
    clip = clip_of()
    entry = other.entry(sampling.shrink(clip), "x", full=clip.frames)
    mine = plain.entry(sampling.shrink(clip), "x")
    np.testing.assert_array_equal(entry.tokens, mine.tokens)  # what the language model reads is not touched
    emb_td = encoder.embed_frames(clip.frames)
    np.testing.assert_array_equal(entry.event_embeddings, encoders.pool_frames(emb_td, 2 * entry.event_spans))
    with store.MemoryWriter(tmp_path / "m", nearest.fingerprint) as writer:
        writer.add("v", nearest.entry(sampling.shrink(clip), "x", full=clip.frames))
    back = store.MemoryReader(tmp_path / "m", nearest.fingerprint)["v"]
    assert back.event_embeddings.ndim == 3
    for stale in (plain, other):
        with pytest.raises(store.StaleMemory, match="pool: max in the memory"):
            store.MemoryReader(tmp_path / "m", stale.fingerprint)
