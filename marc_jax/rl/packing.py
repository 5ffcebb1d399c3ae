"""Packing: several prompts with their answers, of unlike length, laid end to end in rows of one length.

    segment ids   1 1 1 1 1 1 1 2 2 2 2 3 3 3 3 3 0      attention is causal within a segment, positions begin
    tokens        v v v q q a a v q a a v v q a a .      anew in each, the loss is on the answers (a) alone

Which rows go together is settled on the host, from the most tokens that each can have (`best_fit_decreasing`). They are
laid on the device (`lay`), after the visual tokens are chosen there: what a compressed view leaves empty is padding at
the end of the row.
"""

import bisect
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.rl import logprob
from marc_jax.rl.types import PromptBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B packed rows of L tokens.

    Attributes:
      tokens_bl: int32 [B, L].
      segment_bl: int32 [B, L]; 1, 2, ... in each row, 0 is padding.
      pos_3bl: int32 [3, B, L]; M-RoPE ids of each segment on its own.
      vis_index_bl: int32 [B, L]; which of the row's visual tokens goes here, -1 for text.
      train_bl: bool [B, L]; tokens that are trained on.
    """

    tokens_bl: jax.Array
    segment_bl: jax.Array
    pos_3bl: jax.Array
    vis_index_bl: jax.Array
    train_bl: jax.Array


def best_fit_decreasing(lengths_n, max_length: int, max_segments: int) -> list[tuple[int, ...]]:
    """Which of N sequences lie in one row: the longest first, each where it leaves the least room.

    TRL's `packing_strategy="bfd"`, with a limit on the segments of a row; O(N log N) but for memory moves.

    Args:
      lengths_n: int [N], at least 1 and at most max_length.
      max_length: tokens of a row.
      max_segments: sequences in a row.

    Returns:
      the sequences' numbers, a tuple for each row. The same for the same arguments.

    Raises:
      ValueError: a length is not in 1..max_length.
    """
    lengths_n = np.asarray(lengths_n)
    if len(lengths_n) and not 1 <= lengths_n.min() <= lengths_n.max() <= max_length:
        raise ValueError(f"lengths {lengths_n.min()} to {lengths_n.max()} do not lie within 1..{max_length}")
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (tokens that are free, row), in order
    for i in np.argsort(-lengths_n, kind="stable").tolist():
        length = int(lengths_n[i])
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = max_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > length and len(rows[row]) < max_segments:
            bisect.insort(open_rows, (free - length, row))
    return [tuple(row) for row in rows]


def lay(prompt: PromptBatch, visual: int, tokens_bgr, mask_bgr, train_bgr, segments: int, max_length: int) -> Rows:
    """Prompts and their answers end to end, `segments` of them in each row; what is masked is left out.

    Args:
      prompt: B * segments prompts, row by row, with the mask that `encode` gave them.
      visual: visual tokens of a prompt, padding included.
      tokens_bgr, mask_bgr, train_bgr: [B * segments, 1, R], what follows each prompt, as of `step.SFTBatch`.
      segments: most segments of a row.
      max_length: L. What lies beyond is cut off: the caller sees to it that it suffices.
    """
    b, r = len(tokens_bgr) // segments, tokens_bgr.shape[-1]

    def joined(first_bp, then_br):  # [.., B * segments, P] and [.., R] -> [.., B, segments * (P + R)]
        both = jnp.concatenate([first_bp, then_br], axis=-1)
        return both.reshape(*both.shape[:-2], b, -1)

    mask = joined(prompt.mask_bp, mask_bgr[:, 0])
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :max_length]
    slot_b = jnp.arange(len(tokens_bgr))[:, None] % segments
    text_br = jnp.full(tokens_bgr[:, 0].shape, -1, jnp.int32)
    own = jnp.broadcast_to(slot_b, (len(slot_b), prompt.mask_bp.shape[1] + r)).reshape(b, -1) + 1
    vis_index_bp = jnp.where(prompt.vis_index_bp >= 0, prompt.vis_index_bp + visual * slot_b, -1)
    pos_br = prompt.next_pos_b[:, None] + jnp.arange(r)
    pos = joined(prompt.pos_3bp, jnp.broadcast_to(pos_br, (3, *pos_br.shape)))

    def move(a):
        return jnp.take_along_axis(a, order, axis=1)

    there = move(mask)
    return Rows(
        move(joined(prompt.tokens_bp, tokens_bgr[:, 0])),
        jnp.where(there, move(own), 0),
        jax.vmap(move)(pos),
        jnp.where(there, move(joined(vis_index_bp, text_br)), -1),
        there & move(joined(jnp.zeros_like(prompt.mask_bp), train_bgr[:, 0])),
    )  # fmt: skip


def token_stats(model, vis_bnd, rows: Rows, targets: int, chunk: int | None = None):
    """(TokenStats [B, targets], mask [B, targets]) of the rows' tokens that are trained on. Differentiable.

    Args:
      model: a bound model.
      vis_bnd: visual tokens [B, N, D] of all segments of a row; None: text alone.
      rows: of `lay`.
      targets: most tokens of a row that are trained on: the head multiplies no others.
      chunk: positions per chunk of logits; None chooses by size.
    """
    x = model.embed(rows.tokens_bl, vis_bnd, None if vis_bnd is None else rows.vis_index_bl)
    hidden = model.prefill_packed(x, rows.pos_3bl, rows.segment_bl)
    # The state at l predicts token l + 1; a segment's first token is its prompt's and never trained on.
    at = jnp.argsort(~rows.train_bl[:, 1:], axis=1, stable=True)[:, :targets]
    mask = jnp.take_along_axis(rows.train_bl, at + 1, axis=1)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    wanted = jnp.take_along_axis(rows.tokens_bl, at + 1, axis=1)
    stats = logprob.chunked_logprob(hidden, model.head(), wanted, chunk)
    return logprob.TokenStats(*(jnp.where(mask, x, 0.0) for x in stats)), mask
