"""Density peaks over nearest neighbours (DPC-kNN): which tokens of a row stand for the others.

    d_ij    = |x_i - x_j| / sqrt(D)
    rho_i   = exp(-mean over the k nearest j (itself among them) of d_ij^2)
    delta_i = min of d_ij over the j with a larger rho; the largest distance of the row where there is none
    centres = the tokens with the largest rho * delta
As FastVID and HoliTom use it. Their released code breaks ties of rho by noise of 1e-6; here the earlier token wins.
"""

import jax.numpy as jnp
from jax import lax

from marc_jax.baselines.kept import smallest


def distances(x_rpd) -> jnp.ndarray:
    """float32 [R, P, P], Euclid over sqrt(D), of float32 tokens."""
    gram = jnp.einsum("rpd,rqd->rpq", x_rpd, x_rpd, precision=lax.Precision.HIGHEST)
    square = jnp.diagonal(gram, axis1=1, axis2=2)
    return jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None] - 2 * gram, 0) / x_rpd.shape[-1])


def centres(distance_rpp, valid_rp, count_r, neighbours_r) -> jnp.ndarray:
    """bool [R, P]: the `count_r` centres among the valid tokens of each row, by `neighbours_r` (int32 [R]) nearest."""
    p = valid_rp.shape[1]
    near_rpk = jnp.sort(jnp.where(valid_rp[:, None], distance_rpp, jnp.inf), axis=2)
    taken_r = jnp.minimum(neighbours_r, jnp.sum(valid_rp, axis=1))[:, None]
    near_rpk = jnp.where((jnp.arange(p) < taken_r)[:, None], near_rpk, 0)
    mean_rp = jnp.sum(near_rpk**2, axis=2) / jnp.maximum(taken_r, 1)
    rho_rp = jnp.exp(-mean_rp)
    earlier = jnp.arange(p)[None, :] < jnp.arange(p)[:, None]
    here, other = rho_rp[:, :, None], rho_rp[:, None]
    denser_rpp = ((other > here) | ((other == here) & earlier)) & valid_rp[:, None]
    both = valid_rp[:, :, None] & valid_rp[:, None]
    most_r = jnp.max(jnp.where(both, distance_rpp, 0), axis=(1, 2))
    delta_rp = jnp.min(jnp.where(denser_rpp, distance_rpp, most_r[:, None, None]), axis=2)
    return smallest(-rho_rp * delta_rp, valid_rp, count_r)
