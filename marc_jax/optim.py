"""Which parameters train, and how: selection by name, learning-rate schedule, and the optax chain."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from marc_jax.guard import guard
from marc_jax.paths import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Config:
    """AdamW behind a global-norm clip; steps, not epochs.

    Attributes:
      learning_rate: peak, reached after the warm-up.
      schedule: what follows the warm-up until `total_steps`: "constant", "linear" or "cosine".
      warmup_steps: linear rise from 0.
      end_factor: the learning rate at `total_steps` as a fraction of the peak ("linear", "cosine").
      clip_norm: largest global norm of the gradients; 0 turns clipping off.
      weight_decay: decoupled, multiplied by the learning rate (Loshchilov & Hutter, 2019, as in optax).
      skip: so many steps in a row whose loss or gradient is not finite (or a spike) are left out and counted; one more
        stops the run. 0 stops at the first.
      spike: a loss is a spike when it is so many standard deviations above the mean of the last 50 or so; 0: none is.
      no_decay: regular expressions; a parameter whose path contains a match is not decayed.
    """

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    end_factor: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    skip: int = 0
    spike: float = 0.0
    no_decay: tuple[str, ...] = (r"(^|/)bias$", r"(^|/)scale$", r"(^|/)embedding$", r"norm")


def partition(params: Mapping, patterns: Sequence[str]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Splits parameters by name into (trainable, frozen), both flat: "text/layers/attn/q/kernel" -> array.

    Args:
      params: nested or flat dict of arrays (or shapes).
      patterns: regular expressions for the *whole* path of a trainable parameter, e.g. "text/.*" or ".*/kernel".

    Raises:
      ValueError: a pattern matches no parameter.
    """
    flat = flatten(params)
    compiled = [re.compile(pattern) for pattern in patterns]
    for regex in compiled:
        if not any(regex.fullmatch(path) for path in flat):
            raise ValueError(
                f"trainable pattern {regex.pattern!r} matches no parameter; names look like "
                f"{', '.join(sorted(flat)[:3])} (patterns match the whole name: 'text/.*', not 'text/')"
            )
    trainable = {path: x for path, x in flat.items() if any(regex.fullmatch(path) for regex in compiled)}
    frozen = {path: x for path, x in flat.items() if path not in trainable}
    return trainable, frozen


def join(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array] | None = None) -> dict:
    """The nested dict that `partition` took apart. Raises ValueError when a path occurs on both sides."""
    frozen = frozen or {}
    if both := sorted(set(trainable) & set(frozen)):
        raise ValueError(f"parameters both trainable and frozen: {', '.join(both[:5])}")
    return unflatten({**trainable, **frozen})


def schedule(config, total_steps: int) -> optax.Schedule:
    """step -> learning rate. `config` is a `Config` or any mapping with its field names."""
    config = _config(config)
    peak, rest = config.learning_rate, max(total_steps - config.warmup_steps, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.end_factor, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.end_factor)
    else:
        raise ValueError(f"optimizer schedule {config.schedule!r}: expected 'constant', 'linear' or 'cosine'")
    if not config.warmup_steps:
        return after
    # Step 0 already moves: the rise goes peak/w, 2 peak/w, ... peak.
    rise = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make(config, total_steps: int) -> optax.GradientTransformation:
    """Clip -> Adam -> decoupled weight decay (by name) -> schedule; with `skip` or `spike` behind a `guard`.

    Args:
      config: a `Config` or any mapping with (some of) its field names; an unknown name is an error.
      total_steps: where the schedule ends.
    """
    config = _config(config)
    no_decay = re.compile("|".join(f"(?:{pattern})" for pattern in config.no_decay) or r"(?!)")

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not no_decay.search(name(path)), params)

    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    chain.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    chain.append(optax.scale_by_learning_rate(schedule(config, total_steps)))
    tx = in_float32(optax.chain(*chain))
    return guard(tx, config.spike) if config.skip or config.spike else tx


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` computing in float32 whatever its state is kept in: moments have the dtype of their parameter.

    In bfloat16 a decay of 0.999 is 1, and lr * g is lost before it reaches the parameter; between the casts, which the
    compiler fuses into the update, both are what they say. Nothing changes where everything is float32.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def update(grads, opt_state, params=None):
        updates, new = tx.update(wide(grads), wide(opt_state), wide(params))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, opt_state)

    return optax.GradientTransformation(tx.init, update)


def name(path: tuple) -> str:
    """A key path of jax.tree_util as "text/layers/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _config(config) -> Config:
    if isinstance(config, Config):
        return config
    given = dict(config.items())
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"optimizer setting {unknown[0]!r} is unknown; known: {', '.join(sorted(known))}")
    given["no_decay"] = tuple(given.get("no_decay", Config.no_decay))
    return Config(**given)
