"""Index and ask with a published checkpoint (tiny, random) and a tiny PE-Core, over real videos."""

import json
import shutil

import numpy as np
import pytest

from marc_jax.archive import Archive
from marc_jax.config import ConfigError
from marc_jax.memory import store
from marc_jax.memory.entry import ARRAYS
from marc_jax.models import qwen25_vl
from marc_jax.models.safetensors_io import WeightsError
from marc_jax.tokenizer import TokenizerError
from tools.bench import published

QUESTION = "what is it ?"
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vision_hidden_size": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory, test_data):
    folder = tmp_path_factory.mktemp("published")
    published.write_model(folder / "model", qwen25_vl.tiny(**SIZES), scale=0.1)
    published.write_encoder(folder / "pe")
    (folder / "videos").mkdir()
    for name in ("bikes.mp4", "dog.mp4"):
        shutil.copyfile(test_data / "videos" / name, folder / "videos" / name)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    return folder


def opened(place, memory=None, encoder="pe", **how) -> Archive:
    return Archive(memory, str(place / "model"), encoder=encoder and str(place / encoder), max_new=6, **how)


@pytest.fixture(scope="module")
def memory(place):
    done = opened(place, place / "memory").index([place / "videos"])
    assert [name.rsplit("/", 1)[1] for name in sorted(done.new)] == ["bikes.mp4", "dog.mp4"] and done.events > 2
    assert list(done.failed) == [str(place / "videos" / "broken.mp4")]
    return place / "memory"


@pytest.fixture(scope="module")
def told(memory):
    """Which checkpoint and encoder made it, a memory knows."""
    return Archive(memory, max_new=6)


def test_one_video_says_the_same_from_its_file_and_from_a_memory(place, told):
    name, cold = str(place / "videos" / "bikes.mp4"), opened(place)
    cold.answerer = told.answerer  # compiled once
    fresh, warm = cold.ask(QUESTION, name), told.ask(QUESTION, name)
    assert warm.text == fresh.text and (warm.tokens, warm.all_tokens) == (fresh.tokens, fresh.all_tokens)
    assert [(e.number, e.score) for e in warm.events] == [(e.number, e.score) for e in fresh.events]
    for field in ARRAYS:
        a, b = (getattr(answer.entries[name], field) for answer in (warm, fresh))
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), field
    assert 0 < warm.tokens < warm.all_tokens and len(warm.events) == 3 and "decode" not in warm.seconds
    assert warm.entries[name].tokens.dtype.name == "bfloat16"


def test_key_frames_choose_what_is_read_in_full(place, told, test_data):
    name, quick = str(place / "videos" / "bikes.mp4"), opened(place, key_frames=True)
    quick.answerer = told.answerer  # compiled once
    answer, usual = quick.ask(QUESTION, name), told.ask(QUESTION, name)
    entry, full = answer.entries[name], usual.entries[name]
    assert len(answer.events) == 3 < len(entry.event_spans) and answer.all_tokens == usual.all_tokens
    assert (entry.seconds == full.seconds).all() and entry.extra == full.extra and entry.grid == full.grid
    read = np.concatenate([np.arange(*entry.event_spans[event.number - 1]) for event in answer.events])
    # The frames are those that indexing reads; in batches of other rows the tower may round otherwise.
    np.testing.assert_allclose(np.float32(entry.tokens[read]), np.float32(full.tokens[read]), atol=0.05, rtol=0.05)
    rest = np.setdiff1d(np.arange(len(entry.tokens)), read)
    assert len(rest) and not entry.tokens[rest].any()
    with pytest.raises(ConfigError, match="--key_frames is for a file without --memory"):
        opened(place, place / "memory", key_frames=True)


def test_sparse_key_frames_are_answered_as_ever(place, told, test_data):
    name, quick, usual = str(place / "chaplin.mp4"), opened(place, key_frames=True), opened(place)
    shutil.copyfile(test_data / "videos" / "chaplin.mp4", name)
    quick.answerer = usual.answerer = told.answerer
    quick.indexer = usual.indexer
    one, other = (archive.ask(QUESTION, name) for archive in (quick, usual))
    assert one.text == other.text and one.events == other.events and one.entries[name].tokens.all(axis=(1, 2)).any()


def test_an_archive_is_answered_from_the_video_of_its_nearest_event(place, memory, told):
    answer = told.ask(QUESTION)
    query = told.answerer.embed(QUESTION)[0]
    best = {name: (told.reader.head(name).event_embeddings @ query).max() for name in told.reader}
    assert {e.video for e in answer.events} == set(answer.entries) == {max(best, key=best.get)} and len(best) == 2
    merged = Archive(memory, view="marc", max_new=6).ask(QUESTION)
    assert merged.events == answer.events and answer.tokens == 3 * merged.tokens
    told.draw(place / "ask.html", answer)
    assert "data:image/jpeg;base64," in (place / "ask.html").read_text()
    told.draw(place / "ask.png", answer)
    assert (place / "ask.png").stat().st_size > 10_000


def test_without_an_encoder_whole_videos_are_read_and_nothing_is_searched(place, tmp_path):
    name, archive = str(place / "videos" / "dog.mp4"), opened(place, tmp_path / "memory", encoder="")
    archive.index([name])
    answer = archive.ask(QUESTION, name)
    assert answer.tokens == answer.all_tokens > 0 and answer.events == ()
    needs = r"needs --encoder=FOLDER \(PE-Core or SigLIP 2\)"
    with pytest.raises(ConfigError, match=f"whole videos: name one with --video=FILE, .* \\(it {needs}\\)"):
        archive.ask(QUESTION)
    with pytest.raises(ConfigError, match=f"view 'marc' retrieves events, which {needs}, for index and ask"):
        opened(place, encoder="", view="marc")
    with pytest.raises(store.StaleMemory, match="retriever: .* in the memory, .* wanted"):
        opened(place, tmp_path / "memory").ask(QUESTION)


def test_a_memory_of_another_checkpoint_is_refused(place, memory, tmp_path):
    published.write_model(tmp_path / "other", qwen25_vl.tiny(**SIZES), scale=0.1, seed=1)
    other = Archive(memory, str(tmp_path / "other"))
    for use in (lambda: other.ask(QUESTION), lambda: other.index([place / "videos"])):
        with pytest.raises(store.StaleMemory, match=r"\(tower: .* in the memory, .* wanted\); index the videos again"):
            use()


def test_what_cannot_be_asked_is_one_line(place, memory, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="the memory .*empty is empty; index videos first"):
        opened(place, tmp_path / "empty").ask(QUESTION)
    with pytest.raises(ConfigError, match="--question: question of .* tokens, config.data.question_tokens = 512"):
        Archive(memory).ask("why " * 600)
    with pytest.raises(ConfigError, match="unknown view 'nowhere'; config.views has .*full, .*marc"):
        Archive(memory, view="nowhere")
    with pytest.raises(ConfigError, match="no run there"):
        Archive(None, str(place / "videos"))
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer there"):
        Archive(None, str(model))
    (model / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="model.safetensors"):
        Archive(None, str(model))
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(qwen25_vl.ConfigError, match="llama"):
        Archive(None, str(model))
