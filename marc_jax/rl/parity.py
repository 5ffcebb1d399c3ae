"""The numerics of published GRPO trainers, each family as one name (checked against hand-computed numbers)."""

import dataclasses

from marc_jax.rl.advantages import AdvantageConfig
from marc_jax.rl.loss import LossConfig

_FAMILIES = {
    "videor1": (
        AdvantageConfig(ddof=1, eps=1e-4),
        LossConfig(clip_low=None, clip_high=None, kl="k3", kl_clamp=10.0, aggregation="grpo", count_empty=True),
    ),
    "trl": (AdvantageConfig(ddof=1, eps=1e-4), LossConfig(aggregation="grpo", count_empty=True)),
    "trl_bias_corrected": (
        AdvantageConfig(ddof=1, eps=1e-4),
        LossConfig(kl_bias_corrected=True, aggregation="dapo", count_empty=True),
    ),
    "tunix": (AdvantageConfig(ddof=1, eps=1e-6), LossConfig(kl="k1", log_ratio_clamp=20.0, aggregation="grpo")),
    "verl": (
        AdvantageConfig(ddof=1, eps=1e-6),
        LossConfig(dual_clip=3.0, log_ratio_clamp=20.0, kl_clamp=20.0, kl_value_clamp=10.0, aggregation="dapo"),
    ),
}
FAMILIES = tuple(_FAMILIES)


def parity(family: str, **overrides) -> tuple[AdvantageConfig, LossConfig]:
    """Advantage and loss settings of "videor1", "trl" (classic), "trl_bias_corrected" (1.16), "tunix" or "verl".

    `overrides` replace fields of the LossConfig. The KL coefficient is 0.04 in all, also where a family's own
    default is 0: it is a choice of the experiment, not of the numerics.

    Raises:
      ValueError: unknown family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"parity {family!r}: choose one of {', '.join(FAMILIES)}")
    advantage, loss = _FAMILIES[family]
    return advantage, dataclasses.replace(loss, **overrides)
