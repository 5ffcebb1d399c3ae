"""CLIP's and SigLIP 2's tokenizers: golden ids of the original, and the original itself where it is installed."""

import gzip
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers

from marc_jax.clip_tokenizer import BPE_FILE, ClipTokenizer, SiglipTokenizer
from marc_jax.tokenizer import TokenizerError

# Ids between start and end, by perception_models' SimpleTokenizer.
GOLDEN = {
    "How many in blue stripes ?": [829, 1346, 530, 1746, 14239, 286],
    "it's 123 o'clock, we'll GO!!!": [585, 568, 272, 273, 274, 334, 262, 6716, 267, 649, 1342, 861, 995],
    "<i> <end_of_text>": [283, 328, 285, 49407],
    "": [],
}
TEXTS = [*GOLDEN, "  \t tabs \n lines\r\n", "word " * 50, "antidisestablishmentarianism " * 10, "'", "''s", "a_b-c/d"]
BEYOND = ["café naïve Ünïcode", "日本語 漢字", "emoji 😀🎉 x", "schÃ¶n", "ﬁne ﬂow", "ＦＵＬＬ", "“curly” ‘quotes’"]
BEYOND += ["don’t x'S ²³ Ⅷ ٣", "İstanbul ß ẞ", "e\u0301 a\u0300\u0301b", "\u200bzero", "\x00b", "&lt;i>", "a & b"]


@pytest.fixture(scope="module")
def folder(test_data):
    return test_data / "tokenizer" / "clip"


@pytest.fixture(scope="module")
def clip(folder):
    return ClipTokenizer.load(folder, 32)


def test_golden_ids(clip):
    for text, ids in GOLDEN.items():
        row = clip([text])[0]
        assert row.dtype == np.int32 and row.tolist() == [49406, *ids, 49407, *[0] * (30 - len(ids))]


def test_too_long_a_text_is_cut_and_ended(folder, clip):
    row = clip(["word " * 50])[0]
    assert row[0] == 49406 and row[-1] == 49407 and len(set(row[1:-1].tolist())) == 1
    assert ClipTokenizer.load(folder, 72)(["word " * 50])[0].tolist()[50:53] == [row[1], 49407, 0]
    assert clip([]).shape == (0, 32)


def test_equal_to_the_original(clip):
    pytest.importorskip("ftfy")
    pytest.importorskip("torch")
    original = pytest.importorskip("core.vision_encoder.tokenizer", reason="perception_models is not on the path")
    rng, letters = random.Random(0), "abcXYZ 0123'’\"!?.,;:&<>#é漢😀ſßİ\t\n½²٣ा\u0301\u200d"
    texts = [*TEXTS, *BEYOND, *("".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(500))]
    want = original.SimpleTokenizer(context_length=32)(texts).numpy()
    np.testing.assert_array_equal(clip(texts), want)


def test_a_tokenizer_json_gives_the_same_ids(clip, tmp_path):
    clip._tok.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(ClipTokenizer.load(tmp_path, 32)(TEXTS), clip(TEXTS))


def test_texts_beyond_ascii_need_ftfy(clip, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(TokenizerError, match=r"café.*pip install 'marc_jax\[clip\]'"):
        clip(["café"])


def test_damaged_files_are_errors(tmp_path):
    with pytest.raises(TokenizerError, match="neither bpe_simple"):
        ClipTokenizer.load(tmp_path, 32)
    (tmp_path / BPE_FILE).write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match=BPE_FILE):
        ClipTokenizer.load(tmp_path, 32)
    (tmp_path / BPE_FILE).write_bytes(gzip.compress(b"version\na b\n"))
    with pytest.raises(TokenizerError, match="48894 pairs"):
        ClipTokenizer.load(tmp_path, 32)
    (tmp_path / BPE_FILE).unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer.json"):
        ClipTokenizer.load(tmp_path, 32)


def gemma_like(path, special=("<pad>", "<eos>", "<bos>", "<unk>")):
    vocab = {text: i for i, text in enumerate([*special, *"▁abcdefghijklmnopqrstuvwxyz"])}
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=special[-1]))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.save(str(path))
    return path


def test_siglip_lower_cases_ends_and_pads(tmp_path):
    tok = SiglipTokenizer.load(gemma_like(tmp_path / "tokenizer.json"), 8)
    assert tok(["A cab"]).tolist() == [[5, 4, 7, 5, 6, 1, 0, 0]]
    assert tok(["abcdefghijk"]).tolist() == [[5, 6, 7, 8, 9, 10, 11, 1]]  # cut, and still ended
    gemma_like(tmp_path / "other.json", ("<s>", "<unk>"))
    with pytest.raises(TokenizerError, match="no <eos> and <pad>"):
        SiglipTokenizer.load(tmp_path / "other.json")
