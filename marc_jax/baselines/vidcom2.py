"""VidCom2 (arXiv 2505.14454, EMNLP 2025): more tokens for frames that differ from the video, and the odd ones out.

With x the half of the channels that vary least over the video, each token scaled to length 1:
    k(x, c)  = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - c|^2 / (2 a))
    g_v, g_t = mean of x over the video, over patch t
    u_t      = -mean_p k(x_tp, g_v);  w = softmax((u - max u) / 0.01);  r_t = min(1, R (1 + w_t - mean w))
    kept     = of patch t the k_t tokens with the smallest k(x_tp, g_v) + k(x_tp, g_t)
Channels, kernels and the temperature are the released code's (github.com/xuyang-liu16/VidCom2), not the paper's text.
The code takes k_t = max(1, round(r_t P)), whose sum is not the budget (`exact=False`). Here the budget is divided in
proportion to r_t, one token to every patch first, so that methods compare at equal tokens.
"""

import jax
import jax.numpy as jnp

from marc_jax.baselines.kept import KeptTokens, budget, clean, gather, real_tokens, smallest, unit
from marc_jax.memory.budget import share

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


def compress(vis_btpd, mask_bt, event_bt, keep, *, target_b=None, tokens_b=None, exact=True) -> KeptTokens:
    """Arguments and result as in `kept`; `exact=False` rounds as the released code does, cut off at `keep` tokens."""
    del event_bt
    p = vis_btpd.shape[2]
    count_b = budget(mask_bt, p if tokens_b is None else tokens_b, keep, target_b)
    valid_btp = real_tokens(mask_bt, p, tokens_b)
    real_bt = jnp.sum(valid_btp, axis=2)
    x_btpd = unit(_steady_channels(jnp.where(valid_btp[..., None], clean(vis_btpd, mask_bt), 0), valid_btp))
    has_b = jnp.maximum(jnp.sum(real_bt, axis=1), 1)
    frame_btd = jnp.sum(x_btpd, axis=2) / jnp.maximum(real_bt, 1)[:, :, None]
    video_bd = jnp.sum(x_btpd, axis=(1, 2)) / has_b[:, None]
    to_video_btp = _kernel(x_btpd, video_bd[:, None, None])
    usual_bt = jnp.sum(jnp.where(valid_btp, to_video_btp, 0), axis=2) / jnp.maximum(real_bt, 1)
    rate_bt = _rates(-usual_bt, mask_bt, count_b / has_b)
    if exact:
        k_bt = share(count_b, rate_bt, real_bt, p)
    else:
        k_bt = jnp.maximum(jnp.round(rate_bt * real_bt), 1).astype(jnp.int32)
    chosen_btp = smallest(to_video_btp + _kernel(x_btpd, frame_btd[:, :, None]), valid_btp, k_bt)
    return gather(vis_btpd, chosen_btp, keep)


def _steady_channels(x_btpd, valid_btp):
    """Zeros in all channels but the half with the lowest variance over a video's tokens."""
    count_b = jnp.maximum(jnp.sum(valid_btp, axis=(1, 2)), 1)[:, None, None, None]
    mean = jnp.sum(x_btpd, axis=(1, 2), keepdims=True) / count_b
    spread = jnp.where(valid_btp[..., None], x_btpd - mean, 0) ** 2
    variance_bd = jnp.sum(spread, axis=(1, 2)) / count_b[:, 0, 0]
    steady_bd = smallest(variance_bd, jnp.ones_like(variance_bd, bool), variance_bd.shape[1] // 2)
    return jnp.where(steady_bd[:, None, None], x_btpd, 0)


def _kernel(x_btpd, centre):
    distance_btp = jnp.sum((x_btpd - centre) ** 2, axis=-1)
    return sum(jnp.exp(-distance_btp / (2 * a)) for a in ALPHAS)


def _rates(unique_bt, mask_bt, rate_b):
    weight_bt = jax.nn.softmax(jnp.where(mask_bt, unique_bt / TEMPERATURE, -1e30), axis=1)
    mean_b = 1 / jnp.maximum(jnp.sum(mask_bt, axis=1, keepdims=True), 1)
    return jnp.where(mask_bt, jnp.minimum(rate_b[:, None] * (1 + weight_bt - mean_b), 1), 0)
