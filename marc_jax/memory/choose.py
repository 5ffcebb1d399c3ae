"""A view's single patches and single tokens: which of `marc_jax.baselines` chooses them, and how many it may keep."""

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.baselines import (
    adjacent_merge,
    aks,
    bolt,
    dtd,
    evs,
    fastvid,
    holitom,
    pooled,
    random,
    token_learner,
    topk,
    uniform,
    vidcom2,
    visionzip,
)
from marc_jax.baselines.kept import KeptTokens

SELECTORS = {"uniform": uniform.select, "topk": topk.select, "bolt": bolt.select, "aks": aks.select}
PRUNERS = {"vidcom2": vidcom2.compress, "evs": evs.compress, "dtd": dtd.compress}
# They read the attention of the vision tower.
WATCHERS = {"visionzip": visionzip.compress, "fastvid": fastvid.compress, "holitom": holitom.compress}
SCENIC = ("adjacent_merge", "token_learner")  # they run google-research/scenic, the [scenic] extra
TOKENS = ("random_tokens", "pooled_tokens", *PRUNERS, *WATCHERS, *SCENIC)


def single_tokens(view, vis_bspd, visual, grid_hw: tuple[int, int], watched) -> KeptTokens:
    """The single tokens that a view of the TOKENS methods keeps, at most `view.count`.

    Args:
      grid_hw: a frame in patches. watched: `Watched` of the B * S patches, for the methods of WATCHERS, else None.
    """
    b, s, p, _ = vis_bspd.shape
    count_b = view.count(visual.length_b, visual.per_patch(p * view.shrink**2))
    args = (vis_bspd, visual.mask_bs, visual.event_bs, s * p)
    real = {"target_b": count_b, "tokens_b": None if visual.shapes is None else visual.shapes.tokens_b}
    if view.method == "random_tokens":
        return random.compress_tokens(*args, key=jax.random.key(view.seed), **real)
    if view.method in PRUNERS:
        return PRUNERS[view.method](*args, **real)
    if visual.shapes is not None:
        raise ValueError(f"view: method {view.method!r} needs videos of one size")
    if view.method == "pooled_tokens":
        return pooled.compress_tokens(*args, grid_hw=(grid_hw[0] // 2, grid_hw[1] // 2), target_b=count_b)
    if view.method == "adjacent_merge":
        full = p * view.shrink**2
        return adjacent_merge.compress(*args, count=lambda patches: int(view.count(np.array(patches), full)))
    if view.method == "token_learner":
        return token_learner.compress(*args, target_b=count_b, seed=view.seed)
    received, key = (a.reshape(b, s, *a.shape[1:]) for a in (watched.received_sp, watched.key_sph))
    return WATCHERS[view.method](*args, received_btp=received, key_btph=key, target_b=count_b)


def single_patches(view, index, query_bd, tokens_per_patch: int, emb_nd):
    """Slots int32 [B, S] and their validity, of a view that chooses patches one by one.

    `tokens_per_patch`: what patches are padded to where videos differ in it (`index.shapes`).
    """
    score_bt = None
    if view.select != "uniform":
        if emb_nd is None:
            raise ValueError(f"view: select {view.select!r} needs an embedding of every patch, and there is none here")
        score_bt = jnp.einsum("bd,btd->bt", query_bd, emb_nd[index.patch_bt], precision="highest")
    most, target_b = view.patches(index.mask_bt.shape[1], 0), None
    if view.share is not None:
        length_b = jnp.sum(index.mask_bt, axis=1, dtype=jnp.int32)
        if index.shapes is not None:
            tokens_per_patch = index.shapes.tokens_b
        count_b = view.count(length_b, tokens_per_patch)
        target_b = jnp.minimum(-(-count_b * view.shrink**2 // tokens_per_patch), length_b)
    how = {"apart": view.apart} if view.select == "topk" else {}
    return SELECTORS[view.select](score_bt, index.mask_bt, most, target_b=target_b, **how)
