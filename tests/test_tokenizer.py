"""The Qwen2.5 tokenizer against published vectors, the chat template, and files that are not tokenizers."""

import json
import os
import pathlib

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from marc_jax.models import prompts
from marc_jax.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def qwen_folder():
    root = os.environ.get("MARC_JAX_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
    folder = pathlib.Path(root) / "tokenizer" / "qwen2.5"
    if not (folder / "vocab.json").exists():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_folder):
    return Tokenizer.load(qwen_folder)


@pytest.fixture
def words(tmp_path):
    """A WordLevel tokenizer.json as the synthetic set writes one: Qwen's special names at small ids."""
    names = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
    vocab = {w: i for i, w in enumerate([*names, "[UNK]", "system", "user", "assistant", "which", "shape", "?"])}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.add_special_tokens([tokenizers.AddedToken(n, special=True) for n in names])
    tok.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(tmp_path)


def test_published_vectors(qwen, qwen_folder):
    texts = (qwen_folder / "ggml-vocab-qwen2.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (qwen_folder / "ggml-vocab-qwen2.gguf.out").read_text("utf-8").split("\n")
    texts, lines = texts[:-1], lines[:-1]  # both files end with a separator
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert qwen.encode(text) == [int(i) for i in line.split()], repr(text)
        assert qwen.decode(qwen.encode(text)) == text


def test_special_ids(qwen):
    assert qwen.vocab_size == 151665
    assert qwen.stop_ids == (151645, 151643)
    assert qwen.banned_ids == (151652, 151653, 151654, 151655, 151656)
    assert qwen.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert qwen.decode([151644, 872, 198, 151645]) == "user\n"
    assert qwen.decode(qwen.encode("<tool_call>{}</tool_call>")) == "<tool_call>{}</tool_call>"


def test_composed_and_decomposed_text_are_the_same(qwen):
    assert qwen.encode("caf\u0065\u0301") == qwen.encode("caf\u00e9")


@pytest.mark.parametrize(
    ("text", "composed"),
    [
        ("\u212b", "\u00c5"),  # the sign of the angstrom
        ("\u1112\u1161\u11ab", "\ud55c"),  # Hangul in letters
        ("a\u0323\u0302", "\u1ead"),  # marks in either order
        ("a\u0302\u0323", "\u1ead"),
        ("\u2126 \u0958", "\u03a9 \u0915\u093c"),  # some are taken apart
    ],
)
def test_text_is_normalised_by_nfc(qwen, text, composed):
    assert qwen.encode(text) == qwen.encode(composed)
    assert qwen.decode(qwen.encode(text)) == composed
    assert qwen.encode("\ufb01") != qwen.encode("fi")  # a ligature is none of NFC's business


def test_special_tokens_are_found_wherever_they_stand(qwen):
    assert qwen.encode("a<|im_end|>b") == [64, 151645, 65]
    assert qwen.encode("<|vision_start|><|video_pad|><|video_pad|><|vision_end|>") == [151652, 151656, 151656, 151653]
    assert qwen.encode("x <|im_end|> y") == [*qwen.encode("x "), 151645, *qwen.encode(" y")]  # no space is eaten
    assert all(i < 151643 for i in qwen.encode("<|im_end <|IM_END|> <think> </think>"))
    assert qwen.encode("system") == [8948] and qwen.encode("assistant") == [77091]
    assert qwen.decode([64, 151645, 65]) == "ab" and qwen.decode([64, 151645, 65], skip_special=False) == "a<|im_end|>b"


PIECES = ["<|im_start|>", "<|im_end|>\n", "<|video_pad|>", "<tool_call>", "user\n", " it's", "e\u0301", "\u1112\u1161"]
PIECES += ["12345", "\r\n\n", "  ", "\t", "\u00a0", "\u3000", "\U0001f468\u200d\U0001f469", "don\u2019T", "_x", "::"]


def test_transformers_tokenizer_gives_the_same_ids(qwen, qwen_folder):
    transformers = pytest.importorskip("transformers", reason="transformers is the [parity] extra")
    theirs = transformers.AutoTokenizer.from_pretrained(qwen_folder)

    @hypothesis.given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join))
    def same(text):
        ids = qwen.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert qwen.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    same()


def test_tokenizer_json_and_vocab_with_merges_agree(qwen, qwen_folder, tmp_path):
    qwen._tok.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "Which event? 12345 \n\n <|video_pad|>don't"
    assert again.encode(text) == qwen.encode(text)


def test_without_tokenizer_config_the_added_tokens_are_qwens(qwen, qwen_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(qwen_folder / name)
    bare = Tokenizer.load(tmp_path)
    assert {bare.id(t) for t in bare_names()} == {qwen.id(t) for t in bare_names()}


def bare_names():
    return ["<|endoftext|>", "<|im_end|>", "<|video_pad|>", "<tool_call>", "<|file_sep|>"]


def test_chat_template(qwen):
    prompt = prompts.build_prompt(qwen, "What happens?", [prompts.Visual(grid=(2, 1, 2))])
    assert qwen.decode(prompt.tokens, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|video_pad|><|video_pad|><|video_pad|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    bare = prompts.build_prompt(qwen, "What?", system=None)
    assert qwen.decode(bare.tokens, skip_special=False) == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_word_level_tokenizer(words):
    prompt = prompts.build_prompt(words, "which shape ?", [prompts.Visual(grid=(1, 1, 2))], system=None)
    assert prompt.tokens.tolist() == [1, 9, 3, 6, 6, 4, 11, 12, 13, 2, 1, 10]
    assert words.decode([11, 12, 2]) == "which shape"
    assert words.stop_ids == (2, 0)
    assert words.banned_ids == (3, 4, 5, 6)


@pytest.mark.parametrize(
    "files,reason",
    [
        ({}, "vocab.json: missing"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not a tokenizer.json"),
        ({"tokenizer.json": ""}, "tokenizer.json: not a tokenizer.json"),
        ({"vocab.json": "{}"}, "merges.txt: missing"),
        ({"vocab.json": "[", "merges.txt": ""}, "vocab.json: "),
        ({"vocab.json": json.dumps({"a": 0}), "merges.txt": "a b c"}, "merges.txt: merge 1 is not a pair"),
        ({"vocab.json": json.dumps({"a": 0}), "merges.txt": "a b"}, "merges.txt: does not fit vocab.json"),
    ],
)
def test_a_bad_tokenizer_names_the_file(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_a_missing_token_and_a_missing_path(words, tmp_path):
    with pytest.raises(TokenizerError, match="has no token '<|nothing|>'".replace("|", r"\|")):
        words.id("<|nothing|>")
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_counts_are_those_of_encode(words):
    texts = ["", "which shape ?", "ｆｕｌｌ width é", "line\nbreak<|im_end|>"]
    assert words.counts(texts) == [len(words.encode(text)) for text in texts] == [0, 3, 3, 3]
