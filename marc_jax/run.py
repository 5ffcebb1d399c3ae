"""What every stage of a run shares: data on disk, tokenizer, model sizes, views, the banks of decoded patches."""

import dataclasses
import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marc_jax import checkpoint, files, optim, pretrained, settings, sharding, synthetic, view_settings
from marc_jax import config as configs
from marc_jax.batches import Asked, Prompter, Shape, Sizes
from marc_jax.config import ConfigError
from marc_jax.memory import embed, encoders, indexer
from marc_jax.memory.view import View, normalise
from marc_jax.models import lora, prompts, qwen25_vl
from marc_jax.models.safetensors_io import WeightsError
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.types import PromptBatch
from marc_jax.state import settled
from marc_jax.tokenizer import Tokenizer, TokenizerError
from marc_jax.watch import Watch

QUESTION, ANSWER = 22, 13  # longest tokenised question (with its chat turn) and answer of the synthetic set
TOWER_CHUNK = 1024


@dataclasses.dataclass
class Run:
    """One run's fixed surroundings, and what its stages leave for the next ones (`features`, `retriever`).

    `sources`: what stages draw from, by their `file`: a `records.Records`, or the synthetic set's Recomposer under "".
    """

    config: object
    workdir: Path
    cfg: qwen25_vl.Config
    tokenizer: Tokenizer
    prompter: Prompter
    sizes: Sizes
    views: dict[str, View]
    sampling: indexer.Sampling | indexer.Published
    time_scale: float
    mesh: Mesh
    sources: dict[str, object] = dataclasses.field(default_factory=dict)
    pixels: jax.Array | None = None
    features: jax.Array | None = None
    tower: str = ""
    retriever: dict | None = None
    compiled: dict = dataclasses.field(default_factory=dict)
    watch: Watch = dataclasses.field(default_factory=Watch)

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.sampling.grid_hw

    def decoding(self, temperature: float, max_new: int | None = None) -> Sampling:
        """Completions end at any stop token and hold no vision token. `max_new`: default config.max_new_tokens."""
        tok = self.tokenizer
        return Sampling(
            max_new or self.config.max_new_tokens, tuple(tok.stop_ids), tok.id("<|endoftext|>"), temperature,
            banned_ids=tuple(tok.banned_ids),
        )  # fmt: skip

    def view(self, name: str) -> View:
        if name not in self.views:
            raise ConfigError(f"unknown view {name!r}; config.views has {', '.join(self.views)}")
        return self.views[name]

    @property
    def binding(self) -> dict:
        """How the model is computed: dtype, attention and remat of `qwen25_vl.bind`."""
        model = self.config.model
        return {"dtype": jnp.dtype(model.dtype), "attention": model.attention, "remat": model.remat or False}

    def embed_sizes(self) -> embed.Sizes:
        return embed.Sizes(self.cfg.vision.hidden_size, self.cfg.text.vocab_size, length=QUESTION)

    def queries(self, asked: Asked, problems):
        """What `embedded` takes: the questions' tokens; or their embeddings, where they are known."""
        return self.prompter.queries(problems, asked.sizes.question) if asked.query_bd is None else asked.query_bd

    def split(self, *trees):
        """Host arrays onto the mesh, B over data and fsdp; B leads everywhere but in a prompt's positions."""
        over = {axis: sharding.batch(self.mesh, axis) for axis in (0, 1)}

        def node(x):
            if isinstance(x, PromptBatch):
                return PromptBatch(*(over[int(f.name == "pos_3bp")] for f in dataclasses.fields(x)))
            return over[0]

        where = jax.tree.map(node, trees, is_leaf=lambda x: isinstance(x, PromptBatch))
        placed = sharding.place_all(trees, where)
        return placed if len(trees) > 1 else placed[0]

    def whole(self, tree):
        """Arrays that every device holds: banks, the retriever."""
        everywhere = sharding.replicated(self.mesh)
        return jax.tree.map(lambda x: sharding.place(x, everywhere), tree)

    def alone(self) -> "Run":
        """This run on the devices of this process alone, for what each process computes of other data."""
        if jax.process_count() == 1:
            return self
        return dataclasses.replace(self, mesh=sharding.make_mesh(devices=jax.local_devices()))

    def settle(self, state):
        """`state.settled` on the run's mesh."""
        return settled(state, self.mesh)

    def parameters(self, source: str, trainable: tuple[str, ...] = ()) -> dict:
        """Model parameters (nested), sharded; in float32 what matches `trainable`, else in config.model.frozen_dtype.

        Args:
          source: a stage of this run, which must be finished; or a folder of published safetensors, or of a checkpoint
            (`marc_jax.pretrained`); "" is config.init_from, and random where that is empty too.

        Raises:
          ConfigError: the stage is not finished, saying how far it is, or its last step is damaged.
        """
        target = self._target(trainable)
        if source and source in self.config.stages:
            try:
                return pretrained.load_parameters(target, *self.result(source))
            except checkpoint.DamagedError as e:
                raise ConfigError(f"{e}; train stage {source!r} again: it goes on from the step before") from None
        source = source or self.config.get("init_from", "")
        if source:
            return pretrained.load(source, self.cfg, target)
        return qwen25_vl.init(self.cfg, jax.random.key(self.config.seed), mesh=self.mesh)

    def adapters(self, name: str, how) -> tuple[dict, dict]:
        """(what trains, scales), flat, of stage `name`'s `lora` settings. Raises ConfigError: they fit no kernel."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(name.encode()))
        described = qwen25_vl.describe(self.cfg)
        try:
            return lora.init(described, how.rank, how.alpha, tuple(how.patterns), key, self.mesh)
        except ValueError as e:
            raise ConfigError(f"config.{name}: {e}") from None

    def _target(self, trainable: tuple[str, ...]) -> dict:
        target, dtype = qwen25_vl.abstract(self.cfg, mesh=self.mesh), jnp.dtype(self.config.model.frozen_dtype)
        trained, frozen = optim.partition(target, trainable)
        frozen = {k: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding) for k, x in frozen.items()}
        return optim.join(trained, frozen)

    def bank(self, kind: str, params: dict) -> jax.Array | None:
        """The training patches as uint8 "pixels", or as "features" of the (then frozen) vision tower of `params`.

        None where batches bring their own; ConfigError where those were computed by another tower.
        """
        if kind == "pixels":
            return self.pixels
        name = encoders.tower_sha256(params)
        if settings.on_files(self.config):
            if name != self.tower:
                raise ConfigError("a stage starts from another vision tower than config.init_from's, the memory's")
            return None
        if name != self.tower:
            self.features = self.whole(tower_features(self.cfg, params, self.pixels, self.grid_hw))
            self.tower = name
        return self.features

    @property
    def retriever_stage(self) -> str:
        """The stage that trains the retriever; "" where there is none."""
        return ([""] + [name for name in self.config.stages if self.config[name].kind == "retriever"])[-1]

    def load_retriever(self) -> None:
        """The retriever of this run, from its finished stage. Raises ConfigError, CheckpointError as `parameters`."""
        if not self.retriever_stage:
            raise ConfigError("this run has no retriever stage")
        folder, step = self.result(self.retriever_stage)
        shapes = jax.eval_shape(lambda: optim.flatten(embed.init(jax.random.key(0), self.embed_sizes())))
        tree, _ = checkpoint.restore(folder, {"params": shapes}, step, partial=True)
        self.retriever = self.whole(optim.unflatten(tree["params"]))

    def finished(self, stage: str) -> bool:
        """Whether the stage has a checkpoint of its last step; whoever reads it verifies it."""
        return self.config[stage].steps in checkpoint.steps(self.workdir / stage / "checkpoints")

    def result(self, stage: str) -> tuple[Path, int]:
        """(folder, step) of a finished stage's last checkpoint. Raises ConfigError where there is none yet."""
        folder, last = self.workdir / stage / "checkpoints", self.config[stage].steps
        if not self.finished(stage):
            done = checkpoint.steps(folder)
            state = f"is at step {done[-1]} of {last}" if done else f"has not saved any of its {last} steps"
            raise ConfigError(f"stage {stage!r} of {self.workdir} {state}; its last one is needed here: train it first")
        return folder, last

    def use_retriever(self, retriever: dict, source: str) -> None:
        """Takes the trained retriever and embeds the events of the training pool with it."""
        self.retriever = self.whole(retriever)
        features = self.bank("features", self.parameters(source))
        pool, row_e = self.sources[""].pool, self.sources[""].row_e
        most = int(pool.patches_e.max())
        slot_et = np.arange(most)[None] + row_e[:, None]
        mask_et = np.arange(most)[None] < pool.patches_e[:, None]
        run = jax.jit(lambda p, f, m: embed.embed_events(p, f, m, jnp.zeros(m.shape, jnp.int32), 1)[0][:, 0])
        parts = []
        for start in range(0, len(row_e), TOWER_CHUNK):
            rows = np.resize(np.arange(start, min(start + TOWER_CHUNK, len(row_e))), TOWER_CHUNK)
            chosen = features[np.where(mask_et, slot_et, 0)[rows]]
            parts.append(np.asarray(run(self.retriever, chosen, mask_et[rows]))[: len(row_e) - start])
        self.sources[""].embed(np.concatenate(parts))


