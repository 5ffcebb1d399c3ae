"""Tokenizers of the dual encoders: texts in, int32 [N, L] out, cut and padded as their models were trained.

CLIP's byte-level BPE (PE-Core) from `bpe_simple_vocab_16e6.txt.gz`, the file that openai/CLIP and perception_models
ship (MIT), or from a tokenizer.json with the same ids. SigLIP 2's from its tokenizer.json (Gemma's vocabulary).
"""

import gzip
import html
import pathlib
import re

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from marc_jax.tokenizer import TokenizerError

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # lines of the file in use, after its first
SPECIAL = ("<start_of_text>", "<end_of_text>")
OTHER_SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # as Hugging Face's files call them
CLIP_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # printable ASCII without "&": what ftfy leaves alone


def clean(text: str) -> str:
    """Mended, unescaped twice, lower-cased, runs of white space made one space: CLIP's "lower" cleaning.

    Mending mojibake, ligatures and widths is `ftfy`'s work; it is needed only for texts beyond plain ASCII.

    Raises:
      TokenizerError: such a text, and ftfy is not installed: without it the ids could silently differ.
    """
    if not PLAIN.fullmatch(text):
        try:
            import ftfy
        except ImportError:
            raise TokenizerError(
                f"{text[:60]!r} has characters that CLIP's cleaning passes through ftfy: pip install 'marc_jax[clip]'"
            ) from None
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of the vocabulary (GPT-2's table)."""
    direct = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in direct] + [chr(256 + i) for i in range(256 - len(direct))]


def _from_bpe(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise TokenizerError(f"{path}: {e}") from None
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != MERGES or any(len(pair) != 2 for pair in merges):
        raise TokenizerError(f"{path}: not CLIP's merges (need {MERGES} pairs after the first line)")
    letters = _byte_letters()
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_SPLIT), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tok


def _load(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception for any malformed file
        raise TokenizerError(f"{path}: not a tokenizer.json ({e})") from None


class ClipTokenizer:
    """CLIP's tokenizer; `context` is the model's (32 or 72 for PE-Core)."""

    def __init__(self, tok: tokenizers.Tokenizer, context: int, path: str = ""):
        self._tok, self.context = tok, context
        ids = [tok.token_to_id(text) for text in SPECIAL]
        self.start, self.end = ids if None not in ids else [tok.token_to_id(text) for text in OTHER_SPECIAL]
        if self.start is None or self.end is None:
            raise TokenizerError(f"{path}: has neither {SPECIAL} nor {OTHER_SPECIAL}")

    @classmethod
    def load(cls, source, context: int) -> "ClipTokenizer":
        """From the .txt.gz of merges, a tokenizer.json, or a folder with either. Raises TokenizerError."""
        path = pathlib.Path(source)
        if path.is_dir():
            found = [path / name for name in (BPE_FILE, "tokenizer.json") if (path / name).exists()]
            if not found:
                raise TokenizerError(f"{path}: holds neither {BPE_FILE} nor tokenizer.json")
            path = found[0]
        if not path.exists():
            raise TokenizerError(f"{path}: no such file or folder")
        return cls(_load(path) if path.suffix == ".json" else _from_bpe(path), context, str(path))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """int32 [N, context]: start, ids, end, then zeros; an over-long text is cut and its last id made the end."""
        out = np.zeros((len(texts), self.context), np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self._tok.encode(clean(text), add_special_tokens=False).ids, self.end]
            if len(ids) > self.context:
                ids = [*ids[: self.context - 1], self.end]
            row[: len(ids)] = ids
        return out


class SiglipTokenizer:
    """SigLIP 2's tokenizer: lower-cased, <eos> at the end (kept when cut), padded with <pad> to exactly `context`."""

    def __init__(self, tok: tokenizers.Tokenizer, context: int = 64, path: str = ""):
        self._tok, self.context = tok, context
        self.end, self.pad = tok.token_to_id("<eos>"), tok.token_to_id("<pad>")
        if self.end is None or self.pad is None:
            raise TokenizerError(f"{path}: has no <eos> and <pad>: not SigLIP 2's tokenizer")

    @classmethod
    def load(cls, source, context: int = 64) -> "SiglipTokenizer":
        """From a tokenizer.json or its folder. Raises TokenizerError."""
        path = pathlib.Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise TokenizerError(f"{path}: no such file")
        return cls(_load(path), context, str(path))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """int32 [N, context]."""
        out = np.full((len(texts), self.context), self.pad, np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = self._tok.encode(text.lower(), add_special_tokens=False).ids[: self.context - 1]
            row[: len(ids) + 1] = [*ids, self.end]
        return out
