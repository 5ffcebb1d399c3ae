"""A conversation with videos and images to what the model reads: tokens, M-RoPE positions, patches.

    inputs = process(tokenizer, [{"role": "user", "content": [
        {"type": "video", "video": "clip.mp4", "max_frames": 64},
        {"type": "image", "image": "photo.jpg"},
        {"type": "text", "text": "Is the dog of the photo in the video?"},
    ]}], max_length=cfg.text.max_position_embeddings)
    batch = prompts.pad_prompts([inputs.prompt], length=4096)
    vis_bnd = encode_visuals(encode, [inputs])      # encode: jitted (patches [S, n, 1176], grid_hw) -> [S, n / 4, D]
    x = model.embed(batch.tokens_bp, vis_bnd, batch.vis_index_bp)

Tokens and patches are those of transformers' Qwen2_5_VLProcessor behind qwen-vl-utils 0.0.14.
"""

import dataclasses

import numpy as np

from data_pipelines import media
from data_pipelines.patches import MERGE, VideoBudget, normalise_patches
from marc_jax.models import prompts


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One conversation: the prompt, its visuals in the order of their tokens, and the rendered text."""

    prompt: prompts.Prompt
    visuals: tuple[media.Medium, ...]
    text: str


def process(
    tokenizer,
    messages,
    *,
    budget: VideoBudget | None = None,
    second_per_grid: float | None = None,
    rule: str = "published",
    tokens_per_second: float = 2.0,
    system: str | None = prompts.SYSTEM,
    add_vision_id: bool = False,
    add_generation_prompt: bool = True,
    max_length: int | None = None,
    root=None,
) -> Inputs:
    """Reads the visuals of a conversation and lays out its tokens; text only, or any mix of videos and images.

    Args:
      tokenizer: `marc_jax.tokenizer.Tokenizer`.
      messages: as for transformers' chat templates; a visual's keys are those of `data_pipelines.media`.
      budget, root: see `media.load`.
      second_per_grid: seconds between temporal patches of every video; None takes each video's own. Checkpoints of
        Video-R1 were trained with `prompts.VIDEO_R1_SECOND_PER_GRID`.
      rule, tokens_per_second: see `prompts.visual_positions`.
      system, add_vision_id, add_generation_prompt: see `prompts.render_messages`.
      max_length: the model's `max_position_embeddings`, less the tokens of the answer.

    Raises:
      VideoError: a file that cannot be used, naming it.
      ValueError: a malformed message, placeholders written into a text, or a prompt that is too long.
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    parts = [part for part in parts if prompts.part_kind(part) != "text"]
    text = prompts.render_messages(
        messages, system=system, add_vision_id=add_vision_id, add_generation_prompt=add_generation_prompt
    )
    visuals = tuple(media.load(part, budget=budget, root=root) for part in parts)
    places = [_place(visual, second_per_grid) for visual in visuals]
    how = {"rule": rule, "tokens_per_second": tokens_per_second, "max_length": max_length}
    return Inputs(prompts.tokenize(tokenizer, text, places, **how), visuals, text)


def _place(visual: media.Medium, second_per_grid: float | None) -> prompts.Visual:
    t, h, w = visual.grid
    seconds = visual.second_per_grid if second_per_grid is None else second_per_grid
    return prompts.Visual(visual.kind, (t, h // MERGE, w // MERGE), seconds)


def encode_visuals(encode, batch, *, multiple: int = 1):
    """Visual tokens of a batch of conversations: float32 [B, N, D], rows behind a conversation's own are zero.

    The tower takes one picture size a call. No attention crosses a temporal patch, so everything of one size in the
    whole batch, videos and images alike, goes through it at once.

    Args:
      encode: (patches float32 [S, n, 1176], grid (h, w) in patches) -> visual tokens [S, n / 4, D]; compiled once for
        each size and S, with grid static.
      batch: `Inputs`, one per row.
      multiple: S is padded to a multiple of this, so that fewer lengths are compiled.

    Returns:
      None if the batch holds no visual.

    Raises:
      ValueError: a conversation whose visuals do not fill its placeholders, with both counts.
    """
    for inputs in batch:
        prompts.check_rows(inputs.prompt, sum(visual.tokens for visual in inputs.visuals))
    visuals = [(b, k, visual) for b, inputs in enumerate(batch) for k, visual in enumerate(inputs.visuals)]
    rows = {}
    for size in sorted({visual.grid[1:] for _, _, visual in visuals}):
        group = [(b, k, visual) for b, k, visual in visuals if visual.grid[1:] == size]
        patches = normalise_patches(np.concatenate([visual.patches for _, _, visual in group]))
        spare = -len(patches) % multiple
        encoded = np.asarray(encode(np.pad(patches, ((0, spare), (0, 0), (0, 0))), size), np.float32)
        ends = np.cumsum([visual.grid[0] for _, _, visual in group])
        for (b, k, _), tokens in zip(group, np.split(encoded, ends), strict=False):  # the rest is padding
            rows[b, k] = tokens.reshape(-1, tokens.shape[-1])
    if not rows:
        return None
    width = next(iter(rows.values())).shape[-1]
    most = max(int((inputs.prompt.vis_index >= 0).sum()) for inputs in batch)
    out = np.zeros((len(batch), most, width), np.float32)
    for b, inputs in enumerate(batch):
        own = [rows[b, k] for k in range(len(inputs.visuals))]
        if own:
            joined = np.concatenate(own)
            out[b, : len(joined)] = joined
    return out
