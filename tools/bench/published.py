"""Random models in the published form, to measure and test what takes a published folder."""

import dataclasses
import json
import pathlib
import tempfile

import jax
import numpy as np
import tokenizers
from ml_dtypes import bfloat16

from data_pipelines import sources
from marc_jax.clip_tokenizer import SPECIAL
from marc_jax.models import clip_weights, perception_encoder, qwen25_vl, weights
from marc_jax.models.safetensors_io import write_folder
from marc_jax.tokenizer import QWEN25_ADDED
from tools import convert_pe

BLOCK = 1 << 22  # random numbers that all tensors are cut from: drawing 3.8 billion would take minutes


def write_model(folder: pathlib.Path, cfg: qwen25_vl.Config, dtype=bfloat16, *, scale=0.02, seed: int = 0) -> None:
    """config.json, safetensors and tokenizer.json of a random Qwen2.5-VL in a new folder, tensor by tensor.

    The tokenizer is byte-level with a few merges of the usual prompt's words; `cfg` gets its special ids, and its rows
    where it has fewer (the multiple of 8 above).
    """
    tok = _tokenizer()
    ids = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "pad_token_id": "<|endoftext|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    ids = {field: tok.token_to_id(name) for field, name in ids.items()}
    stops = (tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>"))
    rows = max(cfg.text.vocab_size, -(-(tok.get_vocab_size() + 1) // 8) * 8)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=rows), eos_token_ids=stops, **ids)
    rng = np.random.default_rng(seed)
    block = (scale * rng.standard_normal(BLOCK, np.float32)).astype(dtype)

    def draw(name, shape):
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            return np.ones(shape, dtype)
        return np.resize(block[rng.integers(BLOCK // 2) :], shape)

    shapes, dtype = weights.published_shapes(cfg), np.dtype(dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg, dtype.name)))
    rows = [(name, dtype, shape) for name, shape in shapes.items()]
    write_folder(folder, rows, ((name, draw(name, shape)) for name, shape in shapes.items()))
    tok.save(str(folder / "tokenizer.json"))


def _tokenizer() -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([sources.TRAIN_TEMPLATE, *sources.TYPE_SUFFIX.values()] * 3, trainer)
    tok.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in QWEN25_ADDED[:14]])
    return tok


def write_encoder(folder: pathlib.Path) -> None:
    """A tiny random PE-Core that knows letters, as `tools.convert_pe` leaves it."""
    cfg = perception_encoder.tiny()
    tensors = list(clip_weights.published(cfg, "meta", perception_encoder.init(cfg, jax.random.key(0))))
    vocab = {text: i for i, text in enumerate([*"abcdefghijklmnopqrstuvwxyz", *SPECIAL])}
    with tempfile.TemporaryDirectory() as name:
        source = pathlib.Path(name)
        write_folder(source, [(name, np.dtype(np.float32), t.shape) for name, t in tensors], iter(tensors))
        tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[])).save(str(source / "tokenizer.json"))
        convert_pe.convert(source, folder, cfg=cfg)
