"""The baselines that run google-research/scenic, where it is installed, and what is said where it is not."""

import importlib.util

import jax
import numpy as np
import pytest

from marc_jax.baselines import adjacent_merge, token_learner

B, T, P, D = 3, 5, 4, 6
RNG = np.random.default_rng(0)
VIS = RNG.normal(size=(B, T, P, D)).astype(np.float32)
MASK = np.arange(T) < np.array([5, 3, 1])[:, None]


def needs(module):
    try:
        return adjacent_merge.scenic(module)
    except ModuleNotFoundError as e:
        pytest.skip(f"google-research/scenic is the [scenic] extra: {e.name or e}")


@pytest.mark.skipif(importlib.util.find_spec("scenic") is not None, reason="scenic is installed")
def test_without_scenic_the_error_says_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps .*google-research/scenic@"):
        adjacent_merge.compress(VIS, MASK, None, 4, count=lambda patches: 2)


def reference(rows, n):
    """Scenic's loop in float64: (tokens, mean places)."""
    slots = [(x, np.array([i], float), 1) for i, x in enumerate(rows[:n])]
    for i, x in enumerate(rows[n:], n):
        line = [*slots, (x, np.array([i], float), 1)]
        unit = [v / np.linalg.norm(v) for v, _, _ in line]
        j = int(np.argmax([a @ b for a, b in zip(unit[:-1], unit[1:], strict=True)]))
        (a, i_a, m), (b, i_b, k) = line[j], line[j + 1]
        line[j] = ((m * a + k * b) / (m + k), np.concatenate([i_a, i_b]), m + k)
        line[j + 1] = (x, np.array([i], float), 1)
        slots = line[:n]
    return slots


def test_adjacent_merge():
    needs("projects.streaming_dvc.modeling.streaming_utils")
    count = {0: 0, 1: 4, 3: 3, 5: 6}
    compress = jax.jit(lambda v: adjacent_merge.compress(v, MASK, None, 8, count=lambda n: count.get(n, 1)))
    out = compress(np.where(MASK[:, :, None, None], VIS, np.nan))
    assert out.mask_bn.sum(1).tolist() == [6, 3, 4]
    for b in range(B):
        n, patches = int(out.mask_bn[b].sum()), int(MASK[b].sum())
        slots = reference(VIS[b, :patches].reshape(-1, D).astype(np.float64), n)
        at = [int(np.rint((i // P).mean()) * P + np.rint((i % P).mean())) for _, i, _ in slots]
        order = np.argsort(at, kind="stable")
        assert out.at_bn[b][:n].tolist() == [at[i] for i in order]
        np.testing.assert_allclose(out.tokens_bnd[b][:n], [slots[i][0] for i in order], atol=1e-5)
        assert not out.tokens_bnd[b][n:].any()


@pytest.mark.parametrize("tokens", [1, 2])
def test_token_learner(tokens):
    module = needs("projects.token_learner.model").TokenLearnerModuleV11(num_tokens=tokens)
    params = module.init(jax.random.key(3), VIS[0], deterministic=True)
    target = np.array([4, 3, 9], np.int32)
    out = jax.jit(lambda v: token_learner.compress(v, MASK, None, 8, target_b=target, tokens=tokens, params=params))(
        VIS
    )
    for b in range(B):
        n, valid = int(out.mask_bn[b].sum()), int(MASK[b].sum())
        assert n == min(target[b], valid * tokens)
        patches = -(-n // tokens)
        at = np.floor((np.arange(patches) + 0.5) * valid / patches).astype(int)
        assert out.at_bn[b][:n].tolist() == [t * P + s for t in at for s in range(tokens)][:n]
        want = np.asarray(module.apply(params, VIS[b, at], deterministic=True)).reshape(-1, D)[:n]
        np.testing.assert_allclose(out.tokens_bnd[b][:n], want, atol=1e-5)
