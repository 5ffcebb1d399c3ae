"""From chat messages and their visuals to tokens, visual indices and M-RoPE position ids (numpy only)."""

import dataclasses

import numpy as np

PADS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
NAMES = {"video": "Video", "image": "Picture"}
SYSTEM = "You are a helpful assistant."
# Video-R1 trains without telling the model the frame rate: every video gets this second_per_grid. With a video's true
# value (the default) its ids are right in time; with this one they are those that Video-R1's checkpoints know.
VIDEO_R1_SECOND_PER_GRID = 1.0


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
    """One user turn, its visuals before the question, in the published chat template; see `render_messages`."""
    content = [*({"type": v.kind} for v in visuals), {"type": "text", "text": question}]
    return render_messages([{"role": "user", "content": content}], system=system)


def part_kind(part: dict) -> str:
    """What the published template takes a part of a message's content for: "image", "video" or "text"."""
    if part.get("type") == "image" or "image" in part or "image_url" in part:
        return "image"
    if part.get("type") == "video" or "video" in part:
        return "video"
    if "text" in part:
        return "text"
    raise ValueError(f"a part of a message holds no text, image or video: {sorted(part)}")


def render_messages(
    messages, *, system: str | None = SYSTEM, add_vision_id: bool = False, add_generation_prompt: bool = True
) -> str:
    """The published chat template as text, with one pad token per visual.

    Args:
      messages: dicts of "role" and "content": a string, or a list of {"type": "text", "text": ...} and visuals.
      system: the system turn of a conversation that does not begin with one; None or "" gives it none (the published
        template always has one).
      add_vision_id: "Picture 1: ", "Video 1: " before each visual, counted over the conversation.
      add_generation_prompt: end where the assistant begins to speak.

    Raises:
      ValueError: no messages, or a part that is neither text nor visual.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    count, turns = {"video": 0, "image": 0}, []
    if system and messages[0]["role"] != "system":
        turns.append(f"<|im_start|>system\n{system}<|im_end|>\n")
    for message in messages:
        content, text = message["content"], ""
        for part in [{"text": content}] if isinstance(content, str) else content:
            kind = part_kind(part)
            if kind == "text":
                text += part["text"]
                continue
            count[kind] += 1
            name = f"{NAMES[kind]} {count[kind]}: " if add_vision_id else ""
            text += f"{name}<|vision_start|>{PADS[kind]}<|vision_end|>"
        turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


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


def _placeholders(ids, visuals, kinds: dict[int, str]) -> list[tuple[int, int]]:
    """(first index, count) of each visual's pads in `ids`: one pad each, or as many as it has tokens.

    ValueError with both counts where the pads are neither.
    """
    pads = [(at, kinds[i]) for at, i in enumerate(ids) if i in kinds]
    tokens = sum(v.tokens for v in visuals)
    if len(pads) not in (len(visuals), tokens):
        raise ValueError(
            f"the text holds {len(pads)} placeholders, the prompt has {len(visuals)} visuals of {tokens} tokens in all"
        )
    spans, at = [], 0
    for number, visual in enumerate(visuals, 1):
        size = 1 if len(pads) == len(visuals) else visual.tokens
        mine = pads[at : at + size]
        if {kind for _, kind in mine} != {visual.kind} or mine[-1][0] - mine[0][0] != size - 1:
            run = sum(1 for k, (i, kind) in enumerate(mine) if i == mine[0][0] + k and kind == mine[0][1])
            raise ValueError(
                f"visual {number} is {visual.kind} ({size} placeholders), the text has {run} {mine[0][1]} placeholders"
            )
        spans.append((mine[0][0], size))
        at += size
    return spans


def expand(
    ids,
    visuals,
    pad_ids: dict[str, int],
    *,
    rule: str = "published",
    tokens_per_second: float = 2.0,
    max_length: int | None = None,
) -> Prompt:
    """Replaces each pad token of `ids` by its visual's tokens and lays out positions.

    Args:
      ids: token ids with one pad per visual, or (as the published processor returns them) one per visual token.
      visuals: in the order of their pads.
      pad_ids: kind -> id of its pad token.
      rule, tokens_per_second: see `visual_positions`.
      max_length: the most tokens the model takes (`max_position_embeddings`).

    Raises:
      ValueError: the pads in the text are not the visuals given, or the prompt is too long; both counts in the message.
    """
    spans = _placeholders(ids, visuals, {i: kind for kind, i in pad_ids.items()})
    length = len(ids) + sum(v.tokens - size for v, (_, size) in zip(visuals, spans, strict=True))
    if max_length is not None and length > max_length:
        seen = sum(v.tokens for v in visuals)
        raise ValueError(f"the prompt has {length} tokens ({seen} of them visual), the model takes {max_length}")
    tokens, pos, index = [np.zeros(0, int)], [np.zeros((3, 0), int)], [np.zeros(0, int)]
    start = seen = at = 0
    for visual, (first, size) in [*zip(visuals, spans, strict=True), (None, (len(ids), 0))]:
        text = np.asarray(ids[at:first], int)
        tokens.append(text), index.append(np.full(len(text), -1))
        pos.append(np.broadcast_to(start + np.arange(len(text)), (3, len(text))))
        start += len(text)
        if visual is not None:
            rel, extent = visual_positions(visual, rule, tokens_per_second)
            tokens.append(np.full(visual.tokens, ids[first])), pos.append(rel + start)
            index.append(np.arange(seen, seen + visual.tokens))
            start, seen, at = start + extent, seen + visual.tokens, first + size
    tokens, pos, index = (np.concatenate(a, -1).astype(np.int32) for a in (tokens, pos, index))
    # transformers 5 lets text overlap the video in time, but speaks after the largest id of all.
    next_pos = max(start, int(pos.max(initial=-1)) + 1) if rule == "transformers5" else start
    return Prompt(tokens, pos, index, next_pos)


def check_rows(prompt: Prompt, rows: int) -> None:
    """ValueError with both counts unless `rows` visual tokens are what the prompt's placeholders take."""
    wanted = int((prompt.vis_index >= 0).sum())
    if rows != wanted:
        raise ValueError(f"the prompt has {wanted} visual placeholders, {rows} visual tokens were given")


def build_prompt(
    tokenizer,
    question: str,
    visuals=(),
    *,
    system: str | None = SYSTEM,
    rule: str = "published",
    tokens_per_second: float = 2.0,
    max_length: int | None = None,
) -> Prompt:
    """A chat prompt with its visuals before the question; system None or "" gives no system turn."""
    text = render(question, visuals, system)
    return tokenize(tokenizer, text, visuals, rule=rule, tokens_per_second=tokens_per_second, max_length=max_length)


def tokenize(tokenizer, text: str, visuals=(), **how) -> Prompt:
    """Rendered text and its visuals to a Prompt; `how` goes to `expand`."""
    pad_ids = {kind: tokenizer.id(pad) for kind, pad in PADS.items()}
    return expand(tokenizer.encode(text), visuals, pad_ids, **how)


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
