"""The Qwen2.5 tokenizer (byte-level BPE) and any other tokenizer.json, through the `tokenizers` library."""

import itertools
import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# Qwen2's pre-tokenizer (transformers, models/qwen2): contractions, words with one leading character, single digits,
# punctuation runs, newlines, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Added tokens of Qwen2.5-VL in id order from 151643; the last entries are not "special" (they survive decoding).
QWEN25_ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
_NOT_SPECIAL = set(QWEN25_ADDED[14:])

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or lacks a token; the message names the file and the reason."""

    exit_code = 2


def _read_json(path: pathlib.Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TokenizerError(f"{path}: {e}") from None


def _added_tokens(folder: pathlib.Path, base: int) -> dict[int, AddedToken]:
    """id -> added token: tokenizer_config.json's table, or Qwen2.5-VL's own when there is none."""
    config = folder / "tokenizer_config.json"
    table = _read_json(config).get("added_tokens_decoder") if config.exists() else None
    if not table:
        return {
            base + i: AddedToken(text, normalized=False, special=text not in _NOT_SPECIAL)
            for i, text in enumerate(QWEN25_ADDED)
        }
    return {
        int(i): AddedToken(
            row["content"],
            single_word=row.get("single_word", False),
            lstrip=row.get("lstrip", False),
            rstrip=row.get("rstrip", False),
            normalized=row.get("normalized", False),
            special=row.get("special", False),
        )
        for i, row in table.items()
    }


def _from_vocab_and_merges(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from vocab.json + merges.txt: NFC, QWEN2_SPLIT, byte level."""
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab_file, merges_file):
        if not path.exists():
            raise TokenizerError(f"{path}: missing (need tokenizer.json, or vocab.json and merges.txt)")
    vocab = _read_json(vocab_file)
    try:
        lines = merges_file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise TokenizerError(f"{merges_file}: {e}") from None
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in merges):
        bad = next(i for i, pair in enumerate(merges) if len(pair) != 2)
        raise TokenizerError(f"{merges_file}: merge {bad + 1} is not a pair")
    try:
        tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as e:  # the library raises plain Exception: a merge whose parts are not in the vocabulary
        raise TokenizerError(f"{merges_file}: does not fit {vocab_file.name} ({e})") from None
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    added = _added_tokens(folder, len(vocab))
    for i in sorted(added):
        tok.add_tokens([added[i]])
        if tok.token_to_id(added[i].content) != i:
            got = tok.token_to_id(added[i].content)
            raise TokenizerError(f"{folder}: added token {added[i].content!r} gets id {got}, its table says {i}")
    return tok


class Tokenizer:
    """Text to ids and back. Special tokens are recognised by name wherever they stand in the text.

    Attributes:
      path: where it was loaded from.
      vocab_size: one more than the largest id in use (embedding rows above it are padding).
      stop_ids: ids that end an answer (<|im_end|>, <|endoftext|>), those that exist.
      banned_ids: vision specials, never to be sampled.
    """

    def __init__(self, tok: tokenizers.Tokenizer, path: str = ""):
        self._tok, self.path = tok, path
        vocab = tok.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.stop_ids = tuple(vocab[t] for t in STOP_TOKENS if t in vocab)
        self.banned_ids = tuple(vocab[t] for t in VISION_TOKENS if t in vocab)

    @classmethod
    def load(cls, source: str | pathlib.Path) -> "Tokenizer":
        """Loads a tokenizer.json, or a folder with one, or a folder with vocab.json + merges.txt.

        Raises:
          TokenizerError: "<file>: <reason>".
        """
        path = pathlib.Path(source)
        if path.is_dir():
            if not (path / "tokenizer.json").exists():
                return cls(_from_vocab_and_merges(path), str(path))
            path = path / "tokenizer.json"
        if not path.exists():
            raise TokenizerError(f"{path}: no such file or folder")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), str(path))
        except Exception as e:  # the library raises plain Exception for any malformed file
            raise TokenizerError(f"{path}: not a tokenizer.json ({e})") from None

    def to_json(self) -> str:
        """The text of a tokenizer.json, from whatever form it was loaded."""
        return self._tok.to_str()

    def encode(self, text: str) -> list[int]:
        return self._tok.encode(text, add_special_tokens=False).ids

    def counts(self, texts: Iterable[str]) -> list[int]:
        """How many tokens each text has, on all cores."""
        texts, counts = iter(texts), []
        while part := list(itertools.islice(texts, 4096)):
            counts += [len(one) for one in self._tok.encode_batch_fast(part, add_special_tokens=False)]
        return counts

    def decode(self, ids, skip_special: bool = True) -> str:
        return self._tok.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id(self, token: str) -> int:
        """The id of exactly this token; TokenizerError when it has none."""
        i = self._tok.token_to_id(token)
        if i is None:
            raise TokenizerError(f"{self.path}: has no token {token!r}")
        return i
