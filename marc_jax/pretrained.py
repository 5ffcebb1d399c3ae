"""Weights to start from, in either form: a folder of published safetensors, or an Orbax checkpoint.

The checkpoint is one of `tools.convert_weights`, or one that a training stage wrote (here or in another run). Both are
read straight onto the shardings and dtypes asked for.
"""

import pathlib
from dataclasses import asdict

import jax

from marc_jax import checkpoint, optim
from marc_jax.models import lora, qwen25_vl, weights
from marc_jax.models.qwen25_vl import Config
from marc_jax.models.safetensors_io import WeightsError, pickles
from marc_jax.paths import flatten
from marc_jax.tokenizer import Tokenizer, TokenizerError

_FIRST = 3  # differences named in one line
_OWN = ("eos_token_ids", "pad_token_id")  # of prompts and decoding, which follow the tokenizer in use


def config(source) -> Config:
    """The model that `source` holds.

    Raises:
      ConfigError: another architecture, a broken or missing config.json.
      WeightsError: nothing that can be read there; a torch pickle (a run never reads one).
      CheckpointError: the checkpoint's metadata is damaged or has no model in it.
    """
    folder = pathlib.Path(source)
    steps = _steps(folder)
    if steps is not None:
        step = checkpoint.steps(steps)[-1]
        meta = checkpoint.read_meta(steps, step)
        if "model" not in meta:
            raise checkpoint.CheckpointError(f"checkpoint {steps}, step {step}: its metadata has no model config")
        return qwen25_vl.config_from_hf(meta["model"], name=f"{steps}, step {step}")
    if folder.is_file():
        raise WeightsError(f"{folder}: a file; give the folder that holds config.json and safetensors")
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    if not (folder / "config.json").exists() and not any(folder.glob("*.safetensors")) and not pickles(folder):
        raise WeightsError(f"{folder}: neither safetensors with a config.json nor a checkpoint")
    return qwen25_vl.config_from_hf(folder)


def check(source, cfg: Config | None = None) -> None:
    """Whether the weights at `source` can be read and are those of `cfg`; reads no numbers.

    Raises:
      ConfigError: fields that differ, with both values. WeightsError, CheckpointError: as `config`.
    """
    found = config(source)
    theirs, ours = flatten(asdict(found)), flatten(asdict(cfg or found))
    wrong = [f"{key} is {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    wrong = [line for line in wrong if not line.startswith(_OWN)]
    if wrong:
        more = f", and {len(wrong) - _FIRST} more" if len(wrong) > _FIRST else ""
        raise qwen25_vl.ConfigError(f"{source}: another model than this run's: {'; '.join(wrong[:_FIRST])}{more}")
    if _steps(pathlib.Path(source)) is None:
        weights.open_folder(source)


def load(source, cfg: Config, abstract: dict) -> dict:
    """Nested parameters of `source`.

    Args:
      source: folder of safetensors, of checkpoint steps, or of a training stage.
      abstract: tree of ShapeDtypeStructs (`qwen25_vl.abstract`): dtypes and shardings of the result.
    Raises:
      ConfigError, WeightsError, CheckpointError: see `check`; damaged files, naming file and tensor.
    """
    check(source, cfg)
    steps = _steps(pathlib.Path(source))
    if steps is None:
        return weights.load(source, cfg, abstract)
    if "trainable" in checkpoint.read_meta(steps, checkpoint.steps(steps)[-1]):
        return load_parameters(abstract, steps)
    return checkpoint.restore(steps, {"params": abstract}, partial=True, cast=True)[0]["params"]


def load_parameters(abstract: dict, folder, step: int | None = None) -> dict:
    """Nested model parameters of a stage's checkpoint (default: newest good); trainable and frozen joined again.

    Adapters that the stage trained are merged into the kernels they belong to. Where it kept an average of what it
    trained (`optim.averaged`), that is taken.

    Args:
      abstract: shapes and shardings of the whole model, of `qwen25_vl.abstract`.
    """
    verify = "full"
    if step is None:
        step, verify = checkpoint.latest(folder), "size"  # hashed a moment ago
    if step is None:
        raise checkpoint.CheckpointError(f"no usable checkpoint in {folder}")
    flat = optim.flatten(abstract)
    trained = set(checkpoint.read_meta(folder, step).get("trainable", ()))
    place = {}  # of each parameter in the checkpoint
    for path, x in checkpoint.shapes(folder, step).items():
        part, _, rest = path.partition("/")
        if part in ("params", "frozen") and rest.rpartition("/")[2] in lora.LEAVES:
            flat[rest] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_everywhere(flat))
        if part == "opt_state" and "/average/" in path:
            place[path.partition("/average/")[2]] = path
    place = {path: place.get(path, f"{'params' if path in trained else 'frozen'}/{path}") for path in flat}
    wanted = {place[path]: x for path, x in flat.items()}
    tree, _ = checkpoint.restore(folder, wanted, step, verify=verify, partial=True, cast=True)
    plain, adapters = lora.split({path: tree[place[path]] for path in flat})
    if not adapters:
        return plain
    del tree
    places = None if _everywhere(flat) is None else jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lora.merged, donate_argnums=0, out_shardings=places)(plain, adapters)


