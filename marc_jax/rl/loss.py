"""Policy losses over [B, G, R] log-probabilities, as pure functions that return sums and counts.

    L_t = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta * KL_t,    rho_t = exp(logp_t - old_t)

averaged as `aggregation` says. A loss is a (sum, count) pair: add the pairs of micro-batches and devices, divide
once, and neither the mesh nor the micro-batch size changes the result. Sources: GRPO 2402.03300, DAPO 2503.14476,
Dr. GRPO 2503.20783, GSPO 2507.18071, dual clip 1912.09729, KL estimators joschu.net/blog/kl-approx.html.
"""

import dataclasses

import jax
import jax.numpy as jnp

Metric = tuple[jax.Array, jax.Array]

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Numerics of the policy loss; `parity.parity` sets a published family at once.

    Attributes:
      clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; None switches that side off.
      dual_clip: for A < 0 the loss is at most -dual_clip * A; None is off.
      ratio: "token", or "sequence" (GSPO: exp of the mean log-ratio of the completion).
      log_ratio_clamp: bound on |logp - old| before exp; None is off.
      kl: "k1" = logp - ref, "k2" = its square / 2, "k3" = e^x - x - 1 with x = ref - logp. As a loss term k1 has no
        gradient in expectation.
      kl_coef: beta; 0 switches the term off.
      kl_clamp: bound on |ref - logp|; kl_value_clamp: bound on |KL|; None is off.
      kl_bias_corrected: KL times the differentiable ratio (TRL >= 1.0), whose on-policy gradient is logp - ref.
      aggregation: "grpo" mean of per-completion means; "bnpo" and "dapo" mean over tokens (bnpo divides per
        micro-batch, dapo over the whole step: sums and counts are the same, the caller divides); "dr_grpo" sum over
        tokens / (completions * max_length).
      max_length: the constant of dr_grpo; 0 means R, the padded length.
      count_empty: whether completions without a single unmasked token count in the means.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    log_ratio_clamp: float | None = None
    kl: str = "k3"
    kl_coef: float = 0.04
    kl_clamp: float | None = None
    kl_value_clamp: float | None = None
    kl_bias_corrected: bool = False
    aggregation: str = "dapo"
    max_length: int = 0
    count_empty: bool = False

    def __post_init__(self):
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"loss.ratio = {self.ratio!r}: choose token or sequence")
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"loss.kl = {self.kl!r}: choose one of {', '.join(KL_ESTIMATORS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"loss.aggregation = {self.aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"loss.dual_clip = {self.dual_clip}: must be larger than 1")


def kl_divergence(logp_bgr: jax.Array, ref_bgr: jax.Array, config: LossConfig) -> jax.Array:
    """Per-token estimate of KL(policy || reference), before any bias correction."""
    x = ref_bgr - logp_bgr
    if config.kl_clamp is not None:
        x = jnp.clip(x, -config.kl_clamp, config.kl_clamp)
    kl = {"k1": lambda: -x, "k2": lambda: 0.5 * x**2, "k3": lambda: jnp.exp(x) - x - 1.0}[config.kl]()
    if config.kl_value_clamp is not None:
        kl = jnp.clip(kl, -config.kl_value_clamp, config.kl_value_clamp)
    return kl


def log_ratio(logp_bgr: jax.Array, old_bgr: jax.Array, mask_bgr: jax.Array, config: LossConfig) -> jax.Array:
    """log rho: [B, G, R] per token, or [B, G, 1] for the sequence ratio of GSPO."""
    diff = jnp.where(mask_bgr, logp_bgr - old_bgr, 0.0)
    if config.ratio == "sequence":
        diff = diff.sum(axis=-1, keepdims=True) / jnp.maximum(mask_bgr.sum(axis=-1, keepdims=True), 1)
    if config.log_ratio_clamp is not None:
        diff = jnp.clip(diff, -config.log_ratio_clamp, config.log_ratio_clamp)
    return diff


