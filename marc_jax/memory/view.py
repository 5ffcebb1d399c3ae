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
import math

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.patches import PATCH_MEAN, PATCH_STD
from marc_jax.baselines import lower_resolution, mean, moviechat, pooled
from marc_jax.baselines.kept import KeptTokens, gather, real_tokens
from marc_jax.memory import budget, compress, retrieve
from marc_jax.memory.choose import SELECTORS, TOKENS, WATCHERS, single_patches, single_tokens
from marc_jax.rl.types import PromptBatch

SELECT = ("all", "retrieve", "random", "none", *SELECTORS)
METHOD = ("keep", "merge", "per_event", "mean", "pooled", "moviechat", "fastv", *TOKENS)


@dataclasses.dataclass(frozen=True)
class View:
    """A named way to look at a video.

    Attributes:
      select: "all" patches, also those between two events, those of the k events "retrieve"d for the question, one
        "random" patch, "none", or k single patches: "uniform", or by a selector of `marc_jax.baselines` from their
        similarity to the question ("topk", "bolt", "aks").
      method: "keep" every chosen patch, greedy "merge" to `keep` patches (MARC), one patch "per_event", plain "mean" of
        all, "pooled": p uniformly spaced patches, each pooled to a single token (equal tokens, space given up), or
        another compressor of `marc_jax.baselines`.
      k: events (or single patches) chosen.
      keep: temporal patches that are left after merging.
      in_event: budget of one event in stage 1 of the merge (None: stage 2 alone).
      weighted: size-weighted means in the merge instead of the paper's (a + b) / 2.
      represent: a merged patch is the "mean" of its sources, or "select"s the one most like it.
      rule: None, always k events; "mass" or "gap", fewer where the scores say so (`retrieve.enough`).
      adaptive: "merge" to as many patches as the video deserves, 1..keep on a ladder, shared among its events by what
        changes in them and how long they are, in place of `in_event`.
      budgets: its ladder, in visual tokens.
      tokens: most visual tokens read, for budgets below a whole patch; the least telling are masked.
      share: the part of the whole video's tokens that is read, in thousandths; in place of k single patches, `keep` and
        `tokens`. Methods that keep whole patches take as many as hold it, and the least telling tokens go.
      shrink: frames are shrunk by this factor on both sides before the vision tower sees them (from pixels alone).
      apart: patches chosen by "topk" lie at least so many patches apart.
      seed: of "random_tokens".
      layer: after which the decoder loses tokens by "fastv"; until then it reads every chosen patch.
      tell: said before every question, e.g. "{patches} patches, {tokens} tokens. ", the most that is read; "" says
        nothing.
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
    budgets: tuple[int, ...] = budget.LADDER
    tokens: int | None = None
    share: float | None = None
    shrink: int = 1
    apart: int = 1
    seed: int = 0
    layer: int = 2
    tell: str = ""

    def __post_init__(self):
        if self.select not in SELECT or self.method not in METHOD:
            raise ValueError(f"view: select must be one of {SELECT} and method one of {METHOD}, got {self}")
        if self.adaptive and self.method != "merge":
            raise ValueError(f"view: adaptive shares the budget of a merge, but method is {self.method!r}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"view: tokens must be at least 1 (or None for all), not {self.tokens}")
        if self.share is None and self.method in (*TOKENS, "moviechat", "fastv"):
            raise ValueError(f"view: method {self.method!r} needs a share, the part of the video's tokens to read")
        if self.share is not None:
            if not 0.001 <= self.share <= 1:
                raise ValueError(f"view: share must lie between 0.001 and 1, not {self.share}")
            if self.method in ("per_event", "mean", "pooled") or self.adaptive or self.tokens is not None:
                raise ValueError("view: share goes with neither per_event, mean, pooled, adaptive nor tokens")
            if self.select in ("random", "none"):
                raise ValueError(f"view: select {self.select!r} has a size of its own, it takes no share")
        if self.method in ("fastv", "adjacent_merge") and self.select != "all":
            raise ValueError(f"view: method {self.method!r} takes its share of whole videos: select must be 'all'")
        if min(self.shrink, self.apart, self.layer) < 1:
            raise ValueError("view: shrink, apart and layer must be at least 1")

    @property
    def reads_pixels(self) -> bool:
        """Whether the vision tower has to run for this view: its stored features do not hold what it needs."""
        return self.shrink > 1 or self.method in WATCHERS

    @property
    def asks(self) -> bool:
        """Whether the choice of patches depends on the question."""
        return self.select in ("retrieve", "topk", "bolt", "aks")

    @property
    def keeps_tokens(self) -> bool:
        """Whether single tokens go into the prompt, and not whole temporal patches."""
        return self.method in TOKENS or self.tokens is not None or (self.share is not None and self.method != "fastv")

    def count(self, patches_b, tokens_per_patch):
        """int [B]: tokens that are read of videos of so many patches, for a view with a share; at least 1."""
        return ((round(1000 * self.share) * patches_b * tokens_per_patch + 500) // 1000).clip(1)

    def told(self, kept: int, tokens_per_patch: int) -> str:
        """What `tell` says of a prompt with so many patches' worth of tokens."""
        tokens = kept * tokens_per_patch
        return self.tell.format(patches=kept, tokens=tokens if self.tokens is None else min(self.tokens, tokens))

    def patches(self, max_patches: int, max_event: int) -> int:
        """S, the static number of temporal patches that reach the vision tower."""
        if self.select in SELECTORS:
            most = self.k if self.share is None else math.ceil(self.share * max_patches * self.shrink**2)
            return min(most, max_patches)
        retrieved = min(self.k * max_event, max_patches)  # events share no patch
        return {"all": max_patches, "retrieve": retrieved, "random": 1, "none": 0}[self.select]

    def most(self, patches: int, tokens_per_patch: int, max_event: int) -> int:
        """The most visual tokens that are read of a video of so many patches, of so many tokens each."""
        if self.share is not None and self.method != "fastv":
            return int(self.count(np.int64(patches), tokens_per_patch))
        tokens = min(self.kept(patches, max_event), patches) * tokens_per_patch
        return tokens if self.tokens is None else min(self.tokens, tokens)

    def kept(self, max_patches: int, max_event: int) -> int:
        """K, the static number of temporal patches' worth of tokens in the prompt (a blind one keeps one, masked)."""
        if self.share is not None and self.method != "fastv":
            return max(math.ceil(round(1000 * self.share) * max_patches / 1000), 1)
        if self.method in ("keep", "fastv"):
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
      wide_b: int32 [B]; how many of them stand side by side.
      rate_b: float32 [B]; position ids from one temporal patch to the next, second_per_grid * tokens_per_second.
    """

    tokens_b: jax.Array
    wide_b: jax.Array
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
      length_b: int32 [B]; patches of the whole video.
      shapes: of the VideoIndex.
    """

    patches_bsnc: jax.Array
    mask_bs: jax.Array
    event_bs: jax.Array
    t_bs: jax.Array
    length_b: jax.Array
    shapes: Shapes | None = None

    def per_patch(self, padded: int):
        """Visual tokens of a temporal patch that is padded to so many: int, or int32 [B] where videos differ in it."""
        return padded if self.shapes is None else self.shapes.tokens_b


