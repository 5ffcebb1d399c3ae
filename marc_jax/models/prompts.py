"""From a question and its visuals to tokens, visual indices and M-RoPE position ids (numpy only)."""

import dataclasses

import numpy as np

PADS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
SYSTEM = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class Visual:
    """One video or image of a prompt, in the order of its visual tokens (raster order t, h, w).

    Attributes:
      kind: "video" or "image".
      grid: (t, h, w) in MERGED tokens; t * h * w visual tokens.
      second_per_grid: seconds between temporal patches, 2 / sampled fps.
      t_ids: ids of the t axis, [t], relative to the visual's start, instead of the rule's (kept or merged temporal
        patches keep the ids of what they stand for). Fractions are cut.
      extent: how many position ids the visual takes, instead of the rule's (with t_ids: the extent of the original).
    """

    kind: str = "video"
    grid: tuple[int, int, int] = (1, 1, 1)
    second_per_grid: float = 1.0
    t_ids: tuple[float, ...] | np.ndarray | None = None
    extent: int | None = None

    def __post_init__(self):
        if self.kind not in PADS:
            raise ValueError(f"visual kind {self.kind!r}: expected 'video' or 'image'")
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"visual grid {self.grid}: expected three positive counts (t, h, w)")
        if self.t_ids is not None and len(self.t_ids) != self.grid[0]:
            raise ValueError(f"visual has {self.grid[0]} temporal patches but {len(self.t_ids)} t_ids")

    @property
    def tokens(self) -> int:
        return int(np.prod(self.grid))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """L tokens [L], M-RoPE ids pos [3, L], vis_index [L] (-1 on text), next_pos (id of the first answer token)."""

    tokens: np.ndarray
    pos: np.ndarray
    vis_index: np.ndarray
    next_pos: int


def render(question: str, visuals=(), system: str | None = SYSTEM) -> str:
    """The published chat template as text, one pad token per visual, ending where the assistant begins."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    vision = "".join(f"<|vision_start|>{PADS[v.kind]}<|vision_end|>" for v in visuals)
    return f"{head}<|im_start|>user\n{vision}{question}<|im_end|>\n<|im_start|>assistant\n"


def visual_positions(visual: Visual, rule: str, tokens_per_second: float) -> tuple[np.ndarray, int]:
    """Position ids [3, t*h*w] relative to the visual's start, and how many ids it takes.

    "published" (transformers <= 4.51, QwenLM's training code): t id = floor(index * second_per_grid *
    tokens_per_second) in float32, extent = 1 + the largest id of all three axes. "transformers5": second_per_grid
    is cut to an integer first, extent = max(h, w).
    """
    t, h, w = visual.grid
    spg = np.float32(visual.second_per_grid if visual.kind == "video" else 0)
    if visual.t_ids is not None:
        t_ids = np.asarray(visual.t_ids, np.float32)
    elif rule == "published":
        t_ids = np.arange(t, dtype=np.float32) * spg * np.float32(tokens_per_second)
    elif rule == "transformers5":
        t_ids = np.arange(t, dtype=np.float32) * np.float32(tokens_per_second) * np.trunc(spg)
    else:
        raise ValueError(f"rule={rule!r}: expected 'published' or 'transformers5'")
    ids = np.broadcast_arrays(
        np.floor(t_ids).astype(np.int32)[:, None, None],
        np.arange(h, dtype=np.int32)[None, :, None],
        np.arange(w, dtype=np.int32)[None, None, :],
    )
    pos = np.stack([a.reshape(-1) for a in ids])
    extent = int(pos.max()) + 1 if rule == "published" else max(h, w)
    return pos, extent if visual.extent is None else int(visual.extent)


def expand(ids, visuals, pad_ids: dict[str, int], *, rule: str = "published", tokens_per_second: float = 2.0) -> Prompt:
    """Replaces each pad token of `ids` by its visual's tokens and lays out positions.

    Raises:
      ValueError: the pads in the text are not the visuals given (both counts, or the kinds, in the message).
    """
    kinds = {i: kind for kind, i in pad_ids.items()}
    found = [kinds[i] for i in ids if i in kinds]
    if found != [v.kind for v in visuals]:
        raise ValueError(f"the text holds pads for {found or 'no visuals'}, the prompt has {[v.kind for v in visuals]}")
    tokens, pos, index = [], [], []
    start = seen = 0
    queue = iter(visuals)
    for i in ids:
        if i not in kinds:
            tokens.append([i]), pos.append(np.full((3, 1), start)), index.append([-1])
            start += 1
            continue
        visual = next(queue)
        rel, extent = visual_positions(visual, rule, tokens_per_second)
        tokens.append(np.full(visual.tokens, i)), pos.append(rel + start)
        index.append(np.arange(seen, seen + visual.tokens))
        start, seen = start + extent, seen + visual.tokens
    join = np.concatenate
    return Prompt(join(tokens).astype(np.int32), join(pos, 1).astype(np.int32), join(index).astype(np.int32), start)


def build_prompt(
    tokenizer,
    question: str,
    visuals=(),
    *,
    system: str | None = SYSTEM,
    rule: str = "published",
    tokens_per_second: float = 2.0,
) -> Prompt:
    """A chat prompt with its visuals before the question; system None or "" gives no system turn."""
    pad_ids = {kind: tokenizer.id(text) for kind, text in PADS.items()}
    ids = tokenizer.encode(render(question, visuals, system))
    return expand(ids, visuals, pad_ids, rule=rule, tokens_per_second=tokens_per_second)


def pad_prompts(prompts, length: int, pad_id: int = 0):
    """Right-pads prompts to a `PromptBatch` of numpy arrays.

    Raises:
      ValueError: a prompt longer than `length`, with both counts.
    """
    from marc_jax.rl.types import PromptBatch  # the type's module imports jax; building prompts alone does not

    longest = max(len(p.tokens) for p in prompts)
    if longest > length:
        raise ValueError(f"a prompt has {longest} tokens, the batch is padded to {length}")
    b = len(prompts)
    tokens, mask = np.full((b, length), pad_id, np.int32), np.zeros((b, length), bool)
    pos, index = np.zeros((3, b, length), np.int32), np.full((b, length), -1, np.int32)
    for i, p in enumerate(prompts):
        n = len(p.tokens)
        tokens[i, :n], mask[i, :n], pos[:, i, :n], index[i, :n] = p.tokens, True, p.pos, p.vis_index
    return PromptBatch(tokens, mask, pos, index, np.asarray([p.next_pos for p in prompts], np.int32))