def aggregate(token_bgr: jax.Array, mask_bgr: jax.Array, config: LossConfig) -> Metric:
    """(sum, count) of a per-token ([B, G, R], or [B, G, 1] if constant) quantity; masked tokens never matter."""
    token_bgr = jnp.where(mask_bgr, token_bgr, 0.0)
    length_bg = mask_bgr.sum(axis=-1)
    used_bg = jnp.ones_like(length_bg, bool) if config.count_empty else length_bg > 0
    if config.aggregation == "grpo":
        return (token_bgr.sum(axis=-1) / jnp.maximum(length_bg, 1)).sum(), used_bg.sum()
    if config.aggregation == "dr_grpo":
        return token_bgr.sum(), used_bg.sum() * (config.max_length or mask_bgr.shape[-1])
    return token_bgr.sum(), length_bg.sum()


def policy_loss(logp_bgr: jax.Array, advantages: jax.Array, mask_bgr: jax.Array, config: LossConfig,
                old_bgr: jax.Array | None = None, ref_bgr: jax.Array | None = None) -> tuple[Metric, dict[str, Metric]]:
    """The clipped policy loss with a KL anchor.

    Args:
      logp_bgr: float [B, G, R]; differentiable log-probabilities of the completions' tokens.
      advantages: [B, G], or [B, G, R] for per-token credit.
      mask_bgr: bool [B, G, R]; True up to and including the stop token.
      config: numerics.
      old_bgr: log-probabilities of the policy that sampled; None means on policy: the ratio is 1 and carries the
        gradient (exp(logp - stop_gradient(logp))).
      ref_bgr: reference log-probabilities; may be None when kl_coef is 0.

    Returns:
      (sum, count) of the loss, and (sum, count) metrics: kl and clip_ratio/{low,high,region}_mean.

    Raises:
      ValueError: kl_coef > 0 without ref_bgr.
    """
    if config.kl_coef and ref_bgr is None:
        raise ValueError("loss.kl_coef > 0 needs reference log-probabilities")
    advantages = advantages[..., None] if advantages.ndim == 2 else advantages
    logp_bgr = jnp.where(mask_bgr, logp_bgr, 0.0)  # padding may hold anything, NaN included
    old_bgr = jax.lax.stop_gradient(logp_bgr if old_bgr is None else old_bgr)
    rho = jnp.exp(log_ratio(logp_bgr, old_bgr, mask_bgr, config))
    low = -jnp.inf if config.clip_low is None else 1.0 - config.clip_low
    high = jnp.inf if config.clip_high is None else 1.0 + config.clip_high
    gain = jnp.minimum(rho * advantages, jnp.clip(rho, low, high) * advantages)
    if config.dual_clip is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, config.dual_clip * advantages), gain)
    token = -gain
    tokens = mask_bgr.sum()
    metrics = _clip_metrics(rho, advantages, mask_bgr, low, high)
    if ref_bgr is not None:
        ref_bgr = jnp.where(mask_bgr, jax.lax.stop_gradient(ref_bgr), 0.0)
        kl = kl_divergence(logp_bgr, ref_bgr, config)
        metrics["kl"] = (jnp.where(mask_bgr, kl, 0.0).sum(), tokens)
        if config.kl_coef:
            token = token + config.kl_coef * (kl * rho if config.kl_bias_corrected else kl)
    return aggregate(token, mask_bgr, config), jax.lax.stop_gradient(metrics)


def _clip_metrics(rho, advantages, mask_bgr, low, high) -> dict[str, Metric]:
    """Share of tokens whose clipped branch is active, with TRL's names."""
    tokens = mask_bgr.sum()
    is_low = mask_bgr & (rho < low) & (advantages < 0)
    is_high = mask_bgr & (rho > high) & (advantages > 0)
    return {
        "clip_ratio/low_mean": (is_low.sum(), tokens),
        "clip_ratio/high_mean": (is_high.sum(), tokens),
        "clip_ratio/region_mean": ((is_low | is_high).sum(), tokens),
    }


def mean(pair: Metric) -> jax.Array:
    """sum / count of a metric; 0 when nothing was counted."""
    return pair[0] / jnp.maximum(pair[1], 1)
