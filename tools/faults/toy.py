"""A training run of seconds with everything that can break: mesh, optimizer, log, checkpoints, signals, processes.

    python -m tools.faults.toy --workdir=DIR [--steps=12] [--mesh=1,1,1] [--devices=8]

A two-layer regression on numbers drawn from the step alone, through the same loop as every stage. Ends with a line
"final SHA256" of all its state. `--devices` simulates so many CPU devices in each process.
"""

import hashlib
import os
import time
from pathlib import Path

import numpy as np
from absl import flags

from marc_jax import config as configs

configs.define_flags(workdir="")
flags.DEFINE_integer("steps", 12, "Where the run ends.")
flags.DEFINE_integer("save_every", 1, "Steps between checkpoints.")
flags.DEFINE_list("mesh", ["1", "1", "1"], "Devices along data, fsdp, tensor.")
flags.DEFINE_integer("devices", 1, "Simulated CPU devices of each process.")
flags.DEFINE_integer("width", 32, "Of the hidden layer.")
flags.DEFINE_float("pause", 0.0, "Seconds a step sleeps.")
flags.DEFINE_string("spoil", "", "STEP:nan or STEP:spike, comma separated: what is wrong with the batches of steps.")
flags.DEFINE_integer("skip", 0, "How many spoilt steps in a row are left out.")
flags.DEFINE_string("die", "", "Where this process kills itself; see `kills.die_at`.")
flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
flags.DEFINE_integer("processes", 0, "How many.")
flags.DEFINE_integer("process", -1, "Which one.")
flags.DEFINE_float("silence", 10.0, "Seconds after which a silent process counts as dead.")

BATCH, INPUT = 16, 8


def draw_numbers(step: int, spoil: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, I] and targets [B] of a step, from 0; a function of the step alone."""
    rng = np.random.default_rng([7, step])
    x_bi = rng.normal(size=(BATCH, INPUT)).astype(np.float32)
    y_b = np.sin(x_bi.sum(1))
    for mark in filter(None, spoil.split(",")):
        where, _, what = mark.partition(":")
        if int(where) == step + 1:
            y_b = y_b + (np.nan if what == "nan" else 1e3)
    return x_bi, y_b.astype(np.float32)


def build(mesh, width: int = 32, skip: int = 0):
    """(state, step function) on a mesh (data, fsdp, tensor)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from marc_jax import optim, state

    how = {"learning_rate": 0.01, "weight_decay": 0.01, "schedule": "constant"}  # whatever `steps` is
    tx = optim.make(how | {"skip": skip, "spike": 8.0 * bool(skip)}, 1)

    def first():
        a, b = jax.random.split(jax.random.key(0))
        params = {"in/kernel": jax.random.normal(a, (INPUT, width)), "out/kernel": jax.random.normal(b, (width,))}
        params = jax.tree.map(lambda x: x / 4, params)
        return state.create(tx, params, {"fixed/scale": jnp.ones(3)}, key=jax.random.key(1))

    split = {(INPUT, width): P("fsdp", "tensor"), (width,): P("tensor")}
    shapes = jax.eval_shape(first)
    placed = jax.tree.map(lambda x: NamedSharding(mesh, split.get(x.shape, P())), shapes)

    def advance(now, batch):
        x_bi, y_b = batch

        def objective(params):
            noise = 0.01 * jax.random.normal(now.step_key, (BATCH,))
            off_b = jnp.tanh(x_bi @ params["in/kernel"]) @ params["out/kernel"] + noise - y_b
            return (off_b**2).mean()

        loss, grads = jax.value_and_grad(objective)(now.params)
        return now.apply(tx, grads, loss), {"loss": (loss * BATCH, jnp.float32(BATCH)), "first": x_bi[0, 0]}

    step_fn = jax.jit(advance, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P())))
    return jax.jit(first, out_shardings=placed)(), step_fn


def digest(state) -> str:
    """SHA-256 of every number of the state, whatever it is sharded over."""
    import jax
    from jax.experimental import multihost_utils

    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    whole = multihost_utils.process_allgather(jax.tree.map(raw, state), tiled=True)
    value = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(whole)[0]:
        value.update(jax.tree_util.keystr(path).encode() + np.asarray(x).tobytes())
    return value.hexdigest()


def train(workdir: Path, mesh, pace, *, spoil: str = "", pause: float = 0.0, width: int = 32, stop=None):
    """The final state; see `loop.fit`."""

    from marc_jax import loop, sharding

    state, step_fn = build(mesh, width, pace.skip)
    over = sharding.batch(mesh)

    def draw(step):
        time.sleep(pause)
        return tuple(sharding.place(x, over) for x in draw_numbers(step, spoil))

    return loop.fit("toy", workdir, state, draw, step_fn, pace, stop=stop, samples=lambda n: {f"row {n}": {}})[0]


def main() -> None:
    args = flags.FLAGS
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    from marc_jax import distributed, loop, sharding
    from marc_jax.interrupt import Interrupt

    if args.die:
        from tools.faults import kills

        kills.die_at(args.die)
    with distributed.joined(args.coordinator, args.processes, args.process, timeout=args.silence), Interrupt() as stop:
        mesh = sharding.make_mesh(*map(int, args.mesh))
        pace = loop.Pace(args.steps, log_every=1, save_every=args.save_every, skip=args.skip)
        print("ready", flush=True)
        state = train(
            Path(args.workdir), mesh, pace, spoil=args.spoil, pause=args.pause, width=args.width, stop=stop
        )
        print("final", digest(state), flush=True)


if __name__ == "__main__":
    configs.run_main(main)
