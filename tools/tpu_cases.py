"""The programs `tools.compile_for_tpu` compiles: those of a model size, or the training stages of an experiment.

Shapes only: parameters, state and batches are ShapeDtypeStructs with the shardings a run gives them.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from marc_jax import cgrpo, optim, settings, sharding, stage_settings, state
from marc_jax.memory import view as views
from marc_jax.memory.view import SELECTORS, View, Visual
from marc_jax.models import lora, qwen25_vl
from marc_jax.rl import rollout, step
from marc_jax.rl.loss import LossConfig
from marc_jax.rl.rollout import Sampling
from marc_jax.rl.types import Completions, PromptBatch
from tools.compile_for_tpu import Program

TRAINABLE = ("text/.*", "vision/merger/.*")
# performance.md's shapes: 64 frames = 32 temporal patches of 18 x 18, and one patch of 22 x 22 merged from eight.
FULL = {"patches": 32, "grid": (18, 18), "prompt": 32 * 81 + 122}
MERGED = {"patches": 8, "grid": (22, 22), "prompt": 121 + 122}
GROUP, NEW = 8, 256
EMBEDDING, BANK = 1024, 16384  # width of an encoder's embeddings; temporal patches of a synthetic training set


class Shapes:
    """ShapeDtypeStructs on one mesh: B over data and fsdp."""

    def __init__(self, cfg, mesh):
        self.cfg, self.mesh = cfg, mesh

    def rows(self, shape, dtype=jnp.int32, axis=0):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch(self.mesh, axis))

    def params(self, dtype):
        return qwen25_vl.abstract(self.cfg, dtype, self.mesh)

    def state(self, tx, trainable, frozen_dtype, adapters=(), scales=()):
        """Trained parameters and moments in float32, the frozen rest in `frozen_dtype`; adapters beside them."""
        trained, frozen = optim.partition(self.params(jnp.float32), trainable)
        frozen = {k: jax.ShapeDtypeStruct(x.shape, frozen_dtype, sharding=x.sharding) for k, x in frozen.items()}
        return state.abstract(tx, trained | dict(adapters), frozen | dict(scales), mesh=self.mesh)

    def adapters(self, how):
        """(what trains, scales) of a stage's `lora` settings."""
        return lora.abstract(qwen25_vl.describe(self.cfg), how.rank, tuple(how.patterns), self.mesh)

    def prompt(self, b, p) -> PromptBatch:
        rows = self.rows
        return PromptBatch(rows((b, p)), rows((b, p), bool), rows((3, b, p), axis=1), rows((b, p)), rows((b,)))

    def visual(self, b, s, n, c, dtype, *, varied: bool = False) -> Visual:
        """`varied`: videos of several shapes, padded."""
        rows = self.rows
        differ = views.Shapes(rows((b,)), rows((b,)), rows((b,), jnp.float32)) if varied else None
        chosen = rows((b, s, n, c), dtype), rows((b, s), bool), rows((b, s)), rows((b, s), jnp.float32)
        return Visual(*chosen, rows((b,)), differ)

    def index(self, b, t, e, d, *, varied: bool = False) -> views.VideoIndex:
        """Videos of `t` temporal patches in `e` events with embeddings of width `d`."""
        rows = self.rows
        differ = views.Shapes(rows((b,)), rows((b,)), rows((b,), jnp.float32)) if varied else None
        patches, events = (rows((b, t)), rows((b, t), bool), rows((b, t))), (rows((b, e)), rows((b, e)))
        return views.VideoIndex(*patches, *events, rows((b, e), bool), rows((b, e, d), jnp.float32), differ)

    def completions(self, b, g, r) -> Completions:
        shape = (b, g, r)
        return Completions(self.rows(shape), self.rows(shape, bool), self.rows(shape, jnp.float32))

    def sft(self, prompt, visual, b, g, r):
        shape = (b, g, r)
        return step.SFTBatch(prompt, visual, self.rows(shape), self.rows(shape, bool), self.rows(shape, bool))

    def keys(self, b, g):
        return jax.ShapeDtypeStruct((b, g), jax.eval_shape(lambda: jax.random.key(0)).dtype,
                                    sharding=sharding.batch(self.mesh))