def embedded(view: View, retriever: dict | None, queries):
    """Question embeddings [B, D] of `Run.queries`, where the view needs them."""
    tokens = view.asks and isinstance(queries, tuple)
    return embed.embed_questions(retriever, *queries) if tokens else queries


def opened(checkpoint_folder: str) -> tuple[Run, str]:
    """A finished run and the stage meant by `--checkpoint`: the run's folder, or a stage's folder inside it ("")."""
    folder = Path(checkpoint_folder)
    folder = folder.parent if folder.name == "checkpoints" else folder
    for workdir, stage in ((folder, ""), (folder.parent, folder.name)):
        if (kept := kept_config(workdir)) and (workdir / "tokenizer.json").exists():
            config = ConfigDict(settings.completed(kept))
            here = surroundings(config, workdir)
            if here.retriever_stage or not settings.on_files(config):
                here.load_retriever()
            return here, stage
    raise ConfigError(f"--checkpoint={checkpoint_folder}: no run there (a folder with config.json and tokenizer.json)")


def kept_config(folder) -> dict | None:
    """The config of the run in `folder`; None: no run there. Published weights have a config.json too."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if "stages" in config else None


def own_encoder(folder, mesh: Mesh) -> encoders.SmallEncoder | None:
    """The retriever that the run in `folder` trained, with the tower it was trained on, on `mesh`; None: no run there.

    Raises ConfigError: the run has no finished retriever, or its tower's weights cannot be read.
    """
    if not kept_config(folder):
        return None
    there, _ = opened(folder)
    there = dataclasses.replace(there, mesh=mesh)
    there.load_retriever()
    params = there.parameters(there.config[there.retriever_stage].init)
    queries = functools.partial(there.prompter.queries, length=there.sizes.question)
    return encoders.SmallEncoder(there.cfg, params, there.retriever, there.config.data.size, queries)


def chosen_encoder(here: Run, path: str | None = None, pool: str | None = None):
    """(encoder or None, pool): what --encoder and --pool say, else config.encoder; None is the run's own retriever.

    --encoder is a folder of PE-Core or SigLIP 2, or of another run, whose retriever then embeds.

    Raises ConfigError: no weights there, another model, no tokenizer, an unknown pool.
    """
    given = here.config.get("encoder") or {}
    path, pool = path or given.get("path", ""), pool or given.get("pool", "mean")
    if pool not in encoders.POOLS:
        raise ConfigError(f"pool {pool!r}: choose one of {', '.join(encoders.POOLS)}")
    if not path:
        return None, pool
    try:
        return own_encoder(path, here.mesh) or encoders.open_encoder(path, mesh=here.mesh), pool
    except (ConfigError, WeightsError, TokenizerError) as e:
        raise ConfigError(f"--encoder: {e}") from None


@functools.partial(jax.jit, static_argnums=(0, 3))
def _tower(cfg, params, pixels_snc, grid_hw):
    return qwen25_vl.bind(cfg, params).vision_features(normalise(pixels_snc), grid_hw)


def tower_features(cfg, params, pixels_nnc, grid_hw) -> jax.Array:
    """Features [N, n, V] of all patches, in chunks of one compiled shape."""
    n = len(pixels_nnc)
    parts = []
    for start in range(0, n, TOWER_CHUNK):
        rows = np.minimum(np.arange(start, start + TOWER_CHUNK), n - 1)
        parts.append(_tower(cfg, params, pixels_nnc[rows], grid_hw)[: n - start])
    return jnp.concatenate(parts)


def check_sources(config, cfg: qwen25_vl.Config | None = None) -> None:
    """Raises, before anything is computed, where weights that a stage starts from cannot be read or are not `cfg`'s."""
    sources = [config.init_from]
    sources += [config[name].get(field, "") for name in config.stages for field in ("init", "teacher")]
    for source in dict.fromkeys(sources):
        if source and source not in config.stages:
            pretrained.check(source, cfg)


