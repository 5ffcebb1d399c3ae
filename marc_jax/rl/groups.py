"""Sampled groups as they go from the rollout to the update: choose rows, refill dead ones, put live ones first.

A dead group, all of whose rewards are equal, has no policy gradient. DAPO (arXiv 2503.14476) draws further questions in
their place; those that stay can be left out, and micro-batches that hold nothing else then cost nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax.rl.types import Completions, PromptBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """B prompts with G scored completions each; every leaf has B as its leading axis, a prompt's positions apart.

    Attributes:
      visual: what `encode` takes.
      rewards_bg: float32 [B, G], without the retention bonus.
      bonus_bg: float32 [B, G].
      weight_b: float32 [B]; what the question's advantages are multiplied by.
      credit_bgr: float32 [B, G, R], added to the advantage of each token; None: nothing is.
    """

    prompt: PromptBatch
    visual: Any
    completions: Completions
    rewards_bg: Any
    bonus_bg: Any
    weight_b: Any
    credit_bgr: jax.Array | None = None


def _over_b(fn, *trees):
    """fn(leaves, axis of B) over pytrees of one structure."""

    def node(*xs):
        if isinstance(xs[0], PromptBatch):
            fields = [f.name for f in dataclasses.fields(PromptBatch)]
            return PromptBatch(**{n: fn([getattr(x, n) for x in xs], int(n == "pos_3bp")) for n in fields})
        return fn(xs, 0)

    return jax.tree.map(node, *trees, is_leaf=lambda x: isinstance(x, PromptBatch))


def rows(tree, index_b):
    """Rows `index_b` of every leaf."""
    return _over_b(lambda xs, axis: jnp.take(xs[0], jnp.asarray(index_b), axis=axis), tree)


def stacked(one, two):
    """Both, one behind the other along B; where other sides differ the smaller is padded with zeros (masked)."""

    def join(xs, axis):
        sides = [max(x.shape[i] for x in xs) for i in range(xs[0].ndim)]
        pads = [[(0, 0 if i == axis else side - x.shape[i]) for i, side in enumerate(sides)] for x in xs]
        return jnp.concatenate([jnp.pad(jnp.asarray(x), p) for x, p in zip(xs, pads, strict=True)], axis=axis)

    return _over_b(join, one, two)


def exchanged(one, two, index_b):
    """Rows `index_b`, of `refill_index`, of both."""
    return rows(stacked(one, two), index_b)


def refill_index(live_b: np.ndarray, live_more_b: np.ndarray) -> np.ndarray:
    """Rows of `stacked(first, more)` [B] in which live ones of `more`, in order, took the places of dead ones."""
    index_b = np.arange(len(live_b))
    dead, fresh = np.flatnonzero(~live_b), np.flatnonzero(live_more_b) + len(live_b)
    count = min(len(dead), len(fresh))
    index_b[dead[:count]] = fresh[:count]
    return index_b


def without_dead(batch, live_b: jax.Array):
    """A `step.GRPOBatch` with live groups first (order kept), and nothing in the masks of the others."""
    batch, live_b = rows((batch, live_b), jnp.argsort(~live_b, stable=True))
    done = batch.completions
    done = dataclasses.replace(done, mask_bgr=done.mask_bgr & live_b[:, None, None])
    return dataclasses.replace(batch, completions=done)
