"""What a model looks at: from a video's temporal patches and a question to the visual tokens it reads.

A `View` names the choice; `select` picks temporal patches (before the vision tower sees them), `encode` turns the
chosen patches into visual tokens and puts them at their place in the prompt.

    video   |e0 e0|e1 e1 e1|e2|e3 e3|...          T temporal patches, E events
    select   retrieve k=3   ->  e1 e1 e1 e3 e3 .   S patches, padded, in time order
    encode   vision tower, merger                  [B, S, p, D]
             merge to keep=1                       [B, 1, p, D]   one frame's worth

Teacher, student and every baseline are views of the same weights.
"""

import dataclasses

import jax
import jax.numpy as jnp

from data_pipelines.patches import PATCH_MEAN, PATCH_STD
from marc_jax.baselines import mean, pooled
from marc_jax.memory import budget, compress, retrieve
from marc_jax.rl.types import PromptBatch

SELECT = ("all", "retrieve", "random", "none")
METHOD = ("keep", "merge", "per_event", "mean", "pooled")


@dataclasses.dataclass(frozen=True)
class View:
    """A named way to look at a video.

    Attributes:
      select: "all" patches, also those between two events, those of the k events "retrieve"d for the question, one
        "random" patch, or "none".
      method: "keep" every chosen patch, greedy "merge" to `keep` patches (MARC), one patch "per_event", plain "mean" of
        all, or "pooled": p uniformly spaced patches, each pooled to a single token (equal tokens, space given up).
      k: events retrieved.
      keep: temporal patches that are left after merging.
      in_event: budget of one event in stage 1 of the merge (None: stage 2 alone).
      weighted: size-weighted means in the merge instead of the paper's (a + b) / 2.
      represent: a merged patch is the "mean" of its sources, or "select"s the one most like it.
      rule: None, always k events; "mass" or "gap", fewer where the scores say so (`retrieve.enough`).
      adaptive: "merge" to as many patches as the video deserves, 1..keep on the ladder of `budget`, shared among its
        events by what changes in them and how long they are, in place of `in_event`.
      tokens: most visual tokens read, for budgets below a whole patch; the least telling are masked.
    """

    select: str = "all"
    method: str = "keep"
    k: int = 3
    keep: int = 1
    in_event: int | None = 1
    weighted: bool = False
    represent: str = "mean"
    rule: str | None = None
    adaptive: bool = False
    tokens: int | None = None

    def __post_init__(self):
        if self.select not in SELECT or self.method not in METHOD:
            raise ValueError(f"view: select must be one of {SELECT} and method one of {METHOD}, got {self}")
        if self.adaptive and self.method != "merge":
            raise ValueError(f"view: adaptive shares the budget of a merge, but method is {self.method!r}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"view: tokens must be at least 1 (or None for all), not {self.tokens}")

    def patches(self, max_patches: int, max_event: int) -> int:
        """S, the static number of temporal patches that reach the vision tower."""
        retrieved = min(self.k * max_event, max_patches)  # events share no patch
        return {"all": max_patches, "retrieve": retrieved, "random": 1, "none": 0}[self.select]

    def kept(self, max_patches: int, max_event: int) -> int:
        """K, the static number of temporal patches' worth of tokens in the prompt (a blind one keeps one, masked)."""
        if self.method == "keep":
            return max(self.patches(max_patches, max_event), 1)
        if self.method == "per_event":
            return self.k
        return {"merge": self.keep, "mean": 1, "pooled": 1}[self.method]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shapes:
    """Where the videos of a batch differ in shape, their temporal patches being padded to one number of tokens.

    Attributes:
      tokens_b: int32 [B]; real visual tokens of a temporal patch, the first of those it is padded to.
      rate_b: float32 [B]; position ids from one temporal patch to the next, second_per_grid * tokens_per_second.
    """

    tokens_b: jax.Array
    rate_b: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """Where the patches of B videos lie in a bank of temporal patches, and where their events lie in the video.

    Attributes:
      patch_bt: int32 [B, T]; row in the bank, 0 where masked.
      mask_bt: bool [B, T].
      event_bt: int32 [B, T]; event slot of each patch, E where masked; a patch between two events has the later one's.
      start_be, len_be: int32 [B, E]; an event's first patch and its number of patches, without transitions.
      mask_be: bool [B, E].
      emb_bed: float32 [B, E, D]; L2-normalised event embeddings.
      shapes: None where all videos have the same.
    """

    patch_bt: jax.Array
    mask_bt: jax.Array
    event_bt: jax.Array
    start_be: jax.Array
    len_be: jax.Array
    mask_be: jax.Array
    emb_bed: jax.Array
    shapes: Shapes | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visual:
    """The chosen temporal patches of B videos.

    Attributes:
      patches_bsnc: [B, S, n, C]; uint8 pixels or features of the vision tower.
      mask_bs: bool [B, S].
      event_bs: int32 [B, S]; slot of the event a patch belongs to, 0..k-1 or 0..E-1, in time order.
      t_bs: float32 [B, S]; temporal index of the patch in its whole video.
      shapes: of the VideoIndex.
    """

    patches_bsnc: jax.Array
    mask_bs: jax.Array
    event_bs: jax.Array
    t_bs: jax.Array
    shapes: Shapes | None = None


def retrieved(view: View, index: VideoIndex, query_bd: jax.Array):
    """Event slots [B, k] in time order, and their validity, for the question embeddings query_bd [B, D]."""
    return retrieve.topk_events(query_bd, index.emb_bed, index.mask_be, view.k, rule=view.rule)


def select(view: View, index: VideoIndex, query_bd, bank: jax.Array, max_event: int, key) -> Visual:
    """Choose the patches of `view` and gather them. Pure, static shapes.

    `bank`: all patches [N, n, C], or each video's own [B, T, n, C]; rows of the index count in it.
    """
    b, t = index.patch_bt.shape
    if view.select == "all":
        slot_bs = jnp.broadcast_to(jnp.arange(t), (b, t))
        mask_bs, event_bs = index.mask_bt, index.event_bt
    elif view.select == "retrieve":
        ids_bk, valid_bk = retrieved(view, index, query_bd)
        found = retrieve.gather_patches(ids_bk, valid_bk, index.start_be, index.len_be, max_event)
        if found[0].shape[1] > view.patches(t, max_event):
            order_bs = jnp.argsort(~found[1], axis=1, stable=True)[:, : view.patches(t, max_event)]
            found = [jnp.take_along_axis(x, order_bs, axis=1) for x in found]
        slot_bs, mask_bs, event_bs = found
    elif view.select == "random":
        gumbel = jax.random.gumbel(key, (b, t))
        slot_bs = jnp.argmax(jnp.where(index.mask_bt, gumbel, -jnp.inf), axis=1)[:, None]
        mask_bs, event_bs = jnp.ones((b, 1), bool), jnp.zeros((b, 1), jnp.int32)
    else:
        slot_bs = jnp.zeros((b, 0), jnp.int32)
        mask_bs, event_bs = jnp.zeros((b, 0), bool), jnp.zeros((b, 0), jnp.int32)
    rows_bs = jnp.take_along_axis(index.patch_bt, slot_bs, axis=1)
    patches = bank[rows_bs] if bank.ndim == 3 else jnp.take_along_axis(bank, rows_bs[:, :, None, None], axis=1)
    return Visual(patches, mask_bs, event_bs.astype(jnp.int32), slot_bs.astype(jnp.float32), index.shapes)


def normalise(pixels_snc):
    """uint8 pixel patches -> what the vision tower was trained on; `data_pipelines.patches` on the device."""
    return (pixels_snc.astype(jnp.float32) / 255 - PATCH_MEAN) / PATCH_STD


def to_tokens(model, patches_bsnc, grid_hw):
    """Visual tokens [B, S, p, D] of uint8 pixel patches, or of features that the tower already computed."""
    b, s, n, c = patches_bsnc.shape
    flat = patches_bsnc.reshape(b * s, n, c)
    tokens = model.vision(normalise(flat), grid_hw) if flat.dtype == jnp.uint8 else model.merge_features(flat)
    return tokens.reshape(b, s, *tokens.shape[1:])


def deserved(view: View, vis_bspd, mask_bs, event_bs):
    """An adaptive view's budgets in patches: of each video int32 [B], and of each patch's event int32 [B, S]."""
    s, p = vis_bspd.shape[1:3]
    len_be, change_be = budget.event_statistics(vis_bspd, mask_bs, event_bs, s)
    tokens_b = budget.rung(budget.wanted_patches(len_be, change_be) * p)
    total_b = jnp.clip(tokens_b // p, 1, view.keep)
    share_be = budget.share(total_b, budget.event_weights(len_be, change_be), len_be, min(view.keep, s))
    return total_b, budget.of_patches(share_be, event_bs)


def reduce(view: View, vis_bspd, visual: Visual) -> compress.Compressed:
    """Apply the view's compression to visual tokens [B, S, p, D]; "keep" gives every patch a row of its own."""
    args = (vis_bspd, visual.mask_bs, visual.event_bs)
    how = dict(weighted=view.weighted, represent=view.represent)
    if view.method == "merge" and view.adaptive:
        total_b, per_event = deserved(view, *args)
        return compress.compress(*args, view.keep, per_event=per_event, target_b=total_b, **how)
    if view.method == "merge":
        return compress.compress(*args, view.keep, per_event=view.in_event, **how)
    if view.method == "per_event":
        return compress.compress_per_event(*args, view.k, **how)
    if view.method == "mean":
        return mean.compress(*args, 1)
    if view.method == "pooled":
        return pooled.compress(*args, 1)
    eye = jnp.broadcast_to(jnp.eye(vis_bspd.shape[1]), (vis_bspd.shape[0], vis_bspd.shape[1], vis_bspd.shape[1]))
    steps = jnp.broadcast_to(jnp.arange(vis_bspd.shape[1], dtype=jnp.float32), visual.mask_bs.shape)
    return compress.Compressed(vis_bspd, steps, visual.mask_bs.astype(jnp.float32), eye, visual.mask_bs)


def make_encode(view: View, grid_hw: tuple[int, int], time_scale: float):
    """encode(model, visual, prompt) -> (vis_bnd [B, K*p, D], prompt with positions and mask of the kept tokens).

    A kept token stands at the mean temporal index of what it was merged from (models.md 1.5, positions of compressed
    tokens): floor(t * time_scale), time_scale = second_per_grid * tokens_per_second, or the video's own rate. Prompts
    come with temporal offset 0 on visual tokens, so only this function knows about time.
    """

    def encode(model, visual: Visual, prompt: PromptBatch):
        if view.select == "none":
            b, n = prompt.tokens_bp.shape[0], grid_hw[0] * grid_hw[1] // 4
            blind = jnp.zeros((b, n, model.cfg.text.hidden_size))
            return blind, dataclasses.replace(prompt, mask_bp=prompt.mask_bp & (prompt.vis_index_bp < 0))
        tokens_bspd, shapes = to_tokens(model, visual.patches_bsnc, grid_hw), visual.shapes
        if shapes is not None:
            real_bp = jnp.arange(tokens_bspd.shape[2]) < shapes.tokens_b[:, None]
            tokens_bspd = jnp.where(real_bp[:, None, :, None], tokens_bspd, 0)
        kept = reduce(view, tokens_bspd, visual)
        b, k, p, d = kept.tokens_bkpd.shape
        rate = time_scale if shapes is None else shapes.rate_b[:, None]
        t_bk = jnp.einsum("bks,bs->bk", kept.weights_bkt, visual.t_bs)
        is_vis_bp = prompt.vis_index_bp >= 0
        patch_bp = jnp.clip(prompt.vis_index_bp, 0) // p
        offset_bp = jnp.take_along_axis(jnp.floor(t_bk * rate + 1e-4).astype(jnp.int32), patch_bp, axis=1)
        there_bp = jnp.take_along_axis(kept.mask_bk, patch_bp, axis=1)
        if view.tokens is not None:
            read_bn = budget.telling_tokens(kept.tokens_bkpd, kept.mask_bk, view.tokens).reshape(b, k * p)
            there_bp &= jnp.take_along_axis(read_bn, jnp.clip(prompt.vis_index_bp, 0), axis=1)
        pos_3bp = prompt.pos_3bp.at[0].add(jnp.where(is_vis_bp, offset_bp, 0))
        mask_bp = prompt.mask_bp & (~is_vis_bp | there_bp)
        return kept.tokens_bkpd.reshape(b, k * p, d), dataclasses.replace(prompt, pos_3bp=pos_3bp, mask_bp=mask_bp)

    return encode
