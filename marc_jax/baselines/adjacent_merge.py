"""Adjacent merging as google-research/scenic has it (`projects/streaming_dvc`, streaming dense captioning 2404.01297).

A buffer holds the first K tokens of the video; each later token in turn joins it: of all neighbours in the buffer and
the new token, the pair with the largest cosine becomes its mean, weighted by how many tokens each stands for, and the
new token takes the free slot. Scenic's own function runs here (the [scenic] extra, `adjacent_merge`; importing it needs
no TensorFlow). It takes the free slot in the middle of the buffer, so after a while neighbours in the buffer need not
be neighbours in the video; that is kept. Tokens are returned in the order of their places.
"""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from marc_jax.baselines.kept import KeptTokens

SOURCE = "scenic @ git+https://github.com/google-research/scenic@4a38d47"
PLACE = 1e-6  # places ride along as two more channels, so small that no cosine notices


def scenic(module: str):
    """A module of google-research/scenic. Raises ModuleNotFoundError that says how to install it."""
    try:
        return importlib.import_module(f"scenic.{module}")
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            f"this baseline runs google-research/scenic, and {e.name} is not there (the PyPI name `scenic` is another "
            f'project): pip install "marc_jax[scenic]"; pip install --no-deps "{SOURCE}"'
        ) from None


def compress(vis_btpd, mask_bt, event_bt, keep, *, count: Callable[[int], int]) -> KeptTokens:
    """Arguments and result as in `kept`, but the budget.

    Args:
      mask_bt: patches of a video come first.
      count: static; the tokens kept of a video of so many patches. Scenic's loop has static shapes: one branch is
        compiled for every number of patches.
    """
    del event_bt
    merge = scenic("projects.streaming_dvc.modeling.streaming_utils").adjacent_merge
    b, t, p, d = vis_btpd.shape
    place_tp = jnp.stack(jnp.broadcast_arrays(jnp.arange(t)[:, None], jnp.arange(p)), axis=-1) * PLACE
    clean = jnp.where(mask_bt[:, :, None, None], vis_btpd, 0).astype(jnp.float32)
    rows_bmc = jnp.concatenate([clean, jnp.broadcast_to(place_tp, (b, t, p, 2))], axis=3).reshape(b, t * p, d + 2)

    def branch(patches):
        n = min(count(patches), keep, patches * p)

        def run(rows_mc):
            kept = rows_mc[:n]
            if 0 < n < patches * p:
                kept = merge(kept, rows_mc[n : patches * p], weights=jnp.ones(n, jnp.int32))[0]
            return jnp.pad(kept, ((0, keep - n), (0, 0))), jnp.arange(keep) < n

        return run

    branches = [branch(patches) for patches in range(t + 1)]
    one = lambda x: lax.switch(x[0], branches, x[1])  # noqa: E731
    rows_bnc, mask_bn = lax.map(one, (jnp.sum(mask_bt, axis=1), rows_bmc))
    t_bn, p_bn = jnp.moveaxis(jnp.rint(rows_bnc[..., d:] / PLACE).astype(jnp.int32), -1, 0)
    at_bn = jnp.where(mask_bn, t_bn * p + p_bn, t * p)
    order_bn = jnp.argsort(at_bn, axis=1, stable=True)
    move = lambda a: jnp.take_along_axis(a, order_bn.reshape(*order_bn.shape, *[1] * (a.ndim - 2)), axis=1)  # noqa: E731
    tokens, at_bn, mask_bn = jax.tree.map(move, (rows_bnc[..., :d], at_bn, mask_bn))
    tokens = jnp.where(mask_bn[..., None], tokens, 0).astype(vis_btpd.dtype)
    return KeptTokens(tokens, jnp.where(mask_bn, at_bn, 0), mask_bn)