def keep_state(step_fn, first):
    """The step with its new state where the old one lies, as `marc_jax.stages` jits it."""
    places = jax.tree.map(lambda x: x.sharding, first)

    def run(now, *others):
        now, metrics = step_fn(now, *others)
        return jax.lax.with_sharding_constraint(now, places), metrics

    return run


def notes(cfg, mesh) -> list[str]:
    """Dimensions that stay whole on this mesh."""
    return [f"note: {fall}" for fall in sharding.fallbacks(qwen25_vl.describe(cfg), mesh)]


def of_model(flags, devices):
    """(mesh, {name: () -> Program}, notes) of a model size."""
    mesh = sharding.make_mesh(*(int(n) for n in flags.mesh.split(",")), devices=devices)
    tiny = {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 256, "vision_hidden_size": 128, "vocab_size": 512}
    cfg = qwen25_vl.tiny(**tiny) if flags.model == "tiny" else qwen25_vl.qwen25_vl(flags.model)
    bind = {"dtype": jnp.bfloat16, "attention": flags.attention}
    b = flags.batch or mesh.shape["data"] * mesh.shape["fsdp"]
    made = _inference(cfg, Shapes(cfg, mesh), b, bind)
    bind["remat"] = not flags.no_remat
    made |= _training(cfg, Shapes(cfg, mesh), b, flags.chunk or None, bind)
    return mesh, made, [f"{b} videos per step", *notes(cfg, mesh)]


def _sampling(cfg) -> Sampling:
    banned = (cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id, cfg.vision_end_token_id)
    return Sampling(NEW, cfg.eos_token_ids, cfg.pad_token_id, banned_ids=banned)


def _inference(cfg, shapes: Shapes, b: int, bind: dict):
    half, t = jnp.bfloat16, cfg.text

    def vision(params, patches):
        return qwen25_vl.bind(cfg, params, **bind).vision(patches, FULL["grid"])

    def prefill(params, vis, prompt):
        return rollout.prefill(qwen25_vl.bind(cfg, params, **bind), vis, prompt)

    def decode(params, prefix, keys):
        return rollout.decode(qwen25_vl.bind(cfg, params, **bind), prefix, keys, _sampling(cfg))

    def vision_program():
        n = FULL["grid"][0] * FULL["grid"][1]
        return Program(vision, (shapes.params(half), shapes.rows((b * FULL["patches"], n, cfg.vision.patch_dim), half)))

    def prefill_program(p):
        vis = shapes.rows((b, p - 122, t.hidden_size), half)
        return Program(prefill, (shapes.params(half), vis, shapes.prompt(b, p)))

    def decode_program(p):
        kv = shapes.rows((t.num_layers, b, p, t.num_kv_heads, t.head_dim), half, axis=1)
        prefix = rollout.Prefix(
            shapes.rows((b, t.hidden_size), half), qwen25_vl.KV(kv, kv), shapes.rows((b, p), bool), shapes.rows((b,))
        )
        return Program(decode, (shapes.params(half), prefix, shapes.keys(b, GROUP)))

    made = {"vision": vision_program}
    for p in (FULL["prompt"], MERGED["prompt"]):
        made[f"prefill_{p}"] = functools.partial(prefill_program, p)
    return made | {f"decode_{MERGED['prompt']}": functools.partial(decode_program, MERGED["prompt"])}


def _training(cfg, shapes: Shapes, b: int, chunk, bind: dict):
    tx, how = optim.make({}, 1000), _sampling(cfg)
    encode = views.make_encode(View("all", "merge", keep=1), MERGED["grid"], 2.0)
    encode_full = views.make_encode(View("all", "keep"), FULL["grid"], 2.0)
    first = functools.partial(shapes.state, tx, TRAINABLE, jnp.bfloat16)

    def seen(view):
        grid = view["grid"]
        # As stages do by default: the frozen tower's features come from the bank, the merger trains.
        visual = shapes.visual(b, view["patches"], grid[0] * grid[1], cfg.vision.hidden_size, jnp.bfloat16)
        return shapes.prompt(b, view["prompt"]), visual

    def program(make, *others):
        now = first()
        return Program(keep_state(make, now), (now, *others), (0,))

    def sft(view, encode):
        make = step.make_sft_step(cfg, encode, tx, chunk=chunk, **bind)
        return program(make, shapes.sft(*seen(view), b, GROUP, NEW))

    def grpo():
        make = step.make_grpo_step(cfg, encode, tx, how, LossConfig(), chunk=chunk, **bind)
        batch = step.GRPOBatch(*seen(MERGED), shapes.completions(b, GROUP, NEW), shapes.rows((b, GROUP), jnp.float32))
        return program(make, batch, shapes.params(jnp.bfloat16))

    def distill():
        make = step.make_distill_step(cfg, encode, encode_full, tx, how, chunk=chunk, **bind)
        batch = step.DistillBatch(*seen(MERGED), *seen(FULL), shapes.completions(b, GROUP, NEW))
        return program(make, batch, shapes.params(jnp.bfloat16))

    return {
        f"sft_{MERGED['prompt']}": functools.partial(sft, MERGED, encode),
        f"sft_{FULL['prompt']}": functools.partial(sft, FULL, encode_full),
        f"grpo_{MERGED['prompt']}": grpo,
        "distill": distill,
    }