def prepare(config, workdir: Path) -> Run:
    """Keeps the tokenizer with the run: of config.init_from, or of the synthetic set, built if it is not there.

    Raises ConfigError: settings of the data that cannot be, another set in its folder, weights that do not fit.
    """
    check_sources(config)
    if settings.on_files(config):
        if missing := [f"config.{key}, {what}" for key, what in to_be_given(config)]:
            raise ConfigError(f"training on files needs {'; '.join(missing)}")
        words = pretrained.tokenizer(config.init_from).to_json()
    else:
        folder = synthetic.data_folder(config, workdir)
        synthetic.build_set(config, folder)
        words = (folder / "tokenizer.json").read_bytes()
    files.write_whole(workdir / "tokenizer.json", words)
    run = surroundings(config, workdir)
    check_sources(config, run.cfg)
    pretrained.fits(run.cfg, run.tokenizer)
    return run


def check_batch(run: Run, name: str) -> None:
    """Raises ConfigError where a stage's videos cannot be shared out among the devices."""
    ways, videos = run.mesh.shape["data"] * run.mesh.shape["fsdp"], run.config[name].videos
    if videos % ways:
        raise ConfigError(f"config.{name}.videos = {videos} does not divide over {ways} devices (data x fsdp)")


def to_be_given(config) -> list[tuple[str, str]]:
    """(key, what it is) of what training on files needs, no preset can know, and is not there."""
    needs = {"init_from": "a folder of published weights", "data.train": "a question file (Video-R1's JSON)"}
    used = [config[name].view for name in config.stages] + [config.eval.arms[name].view for name in config.eval.arms]
    if any(config.views[name].select == "retrieve" for name in used):
        needs["encoder.path"] = "a folder of PE-Core or SigLIP 2 weights, for the views that retrieve"
    given = configs.flat(config)
    return [(key, what) for key, what in needs.items() if not given[key]]