def _everywhere(abstract: dict):
    """The sharding of what every device of the abstract arrays' mesh holds; None where they have no mesh."""
    sharding = next(iter(abstract.values())).sharding
    spec = jax.sharding.PartitionSpec()
    return jax.sharding.NamedSharding(sharding.mesh, spec) if isinstance(sharding, jax.sharding.NamedSharding) else None


def check_tokenizer(cfg: Config, source) -> None:
    """Whether the tokenizer in folder `source`, if there is one, fits the model.

    Raises:
      TokenizerError: ids beyond the embedding's rows, or special tokens with other ids than the config's; both values.
    """
    folder = pathlib.Path(source)
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        return
    fits(cfg, Tokenizer.load(folder))


def tokenizer(source) -> Tokenizer:
    """The tokenizer beside the weights at `source`: in its folder, or a run's beside its stage.

    Raises:
      TokenizerError: none there, or one that cannot be loaded.
    """
    folder = pathlib.Path(source)
    for place in (folder, folder.parent, folder.parent.parent):
        if any((place / name).exists() for name in ("tokenizer.json", "vocab.json")):
            return Tokenizer.load(place)
    raise TokenizerError(f"{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt); copy it there")


def fits(cfg: Config, tokenizer: Tokenizer) -> None:
    """TokenizerError where ids of the tokenizer and of the config disagree, or reach beyond the embedding's rows."""
    rows, path = cfg.text.vocab_size, tokenizer.path
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"{path}: ids up to {tokenizer.vocab_size - 1}, but the model's embedding has {rows} rows (vocab_size)"
        )
    named = {
        "<|image_pad|>": ("image_token_id", cfg.image_token_id),
        "<|video_pad|>": ("video_token_id", cfg.video_token_id),
        "<|vision_start|>": ("vision_start_token_id", cfg.vision_start_token_id),
        "<|vision_end|>": ("vision_end_token_id", cfg.vision_end_token_id),
    }
    for token, (field, want) in named.items():
        if tokenizer.id(token) != want:
            raise TokenizerError(f"{path}: {token} is id {tokenizer.id(token)}, the model's {field} is {want}")
    if not set(cfg.eos_token_ids) & set(tokenizer.stop_ids):
        raise TokenizerError(
            f"{path}: answers end with {list(tokenizer.stop_ids)}, the model's eos_token_id is "
            f"{list(cfg.eos_token_ids)}"
        )


def _steps(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of checkpoint steps meant by `folder`: itself, or a stage's `checkpoints`; None if neither."""
    return next((f for f in (folder, folder / "checkpoints") if checkpoint.steps(f)), None)
