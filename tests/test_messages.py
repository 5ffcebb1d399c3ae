"""Conversations: the published chat template, any mix of visuals, options of time, prompts that are too long."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from data_pipelines import media
from data_pipelines.patches import VideoBudget, normalise_patches
from marc_jax import messages
from marc_jax.models import prompts, qwen25_vl
from marc_jax.tokenizer import Tokenizer

RNG = np.random.default_rng(0)
VIDEO = {"type": "video", "video": RNG.integers(0, 256, (6, 56, 84, 3), np.uint8), "sample_fps": 1.0}
OTHER = {"type": "video", "video": RNG.integers(0, 256, (4, 84, 56, 3), np.uint8), "sample_fps": 4.0}
IMAGE = {"type": "image", "image": RNG.integers(0, 256, (56, 84, 3), np.uint8)}
SMALL = VideoBudget(min_pixels=784, max_pixels=8 * 784)


def text(words):
    return {"type": "text", "text": words}


CONVERSATIONS = {
    "a string": [{"role": "user", "content": "What?"}],
    "text parts": [{"role": "user", "content": [text("What"), text(" now?\n")]}],
    "a system given": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "What?"}],
    "a system in parts": [{"role": "system", "content": [text("Be brief")]}, {"role": "user", "content": [VIDEO]}],
    "an empty system": [{"role": "system", "content": ""}, {"role": "user", "content": "What?"}],
    "several turns": [
        {"role": "user", "content": [VIDEO, text("And "), IMAGE, text("?")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text("Or "), IMAGE, OTHER, {"image": IMAGE["image"]}]},
    ],
    "late system": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
}


@pytest.fixture
def words(tmp_path):
    names = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
    vocab = {w: i for i, w in enumerate([*names, "[UNK]", "system", "user", "assistant", "which", "shape", "?"])}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.add_special_tokens([tokenizers.AddedToken(n, special=True) for n in names])
    tok.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("ids", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_is_the_published_one(test_data, name, ids):
    sandbox = pytest.importorskip("jinja2.sandbox", reason="jinja2 comes with the [parity] extra")
    source = json.loads((test_data / "tokenizer" / "qwen2.5" / "chat_template.json").read_text())["chat_template"]
    template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    for generate in (True, False):
        how = {"add_vision_id": ids, "add_generation_prompt": generate}
        theirs = template.render(messages=CONVERSATIONS[name], **how)
        assert prompts.render_messages(CONVERSATIONS[name], **how) == theirs


def test_the_template_in_words():
    got = prompts.render_messages(CONVERSATIONS["several turns"], add_vision_id=True)
    assert got == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nVideo 1: <|vision_start|><|video_pad|><|vision_end|>And "
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nOr Picture 2: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 2: <|vision_start|><|video_pad|><|vision_end|>"
        "Picture 3: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    bare = prompts.render_messages(CONVERSATIONS["a string"], system=None)
    assert bare == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    other = prompts.render_messages(CONVERSATIONS["a string"], system="You are a helpful assistant")  # Video-R1's SFT
    assert other.startswith("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user")
    given = prompts.render_messages(CONVERSATIONS["a system given"], system="not this")
    assert given.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")


def test_a_conversation_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match="at least one message"):
        prompts.render_messages([])
    with pytest.raises(ValueError, match=r"holds no text, image or video: \['audio'\]"):
        messages.process(words, [{"role": "user", "content": [{"audio": "a.wav"}]}])


def test_text_alone_and_any_mix(words):
    alone = messages.process(words, [{"role": "user", "content": "which shape ?"}], system=None)
    assert alone.visuals == () and alone.prompt.tokens.tolist() == [1, 9, 11, 12, 13, 2, 1, 10]
    assert (alone.prompt.pos == np.arange(8)).all() and alone.prompt.next_pos == 8

    mixed = [{"role": "user", "content": [VIDEO, text("which"), IMAGE, OTHER, text("?")]}]
    got = messages.process(words, mixed, system=None, budget=SMALL)
    assert [v.kind for v in got.visuals] == ["video", "image", "video"]
    assert [v.grid for v in got.visuals] == [(3, 4, 6), (1, 4, 6), (2, 6, 4)]
    expected = [1, 9, 3, *[6] * 18, 4, 11, 3, *[5] * 6, 4, 3, *[6] * 12, 4, 13, 2, 1, 10]
    assert got.prompt.tokens.tolist() == expected
    assert got.prompt.vis_index.max() == 35 and (got.prompt.vis_index >= 0).sum() == 36
    assert got.text.count("_pad|>") == 3
    first = got.prompt.pos[:, 3:21]  # three temporal patches 2 s apart, two ids a second
    assert first[0].tolist() == np.repeat([3, 7, 11], 6).tolist() and first[2].max() == 5
    last = got.prompt.pos[0, got.prompt.vis_index >= 24]  # half a second apart
    assert (np.unique(last) - last[0]).tolist() == [0, 1]


def test_video_r1s_constant_time_and_transformers_rule_are_options(words):
    asked = [{"role": "user", "content": [VIDEO, text("?")]}]

    def times(**how):
        got = messages.process(words, asked, system=None, budget=SMALL, **how)
        return np.unique(got.prompt.pos[0, got.prompt.vis_index >= 0]).tolist(), got.prompt.pos[0, 21]

    assert prompts.VIDEO_R1_SECOND_PER_GRID == 1.0
    assert times() == ([3, 7, 11], 12)
    assert times(second_per_grid=prompts.VIDEO_R1_SECOND_PER_GRID) == ([3, 5, 7], 8)
    assert times(tokens_per_second=1.0) == ([3, 5, 7], 8)
    assert times(rule="transformers5") == ([3, 7, 11], 6)


def test_too_long_a_prompt_is_refused_before_the_model_is_touched(words):
    cfg = qwen25_vl.tiny()
    assert cfg.text.max_position_embeddings == 128000
    asked = [{"role": "user", "content": [VIDEO, text("which shape ?")]}]
    with pytest.raises(ValueError, match=r"the prompt has 28 tokens \(18 of them visual\), the model takes 27"):
        messages.process(words, asked, system=None, budget=SMALL, max_length=27)
    assert len(messages.process(words, asked, system=None, budget=SMALL, max_length=28).prompt.tokens) == 28


def test_placeholders_written_into_the_text_are_refused(words):
    asked = [{"role": "user", "content": [VIDEO, text("which <|image_pad|> ?")]}]
    with pytest.raises(ValueError, match="the text holds 2 placeholders, the prompt has 1 visuals of 18 tokens"):
        messages.process(words, asked, budget=SMALL)


def test_visuals_of_a_batch_are_encoded_by_size(words):
    """What the tower gets is grouped over videos, images and rows; what comes back is in the order of the prompts."""
    rows = [
        [VIDEO, text("which"), OTHER, IMAGE],
        [text("which shape ?")],
        [OTHER, text("?")],
    ]
    batch = [messages.process(words, [{"role": "user", "content": parts}], budget=SMALL) for parts in rows]
    calls = []

    def encode(patches, grid_hw):
        """The mean over each 2 x 2 block: recognisable, [S, n / 4, 1176]."""
        calls.append((patches.shape, grid_hw))
        return patches.reshape(len(patches), -1, 4, patches.shape[-1]).mean(2)

    got = messages.encode_visuals(encode, batch, multiple=3)
    assert calls == [((6, 24, 1176), (4, 6)), ((6, 24, 1176), (6, 4))]  # 3 + 1 and 2 + 2 temporal patches, padded
    assert got.shape == (3, 18 + 12 + 6, 1176)
    for row, inputs in zip(got, batch, strict=True):
        own = [encode(normalise_patches(v.patches), None).reshape(-1, 1176) for v in inputs.visuals]
        own = np.concatenate(own) if own else np.zeros((0, 1176))
        np.testing.assert_allclose(row[: len(own)], own, atol=1e-6)
        assert (row[len(own) :] == 0).all()
    assert messages.encode_visuals(encode, [batch[1]]) is None


def test_visuals_that_do_not_fill_the_placeholders_are_refused(words):
    inputs = messages.process(words, [{"role": "user", "content": [VIDEO]}], budget=SMALL)
    for visuals, rows in (((), 0), ((*inputs.visuals, media.load(IMAGE)), 24)):
        wrong = messages.Inputs(inputs.prompt, visuals, inputs.text)
        with pytest.raises(ValueError, match=f"18 visual placeholders, {rows} visual tokens"):
            messages.encode_visuals(None, [wrong])


def test_the_model_reads_a_conversation(words):
    """Padding of the batch and of the groups changes nothing."""
    cfg = qwen25_vl.tiny(vocab_size=16)
    params = qwen25_vl.init(cfg, jax.random.key(0))
    encode = jax.jit(lambda x, grid: qwen25_vl.bind(cfg, params).vision(x, grid), static_argnums=1)
    asked = [[VIDEO, text("which"), IMAGE], [OTHER, text("which shape ?")]]
    batch = [messages.process(words, [{"role": "user", "content": parts}], budget=SMALL) for parts in asked]

    def logits(batch, length, multiple):
        rows = messages.encode_visuals(encode, batch, multiple=multiple)
        padded = prompts.pad_prompts([inputs.prompt for inputs in batch], length)
        model = qwen25_vl.bind(cfg, params)
        x = model.embed(padded.tokens_bp, rows, padded.vis_index_bp)
        return np.asarray(model.logits(model.prefill(x, padded.pos_3bp, padded.mask_bp)[0]))

    together = logits(batch, 64, 4)
    for b, inputs in enumerate(batch):
        n = len(inputs.prompt.tokens)
        np.testing.assert_allclose(together[b, :n], logits([inputs], n, 1)[0], atol=1e-5)
