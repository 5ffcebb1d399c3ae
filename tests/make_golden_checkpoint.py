"""Writes tests/golden_checkpoint: python -m tests.make_golden_checkpoint. Once per format, read by every later one."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from marc_jax import checkpoint, optim, state

FOLDER = pathlib.Path(__file__).with_name("golden_checkpoint")
META = {"stage": "sft", "config": {"seed": 3}, "metrics": {"loss": [1.5, 3.0]}}


def golden() -> state.TrainState:
    """A state whose every number follows from a formula."""
    params = {
        "text/kernel": jnp.asarray(np.arange(24, dtype=np.float32).reshape(4, 6) / 7),
        "text/scale": jnp.asarray(np.arange(6) - 2.5, jnp.bfloat16),
    }
    tx = optim.make({"schedule": "constant", "weight_decay": 0.1}, 10)
    now = state.create(tx, params, {"vision/kernel": jnp.full((2, 3), -0.0)}, key=jax.random.key(5))
    return now.apply(tx, {path: jnp.ones_like(x) for path, x in params.items()})


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    checkpoint.save(FOLDER, 7, golden(), META)