def retrieved(view: View, index: VideoIndex, query_bd: jax.Array):
    """Event slots [B, k] in time order, and their validity, for the question embeddings query_bd [B, D]."""
    return retrieve.topk_events(query_bd, index.emb_bed, index.mask_be, view.k, rule=view.rule)


def select(view: View, index: VideoIndex, query_bd, bank: jax.Array, max_event: int, key, emb_nd=None) -> Visual:
    """Choose the patches of `view` and gather them. Pure, static shapes.

    `bank`: all patches [N, n, C], or each video's own [B, T, n, C]; rows of the index count in it. `emb_nd`: embeddings
    of the bank's N patches, of which "topk", "bolt" and "aks" take the product with query_bd.
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
    elif view.select in SELECTORS:
        slot_bs, mask_bs = single_patches(view, index, query_bd, bank.shape[-2] // 4, emb_nd)
        event_bs = jnp.take_along_axis(index.event_bt, slot_bs, axis=1)
    else:
        slot_bs = jnp.zeros((b, 0), jnp.int32)
        mask_bs, event_bs = jnp.zeros((b, 0), bool), jnp.zeros((b, 0), jnp.int32)
    rows_bs = jnp.take_along_axis(index.patch_bt, slot_bs, axis=1)
    length_b = jnp.sum(index.mask_bt, axis=1, dtype=jnp.int32)
    patches = bank[rows_bs] if bank.ndim == 3 else jnp.take_along_axis(bank, rows_bs[:, :, None, None], axis=1)
    return Visual(
        patches, mask_bs, event_bs.astype(jnp.int32), slot_bs.astype(jnp.float32), length_b, index.shapes
    )  # fmt: skip


def normalise(pixels_snc):
    """uint8 pixel patches -> what the vision tower was trained on; `data_pipelines.patches` on the device."""
    return (pixels_snc.astype(jnp.float32) / 255 - PATCH_MEAN) / PATCH_STD


def to_tokens(model, patches_bsnc, grid_hw):
    """Visual tokens [B, S, p, D] of uint8 pixel patches, or of features that the tower already computed."""
    b, s, n, c = patches_bsnc.shape
    flat = patches_bsnc.reshape(b * s, n, c)
    tokens = model.vision(normalise(flat), grid_hw) if flat.dtype == jnp.uint8 else model.merge_features(flat)
    return tokens.reshape(b, s, *tokens.shape[1:])


def deserved(view: View, vis_bspd, visual: Visual):
    """An adaptive view's budgets in patches: of each video int32 [B], and of each patch's event int32 [B, S]."""
    s, p, event_bs = vis_bspd.shape[1], visual.per_patch(vis_bspd.shape[2]), visual.event_bs
    real_b = None if visual.shapes is None else visual.shapes.tokens_b
    len_be, change_be = budget.event_statistics(vis_bspd, visual.mask_bs, event_bs, s, real_b)
    tokens_b = budget.rung(budget.wanted_patches(len_be, change_be) * p, view.budgets)
    total_b = jnp.clip(tokens_b // p, 1, view.keep)
    share_be = budget.share(total_b, budget.event_weights(len_be, change_be), len_be, min(view.keep, s))
    return total_b, budget.of_patches(share_be, event_bs)


def reduce(view: View, vis_bspd, visual: Visual) -> compress.Compressed:
    """Apply the view's compression to visual tokens [B, S, p, D]; "keep" and "fastv" give every patch its own row.

    Of a view with a share: as many whole patches as hold it. Not for methods that keep single tokens.
    """
    args = (vis_bspd, visual.mask_bs, visual.event_bs)
    how = dict(weighted=view.weighted, represent=view.represent)
    keep, target_b = view.keep, None
    if view.share is not None:
        keep, p = vis_bspd.shape[1], vis_bspd.shape[2]
        target_b = -(-view.count(visual.length_b, visual.per_patch(p * view.shrink**2)) // visual.per_patch(p))
    if view.method == "merge" and view.adaptive:
        total_b, per_event = deserved(view, vis_bspd, visual)
        return compress.compress(*args, keep, per_event=per_event, target_b=total_b, **how)
    if view.method == "merge":
        return compress.compress(*args, keep, per_event=view.in_event, target_b=target_b, **how)
    if view.method == "moviechat":
        return moviechat.compress(*args, keep, target_b=target_b)
    if view.method == "per_event":
        return compress.compress_per_event(*args, view.k, **how)
    if view.method == "mean":
        return mean.compress(*args, 1)
    if view.method == "pooled":
        return pooled.compress(*args, 1)
    eye = jnp.broadcast_to(jnp.eye(vis_bspd.shape[1]), (vis_bspd.shape[0], vis_bspd.shape[1], vis_bspd.shape[1]))
    steps = jnp.broadcast_to(jnp.arange(vis_bspd.shape[1], dtype=jnp.float32), visual.mask_bs.shape)
    return compress.Compressed(vis_bspd, steps, visual.mask_bs.astype(jnp.float32), eye, visual.mask_bs)


def see(view: View, model, visual: Visual, grid_hw: tuple[int, int]):
    """What the view's vision tower makes of the chosen patches: tokens [B, S, p, D], the grid that it saw, `Watched`.

    Raises ValueError: the view reads pixels, and the patches are features.
    """
    patches = visual.patches_bsnc
    if not view.reads_pixels:
        return to_tokens(model, patches, grid_hw), grid_hw, None
    if patches.dtype != jnp.uint8:
        raise ValueError(f"view: method {view.method!r}, shrink {view.shrink} reads pixels; here are features alone")
    patches, grid_hw = lower_resolution.shrink(patches, grid_hw, view.shrink)
    if view.method not in WATCHERS:
        return to_tokens(model, patches, grid_hw), grid_hw, None
    b, s, n, c = patches.shape
    tokens, watched = model.watched_vision(normalise(patches.reshape(b * s, n, c)), grid_hw)
    return tokens.reshape(b, s, *tokens.shape[1:]), grid_hw, watched


def make_encode(view: View, grid_hw: tuple[int, int], time_scale: float):
    """encode(model, visual, prompt) -> (vis_bnd [B, N, D], prompt with positions and mask of the kept tokens).

    A kept token stands at the mean temporal index of what it was merged from (models.md 1.5, positions of compressed
    tokens): floor(t * time_scale), time_scale = second_per_grid * tokens_per_second, or the video's own rate; on the
    axes of space where its (anchor's) source stood. Prompts come with temporal offset 0 on visual tokens, so only this
    function knows about time.
    """

    def encode(model, visual: Visual, prompt: PromptBatch):
        if view.select == "none":
            b, n = prompt.tokens_bp.shape[0], grid_hw[0] * grid_hw[1] // 4
            blind = jnp.zeros((b, n, model.cfg.text.hidden_size))
            return blind, dataclasses.replace(prompt, mask_bp=prompt.mask_bp & (prompt.vis_index_bp < 0))
        vis_bspd, grid, watched = see(view, model, visual, grid_hw)
        p, shapes = vis_bspd.shape[2], visual.shapes
        if shapes is not None:
            vis_bspd = jnp.where(real_tokens(visual.mask_bs, p, shapes.tokens_b)[..., None], vis_bspd, 0)
        if view.method in TOKENS:
            kept = single_tokens(view, vis_bspd, visual, grid, watched)
            t_bn = jnp.take_along_axis(visual.t_bs, kept.at_bn // p, axis=1)
        else:
            kept, t_bn = _flat(view, reduce(view, vis_bspd, visual), visual)
        rate, wide = (time_scale, grid[1] // 2) if shapes is None else (shapes.rate_b[:, None], shapes.wide_b[:, None])
        place_bn, t_bn = kept.at_bn % p, jnp.floor(t_bn * rate + 1e-4).astype(jnp.int32)
        prompt = _in_order(prompt) if view.keeps_tokens else prompt
        return kept.tokens_bnd, _stand(prompt, (t_bn, place_bn // wide, place_bn % wide), kept.mask_bn)

    return encode


def _flat(view: View, kept: compress.Compressed, visual: Visual) -> tuple[KeptTokens, jax.Array]:
    """Whole patches as single tokens, and their times [B, N]; over the budget, the least telling go."""
    b, k, p, d = kept.tokens_bkpd.shape
    t_bk = jnp.einsum("bks,bs->bk", kept.weights_bkt, visual.t_bs)
    if view.keeps_tokens:
        count = view.tokens
        if count is None:
            count = view.count(visual.length_b, visual.per_patch(p * view.shrink**2))
        there_bkp = real_tokens(kept.mask_bk, p, None if visual.shapes is None else visual.shapes.tokens_b)
        tokens = gather(kept.tokens_bkpd, budget.telling_tokens(kept.tokens_bkpd, there_bkp, count), k * p)
    else:
        at_bn = jnp.broadcast_to(jnp.arange(k * p), (b, k * p))
        tokens = KeptTokens(kept.tokens_bkpd.reshape(b, k * p, d), at_bn, jnp.repeat(kept.mask_bk, p, axis=1))
    return tokens, jnp.take_along_axis(t_bk, tokens.at_bn // p, axis=1)


def _in_order(prompt: PromptBatch) -> PromptBatch:
    """The prompt with its visual slots numbered one by one; padded patches leave numbers out."""
    is_vis_bp = prompt.vis_index_bp >= 0
    return dataclasses.replace(prompt, vis_index_bp=jnp.where(is_vis_bp, jnp.cumsum(is_vis_bp, axis=1) - 1, -1))


def _stand(prompt: PromptBatch, place_3, mask_bn) -> PromptBatch:
    """The prompt with its visual slots at the places (t, h, w), each int32 [B, N], behind the visual's start."""
    is_vis_bp = prompt.vis_index_bp >= 0
    slot_bp = jnp.clip(prompt.vis_index_bp, 0, mask_bn.shape[1] - 1)
    start_b = jnp.min(jnp.where(is_vis_bp, prompt.pos_3bp[1], jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    place_3bp = jnp.stack([start_b + jnp.take_along_axis(place, slot_bp, axis=1) for place in place_3])
    there_bp = jnp.take_along_axis(mask_bn, slot_bp, axis=1) & (prompt.vis_index_bp < mask_bn.shape[1])
    return dataclasses.replace(
        prompt,
        pos_3bp=jnp.where(is_vis_bp, place_3bp, prompt.pos_3bp),
        mask_bp=prompt.mask_bp & (~is_vis_bp | there_bp),
        vis_index_bp=jnp.where(is_vis_bp, slot_bp, -1),
    )
