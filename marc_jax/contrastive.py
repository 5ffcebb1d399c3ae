"""Fine-tuning PE-Core or SigLIP 2 on one's own (clip, text) pairs: stages of kind "encoder", run by `marc_jax.train`.

    python -m marc_jax.train --config=experiments/retriever.py:towers --workdir=runs/towers \\
        --config.towers.init=weights/pe-l14 --config.towers.pairs=pairs.json

A step sees `videos` videos, up to `clips` pairs of each (`data_pipelines.sources.Pair`). A clip is the renormalised
mean of its frames' unit vectors, as it is indexed. Loss (`embed.loss`): cross-entropy of each text over the clips of
its own video, and symmetric InfoNCE over all pairs of the batch, weighted by `in_batch`; same texts and overlapping
clips are not held against each other. Videos are split over the mesh; the loss is that of the whole batch on any number
of devices.

What is trained lies in <workdir>/<stage>/encoder afterwards: `marc_jax.index --encoder` takes that folder.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines import clips, loader, sandbox, sources
from data_pipelines.containers import DEFAULT_LIMITS
from marc_jax import checkpoint, loop, optim, sharding, state
from marc_jax.clip_tokenizer import BPE_FILE
from marc_jax.config import ConfigError
from marc_jax.interrupt import Interrupt
from marc_jax.memory import embed, encoders
from marc_jax.models import clip
from marc_jax.models.safetensors_io import WeightsError
from marc_jax.tokenizer import TokenizerError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """V videos with C pairs each, N = V C.

    Attributes:
      frames: uint8 [V, C, F, S, S, 3].
      tokens: int32 [V, C, L].
      mask: bool [V, C]; False where a video has fewer pairs, or cannot be read.
      own: bool [V, C, C]; whether a video's clip (last axis) stands beside its text's own.
      apart: bool [N, N]; whether the clip of a pair (last axis) is a negative of another's text.
    """

    frames: jax.Array
    tokens: jax.Array
    mask: jax.Array
    own: jax.Array
    apart: jax.Array


def loss(model, batch: Batch, in_batch: float):
    """(sum over pairs, number of pairs, metrics) under a bound model, see `embed.loss`."""
    v, c, f = batch.frames.shape[:3]
    emb = clip.unit(model.embed_images(batch.frames.reshape(v * c * f, *batch.frames.shape[3:])))
    clip_nd = clip.unit(emb.reshape(v * c, f, -1).mean(1))
    text_nd = clip.unit(model.embed_texts(batch.tokens.reshape(v * c, -1)))
    own_ncd = jnp.repeat(clip_nd.reshape(v, c, -1), c, axis=0)
    itself_nc = jnp.tile(jnp.eye(c, dtype=bool), (v, 1))
    shown_nc = (batch.own.reshape(v * c, c) | itself_nc) & jnp.repeat(batch.mask, c, axis=0)
    mask_n = batch.mask.reshape(-1)
    scale = {"log_scale": model.logit_scale[...].reshape(())}
    total, count, logit_nc = embed.loss(
        scale, text_nd, own_ncd, shown_nc, itself_nc & mask_n[:, None], in_batch=in_batch, apart_bc=batch.apart
    )
    rivals_nn = (batch.apart & mask_n[None]) | jnp.eye(v * c, dtype=bool)
    best_n = jnp.argmax(jnp.where(rivals_nn, text_nd @ clip_nd.T, -jnp.inf), axis=1)
    first = {"accuracy": best_n == jnp.arange(v * c), "own_video": itself_nc[jnp.arange(v * c), logit_nc.argmax(1)]}
    return total, count, {name: (jnp.sum(right_n & mask_n), count) for name, right_n in first.items()}


def make_step(cfg: clip.Config, tx: optax.GradientTransformation, *, in_batch: float, dtype, remat: bool) -> Callable:
    """(state, Batch) -> (state, metrics)."""
    bind = functools.partial(encoders.family_of(cfg).bind, cfg, dtype=dtype, remat=remat)

    def advance(now: state.TrainState, batch: Batch):
        def objective(trained):
            total, count, values = loss(bind(optim.join(trained, now.frozen)), batch, in_batch)
            return total / jnp.maximum(count, 1), values | {"loss": (total, count)}

        grads, values = jax.grad(objective, has_aux=True)(now.params)
        return now.apply(tx, grads), values | {"grad_norm": optax.tree.norm(grads)}

    return advance


class Batches:
    """`draw(step)` for `loop.fit`: deterministic in (seed, step), read ahead, bad videos masked and reported.

    Videos are decoded in child processes; close it to end them.
    """

    def __init__(
        self, stage, tokenizer: Callable, size: int, seed: int, mesh, report: pathlib.Path,
        seconds: float = DEFAULT_LIMITS.decode_seconds,
    ):  # fmt: skip
        """`seconds`: how long a clip may take. Raises ConfigError: the file of pairs, or its first bad row."""
        try:
            pairs = sources.load_pairs(stage.pairs)
        except sources.RecordError as e:
            raise ConfigError(str(e)) from None
        self.groups = clips.by_video(pairs, stage.clips)
        self._stage, self._tokenizer, self._mesh = stage, tokenizer, mesh
        self._pool, root = sandbox.Pool(max(1, stage.workers), seconds), stage.root or pathlib.Path(stage.pairs).parent
        read = clips.ReadClips(str(root), stage.clips, stage.frames, size, self._pool.read_frames)
        blank = np.zeros((stage.clips, stage.frames, size, size, 3), np.uint8)
        how = {"batch_size": stage.videos, "seed": seed}
        self._rows = loader.dataset(self.groups, lambda group: 0, **how)
        self._begin = functools.partial(
            loader.iterate, self.groups, read, blank=blank, threads=self._pool.workers, report=report, **how
        )
        self.close = self._pool.close
        self._coming, self._next = iter(()), -1

    def draw(self, step: int) -> Batch:
        """Raises ConfigError: more than one video in a hundred cannot be read."""
        if step != self._next:
            self._coming = self._begin(start=step)
        try:
            batch = next(self._coming)
        except loader.BadRowsError as e:
            raise ConfigError(str(e)) from None
        self._next = step + 1
        over = sharding.batch(self._mesh)
        return jax.tree.map(lambda x: sharding.place(x, over), self._assemble(batch))

    def _assemble(self, batch: dict) -> Batch:
        groups, c = [self.groups[row] for row in batch["row"]], self._stage.clips
        there = np.arange(c) < np.array([len(group.pairs) for group in groups])[:, None]
        texts = [pair.text for group in groups for pair in group.pairs]
        known = self._tokenizer(texts)
        tokens = np.zeros((len(groups), c, known.shape[1]), np.int32)
        tokens[there] = known
        apart = clips.apart(groups, c)
        own = np.stack([apart[i : i + c, i : i + c] for i in range(0, len(apart), c)])
        return Batch(batch["value"], tokens, there & batch["mask"][:, None], own, apart)

    def samples(self, step: int) -> dict[str, dict]:
        """{row of the file: {video, texts}} of a step, for a person to look at."""
        groups = [self.groups[row] for row in self._rows[step]["row"]]
        return {str(group.row): {"video": group.path, "texts": [p.text for p in group.pairs]} for group in groups}


def train(config, workdir: pathlib.Path) -> None:
    """Every stage of the run, each from where it was.

    Raises ConfigError, CheckpointError, NonFiniteError: see `loop.fit`.
    """
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with Interrupt() as stop:
        for name in config.stages:
            if not any(config.only) or name in config.only:
                train_stage(config, name, workdir, mesh, stop)


def train_stage(config, name: str, workdir: pathlib.Path, mesh, stop: Interrupt | None = None) -> pathlib.Path:
    """Trains one stage and writes its folder `encoder`, which is returned."""
    stage, out = config[name], workdir / name / "encoder"
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if stage.videos % ways:
        raise ConfigError(f"config.{name}.videos = {stage.videos} does not divide over {ways} devices (data x fsdp)")
    init = workdir / stage.init / "encoder" if stage.init in config.stages else pathlib.Path(stage.init)
    try:
        cfg, params, tokenizer, mark = encoders.load_towers(init, mesh)
        trained, frozen = optim.partition(params, tuple(stage.trainable))
    except (WeightsError, TokenizerError, ValueError) as e:
        raise ConfigError(f"config.{name}: {e}") from None
    first_process = jax.process_index() == 0
    report = workdir / name / "unreadable.jsonl" if first_process else None  # all meet the same files
    batches = Batches(stage, tokenizer, cfg.image.size, config.seed, mesh, report, config.data.decode_seconds)
    tx = optim.make(stage.optimizer, stage.steps)
    trained = {path: x.astype(jnp.float32) for path, x in trained.items()}
    first = state.settled(state.create(tx, trained, frozen, key=jax.random.key(config.seed)), mesh)
    dtype = encoders.compute_dtype() if stage.dtype == "auto" else jnp.dtype(stage.dtype)
    advance = make_step(cfg, tx, in_batch=stage.in_batch, dtype=dtype, remat=stage.remat)
    places = jax.tree.map(lambda x: x.sharding, first)
    meta = {"trainable": list(trained), "init": f"{stage.init} {mark}", "model": dataclasses.asdict(cfg)}
    with contextlib.closing(batches):
        last, _ = loop.fit(
            name, workdir, first, batches.draw, jax.jit(advance, donate_argnums=0, out_shardings=(places, None)),
            loop.Pace(stage.steps, config.log_every, config.save_every), stop=stop, meta=meta, samples=batches.samples,
        )  # fmt: skip
    if checkpoint.latest(out) != stage.steps:
        _export(out, stage.steps, last.model, cfg, init)
    return out


def _export(out: pathlib.Path, step: int, params: dict, cfg: clip.Config, init: pathlib.Path) -> None:
    """A folder that `encoders.open_encoder` opens: parameters in float32, sizes, and the tokenizer of `init`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (BPE_FILE, "tokenizer.json"):
        if (init / name).exists():
            shutil.copyfile(init / name, out / name)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    checkpoint.save(out, step, {"params": params}, {"model": dataclasses.asdict(cfg), "dtype": "float32"}, keep=1)