def of_experiment(path: str, overrides, attention: str, devices):
    """(mesh, {name: () -> Program}, notes) of an experiment.

    Of each stage that trains the model: the update, what chooses its patches, rollouts and the teacher's answers; and
    the evaluation's answers through each view.
    """
    from data_pipelines.synthetic import vocabulary
    from marc_jax import run

    config = settings.experiment(path, overrides)
    if settings.on_files(config):
        here = run.surroundings(settings_on_host(config), None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            vocabulary.write_tokenizer(Path(folder) / "tokenizer.json")
            here = run.surroundings(settings_on_host(config), Path(folder))
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
    names = [name for name in config.stages if config[name].kind != "retriever"]
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for name in names:
        if config[name].videos % ways:
            raise ValueError(f"config.{name}.videos = {config[name].videos} does not divide over {ways} chips")
    shapes = Shapes(here.cfg, mesh)
    made = {}
    for name in names:
        case = Case(here, config[name], shapes, attention)
        made |= {name: case.update, f"{name}_retrieve": case.retrieve}
        if config[name].kind != "sft":
            made[f"{name}_rollout"] = case.rollout
        if stage_settings.asks_teacher(config[name]):  # elsewhere it judges inside the update
            made[f"{name}_teacher"] = case.teacher
    for view in dict.fromkeys(config.eval.arms[arm].view for arm in config.eval.arms) if names else ():
        if here.view(view).method != "fastv" and here.view(view).select not in SELECTORS:
            made[f"evaluate_{view}"] = functools.partial(case.evaluate, view)
    return mesh, made, notes(here.cfg, mesh)


def settings_on_host(config):
    """The config with a mesh of this machine's devices: the topology's are not there to put arrays on."""
    here = config.copy_and_resolve_references()
    here.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    return here


class Case:
    """The programs of one training stage, at its largest sizes."""

    def __init__(self, here, stage, shapes: Shapes, attention: str):
        self.here, self.stage, self.shapes, self.cfg = here, stage, shapes, here.cfg
        self.videos = stage.videos * (stage.max_segments if stage.get("packing", False) else 1)
        self.bind = here.binding | {"attention": attention}
        self.frozen = jnp.dtype(here.config.model.frozen_dtype)
        self.tx = optim.make(stage.optimizer, stage.steps)
        adapters = shapes.adapters(stage.lora) if stage.lora.rank else ({}, {})
        self.state = shapes.state(self.tx, stage_settings.trainable(stage), self.frozen, *adapters)
        self.how = None
        if stage.kind != "sft":
            how = here.decoding(stage.temperature) if here.tokenizer else _sampling(here.cfg)
            self.how = dataclasses.replace(how, max_new=here.config.max_new_tokens, temperature=stage.temperature)

    def seen(self, name: str, rest: int, b: int = 0):
        """(encode, prompt, visual) of a view; `rest`: tokens of a prompt behind its visual ones; `b`: videos."""
        here, sizes = self.here, self.here.sizes
        view, varied = here.view(name), settings.on_files(here.config)
        per_patch, b = here.grid_hw[0] * here.grid_hw[1], b or self.videos
        width, dtype = self._patch()
        count = view.patches(sizes.patches, sizes.event)
        visual = self.shapes.visual(b, count, per_patch, width, dtype, varied=varied)
        length = sizes.lead + view.kept(sizes.patches, sizes.event) * per_patch // 4 + rest
        encode = views.make_encode(view, here.grid_hw, here.time_scale)
        return encode, self.shapes.prompt(b, length), visual

    def _patch(self):
        """(width, dtype) of one row of a temporal patch: raw, or the tower's features."""
        if self.stage.visual == "pixels":
            return self.cfg.vision.patch_dim, jnp.uint8
        return self.cfg.vision.hidden_size, jnp.bfloat16 if settings.on_files(self.here.config) else jnp.float32

    def update(self) -> Program:
        stage, sizes, shapes, b = self.stage, self.here.sizes, self.shapes, self.videos
        many = self.bind | {"micro_batches": stage.micro_batches}
        if stage.kind == "sft":
            look, *batch = self.seen(stage.view, 0)
            make = step.make_sft_step
            if stage.packing:
                most = {"segments": stage.max_segments, "max_length": stage.max_length, "targets": stage.max_length}
                make = functools.partial(step.make_packed_sft_step, **most)
            make = make(self.cfg, look, self.tx, **many)
            return self._program(make, shapes.sft(*batch, b, stage.questions, sizes.asked + sizes.answer))
        look, *batch = self.seen(stage.view, sizes.asked)
        done = shapes.completions(b, stage.group, self.how.max_new)
        teacher = None if stage_settings.teacher_within(stage) else shapes.params(self.frozen)
        if stage.kind in stage_settings.GROUPED:
            losses = cgrpo.numerics(stage)[1]
            more = {"iterations": stage.iterations, "skip": stage.skip_dead}
            make = step.make_grpo_step(self.cfg, look, self.tx, self.how, losses, **more, **many)
            gains = shapes.rows(done.mask_bgr.shape if stage.credit else (b, stage.group), jnp.float32)
            return self._program(make, step.GRPOBatch(*batch, done, gains), *([teacher] if stage.beta else []))
        look_full, *full = self.seen(stage.teacher_view, sizes.asked)
        make = step.make_distill_step(self.cfg, look, look_full, self.tx, self.how, **many)
        return self._program(make, step.DistillBatch(*batch, *full, done), teacher)

    def _program(self, make, *others) -> Program:
        def run(now, batch, *teacher):
            within = teacher == (None,)
            return make(now, batch, *((lora.base(now.model),) if within else teacher))

        return Program(keep_state(run, self.state), (self.state, *others), (0,))

    def retrieve(self) -> Program:
        """The choice of temporal patches, by the question's embedding where the view retrieves."""
        here, b = self.here, self.videos
        view, sizes, varied = here.view(self.stage.view), here.sizes, settings.on_files(here.config)
        per_patch, (width, dtype) = here.grid_hw[0] * here.grid_hw[1], self._patch()
        bank = self.shapes.rows((b, sizes.patches, per_patch, width), dtype)
        if not varied:  # every training patch, on every chip
            place = sharding.replicated(self.shapes.mesh)
            bank = jax.ShapeDtypeStruct((BANK, per_patch, width), dtype, sharding=place)
        index = self.shapes.index(b, sizes.patches, sizes.events, EMBEDDING, varied=varied)
        query = self.shapes.rows((b, EMBEDDING), jnp.float32)
        return Program(
            lambda index, query, bank: views.select(view, index, query, bank, sizes.event, jax.random.key(0)),
            (index, query, bank),
        )  # fmt: skip

    def evaluate(self, view: str) -> Program:
        """Greedy answers through a view of config.eval, so many questions at once."""
        ways = self.shapes.mesh.shape["data"] * self.shapes.mesh.shape["fsdp"]
        questions = -(-self.here.config.eval.batch // ways) * ways
        how = self.how or dataclasses.replace(_sampling(self.cfg), max_new=self.here.config.max_new_tokens)
        how = dataclasses.replace(how, temperature=0.0)
        return self._sampling(view, self.shapes.params(self.frozen), 1, how, questions)

    def rollout(self) -> Program:
        return self._sampling(self.stage.view, optim.join(self.state.params, self.state.frozen), self.stage.group)

    def teacher(self) -> Program:
        return self._sampling(self.stage.teacher_view, self.shapes.params(self.frozen), self.stage.teacher_group)

    def _sampling(self, view: str, params, group: int, how=None, b: int = 0) -> Program:
        look, *batch = self.seen(view, self.here.sizes.asked, b)
        sample = step.make_sampler(self.cfg, look, how or self.how, **self.bind)
        return Program(sample, (params, *batch, self.shapes.keys(b or self.videos, group)))
