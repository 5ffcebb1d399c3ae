"""Group-relative advantages, on device: A_i = (R_i - baseline) / scale over the G rollouts of one prompt.

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783: no division), RLOO (2402.14740: leave-one-out baseline).
With 0/1 accuracy, a constant format reward and scale = "group", a bonus paid to every correct rollout of a group
cancels: it moves mean and std alike. `alpha_effect` measures that cancellation. What does not cancel: scale = "batch"
or "none", a weight per question (`rewards.retention_weight`), and credit per token (`token_credit`).
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
      scale: divide by the std of the "group", of the whole "batch", or by nothing ("none": Dr. GRPO).
      baseline: "mean" of the group, or "rloo", the mean of the other G - 1 rollouts.
      ddof: 1 (TRL, Video-R1, verl, Tunix) or 0 (EasyDeL).
      eps: added to the std; 1e-4 (TRL, Video-R1) or 1e-6 (verl, Tunix).
    """

    scale: str = "group"
    baseline: str = "mean"
    ddof: int = 1
    eps: float = 1e-4

    def __post_init__(self):
        if self.scale not in ("group", "batch", "none"):
            raise ValueError(f"advantages.scale = {self.scale!r}: choose group, batch or none")
        if self.baseline not in ("mean", "rloo"):
            raise ValueError(f"advantages.baseline = {self.baseline!r}: choose mean or rloo")
        if self.ddof not in (0, 1):
            raise ValueError(f"advantages.ddof = {self.ddof}: choose 0 or 1")


def advantages(rewards_bg: jax.Array, config: AdvantageConfig = AdvantageConfig(), valid_bg=None) -> jax.Array:
    """Advantages of B groups of G rollouts.

    Args:
      rewards_bg: float [B, G].
      config: see AdvantageConfig.
      valid_bg: bool [B, G]; rollouts that take no part (nobody scored them, or a padded row) get 0 and leave the
        baseline and the std. None: all take part.

    Returns:
      [B, G], in the dtype of the rewards; exactly 0 in groups whose rewards are all equal.
    """
    valid_bg = jnp.ones(rewards_bg.shape, bool) if valid_bg is None else valid_bg
    rewards_bg = jnp.where(valid_bg, rewards_bg, 0.0)
    count_b = valid_bg.sum(axis=1, keepdims=True)
    mean_b = rewards_bg.sum(axis=1, keepdims=True) / jnp.maximum(count_b, 1)
    centred_bg = jnp.where(valid_bg, rewards_bg - mean_b, 0.0)
    if config.baseline == "rloo":
        centred_bg = centred_bg * count_b / jnp.maximum(count_b - 1, 1)
    if config.scale == "group":
        deviation_bg = jnp.where(valid_bg, rewards_bg - mean_b, 0.0)
        std = jnp.sqrt((deviation_bg**2).sum(axis=1, keepdims=True) / jnp.maximum(count_b - config.ddof, 1))
        centred_bg = centred_bg / (std + config.eps)
    elif config.scale == "batch":
        count = valid_bg.sum()
        mean = rewards_bg.sum() / jnp.maximum(count, 1)
        square = jnp.where(valid_bg, (rewards_bg - mean) ** 2, 0.0).sum()
        centred_bg = centred_bg / (jnp.sqrt(square / jnp.maximum(count - config.ddof, 1)) + config.eps)
    return jnp.where(valid_bg & ~dead_groups(rewards_bg, valid_bg)[:, None], centred_bg, 0.0)


def dead_groups(rewards_bg: jax.Array, valid_bg=None) -> jax.Array:
    """Bool [B]: groups that teach nothing because all their (valid) rewards are equal."""
    valid_bg = jnp.ones(rewards_bg.shape, bool) if valid_bg is None else valid_bg
    high_b = jnp.where(valid_bg, rewards_bg, -jnp.inf).max(axis=1)
    low_b = jnp.where(valid_bg, rewards_bg, jnp.inf).min(axis=1)
    return ~(high_b > low_b)


def reward_metrics(rewards_bg: jax.Array, valid_bg=None) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, count) of reward, reward_std (ddof 1, inside groups) and frac_reward_zero_std, under TRL's names."""
    valid_bg = jnp.ones(rewards_bg.shape, bool) if valid_bg is None else valid_bg
    count_b = valid_bg.sum(axis=1)
    mean_b = jnp.where(valid_bg, rewards_bg, 0.0).sum(axis=1) / jnp.maximum(count_b, 1)
    square_b = jnp.where(valid_bg, (rewards_bg - mean_b[:, None]) ** 2, 0.0).sum(axis=1)
    std_b = jnp.sqrt(square_b / jnp.maximum(count_b - 1, 1))
    used_b = count_b > 0
    groups = used_b.sum()
    return {
        "reward": (jnp.where(used_b, mean_b, 0.0).sum(), groups),
        "reward_std": (jnp.where(used_b, std_b, 0.0).sum(), groups),
        "frac_reward_zero_std": ((dead_groups(rewards_bg, valid_bg) & used_b).sum(), groups),
    }


def alpha_effect(rewards_bg: jax.Array, bonus_bg: jax.Array, config: AdvantageConfig = AdvantageConfig(),
                 valid_bg=None) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of |A(with the bonus) - A(without it)|: what the retention reward does to the update, if anything.

    Args:
      rewards_bg: rewards without the bonus.
      bonus_bg: the gated retention bonus.
    """
    with_bg = advantages(rewards_bg + bonus_bg, config, valid_bg)
    without_bg = advantages(rewards_bg, config, valid_bg)
    count = rewards_bg.size if valid_bg is None else valid_bg.sum()
    return jnp.abs(with_bg - without_bg).sum(), jnp.asarray(count)


def token_credit(teacher_bgr: jax.Array, logp_bgr: jax.Array, mask_bgr: jax.Array, clamp: float = 10.0) -> jax.Array:
    """Float [B, G, R]: log p_teacher - log p_student of each sampled token, within +-clamp; 0 where masked.

    Times a weight and added to the advantages it makes the update descend the reverse KL to the teacher, which sees
    every token: the credit that a reward per answer cannot give (on-policy distillation, arXiv 2306.13649).
    """
    gap_bgr = jnp.clip(teacher_bgr - logp_bgr, -clamp, clamp)
    return jax.lax.stop_gradient(jnp.where(mask_bgr, gap_bgr, 0.0))


def group_advantages(rewards_bg: jax.Array, bonus_bg: jax.Array, config: AdvantageConfig = AdvantageConfig(),
                     valid_bg=None) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Advantages of rewards plus retention bonus, and the metrics of a whole step (call it before micro-batching)."""
    total_bg = rewards_bg + bonus_bg
    metrics = reward_metrics(total_bg, valid_bg)
    metrics["retention/advantage_change"] = alpha_effect(rewards_bg, bonus_bg, config, valid_bg)
    return advantages(total_bg, config, valid_bg), metrics