def surroundings(config, workdir: Path | None, tokenizer: Tokenizer | None = None) -> Run:
    """Everything static of a run that has begun: tokenizer (default the workdir's), model sizes, views. Reads no video.

    `workdir` None, for a model of published size alone: without a tokenizer, so for its shapes only.
    """
    tokenizer = tokenizer or (None if workdir is None else Tokenizer.load(workdir / "tokenizer.json"))
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    if settings.on_files(config):
        return _on_files(config, workdir, tokenizer, mesh)
    most = int(config.data.patches[1])
    lengths = Sizes(int(config.data.events[1]) * most, int(config.data.events[1]), most, QUESTION, ANSWER)
    sampling = indexer.Sampling(config.data.size, config.data.fps, 2 * lengths.patches)
    v, t = config.model.vision, config.model.text
    cfg = qwen25_vl.tiny(
        vocab_size=tokenizer.vocab_size, hidden_size=t.hidden_size, num_layers=t.num_layers, num_heads=t.num_heads,
        num_kv_heads=t.num_kv_heads, intermediate_size=t.intermediate_size, vision_depth=v.depth,
        vision_hidden_size=v.hidden_size, vision_num_heads=v.num_heads,
        vision_intermediate_size=v.intermediate_size,
        image_token_id=tokenizer.id("<|image_pad|>"), video_token_id=tokenizer.id("<|video_pad|>"),
        vision_start_token_id=tokenizer.id("<|vision_start|>"), vision_end_token_id=tokenizer.id("<|vision_end|>"),
        pad_token_id=tokenizer.id("<|endoftext|>"), eos_token_ids=tuple(tokenizer.stop_ids),
    )  # fmt: skip
    time_scale, views = 2 / config.data.fps * cfg.tokens_per_second, views_of(config, cfg)
    prompter = Prompter(tokenizer, tuple(side // 2 for side in sampling.grid_hw), time_scale)
    lengths = _telling(lengths, prompter, views)
    return Run(config, workdir, cfg, tokenizer, prompter, lengths, views, sampling, time_scale, mesh)


def _telling(sizes: Sizes, prompter: Prompter | None, views: dict[str, View]) -> Sizes:
    """The sizes, with room for what views say before a question."""
    said = (v.told(v.kept(sizes.patches, sizes.event), prompter.tokens_per_patch) for v in views.values() if prompter)
    return dataclasses.replace(sizes, told=max((len(prompter.tokenizer.encode(text)) for text in said), default=0))


def views_of(config, cfg: qwen25_vl.Config) -> dict[str, View]:
    """config.views of this model. Raises ConfigError where one drops tokens after a layer that the model lacks."""
    if wrong := view_settings.layer_problems(config.views, cfg.text.num_layers):
        raise ConfigError("; ".join(f"config.{problem}" for problem in wrong))
    return {name: View(**config.views[name].to_dict()) for name in config.views}


def _on_files(config, workdir, tokenizer, mesh) -> Run:
    """The surroundings of a run on files: a published model, frames as Video-R1 takes them, padded to one size."""
    data, size = config.data, config.model.size
    cfg = qwen25_vl.qwen25_vl(size) if size else pretrained.config(config.init_from)
    sampling = indexer.Published(data.fps, data.max_frames, data.frame_tokens, data.image_tokens or data.frame_tokens)
    patches = data.max_frames // 2
    prompter = tokenizer and Prompter(tokenizer, (1, sampling.tokens), 1.0, prompts.SYSTEM, cache=256)
    lead = prompter.words("", Shape("video", (1, 1), 1.0))[0] if prompter else 16
    views = views_of(config, cfg)
    events = max(patches, *(view.k for view in views.values()))
    sizes = Sizes(patches, events, patches, data.question_tokens, data.answer_tokens, lead)
    sizes = _telling(sizes, prompter, views)
    return Run(config, workdir, cfg, tokenizer, prompter, sizes, views, sampling, 1.0, mesh)
