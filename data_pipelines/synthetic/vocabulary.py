"""The tiny tokenizer of the synthetic set: one word, one token, with the published model's special token names."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from data_pipelines.synthetic.questions import LETTERS
from data_pipelines.synthetic.scenes import COLOURS, DIRECTIONS, HUES, SHAPES, TEXTURES

PAD = "<|endoftext|>"
SPECIAL = (
    PAD,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
UNKNOWN = "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT = ("system", "user", "assistant", "You", "are", "a", "helpful")
WORDS = "in what happens to how many and or first then ? , the scene object objects which is comes".split()
MULTIPLE = 8


def words() -> list[str]:
    """Every entry in id order, padded with unused entries to a multiple of eight."""
    found = [*SPECIAL, UNKNOWN, *TAGS, *CHAT, *LETTERS, *"0123456789", *HUES, *TEXTURES, *COLOURS, *SHAPES, *DIRECTIONS]
    found += ["colour", "shape", "direction", "colours", "shapes", "directions", *WORDS]
    found = list(dict.fromkeys(found))
    return found + [f"<unused{i}>" for i in range(-len(found) % MULTIPLE)]


def make_tokenizer() -> Tokenizer:
    """WordLevel over `words()`: other words become <unk>, decoding joins with spaces.

    Whitespace, ".", ":" and "Options:" vanish, so that the option "A. red" and the answer "A" share a token.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(Regex(r"Options:|[.:]"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in (UNKNOWN, *TAGS)])
    return tokenizer


def write_tokenizer(path: str | Path) -> None:
    """Writes tokenizer.json."""
    Path(path).write_text(make_tokenizer().to_str(pretty=True), encoding="utf-8")
