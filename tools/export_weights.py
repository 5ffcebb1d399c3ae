"""An Orbax checkpoint -> a folder that transformers loads.

    python -m tools.export_weights --checkpoint=weights/3b --out=exported [--tokenizer=Qwen2.5-VL-3B-Instruct]

Writes config.json and safetensors with published names, one tensor in memory at a time beyond the restored tree. The
checkpoint is one of `tools.convert_weights`, or a training checkpoint given with `--config` (the folder or config.json
of the model it started from).
"""

import argparse
import json
import pathlib
import sys

import numpy as np

from marc_jax.models import qwen25_vl, weights
from marc_jax.models.qwen25_vl import Config, ConfigError, config_from_hf
from marc_jax.models.safetensors_io import WeightsError, write_folder
from marc_jax.paths import flatten
from tools import scratch
from tools.convert_weights import copy_tokenizer
from tools.streaming import DTYPES


def export(cfg: Config, params: dict, out: pathlib.Path, dtype: str, tokenizer=None, shard_bytes=5 * 10**9) -> None:
    """Writes `out` whole or not at all.

    Args:
      params: nested dict of this model's parameters.
      tokenizer: a folder whose tokenizer and preprocessor files are copied along.
    Raises:
      WeightsError: `out` is there already, or params are not this model's.
    """
    check(cfg, params)
    with scratch.whole(out) as folder:
        (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg, dtype), indent=2))
        rows = [(name, DTYPES[dtype], shape) for name, shape in weights.published_shapes(cfg).items()]
        write_folder(folder, rows, weights.published(cfg, params, DTYPES[dtype]), shard_bytes)
        if tokenizer:
            copy_tokenizer(pathlib.Path(tokenizer), folder)


def check(cfg: Config, params: dict) -> None:
    """WeightsError naming the first parameters that are not this model's."""
    want = {path: tuple(w.shape) for path, w in flatten(qwen25_vl.describe(cfg)).items()}
    have = {path: tuple(np.shape(x)) for path, x in flatten(params).items()}
    wrong = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if wrong:
        path = wrong[0]
        raise WeightsError(f"parameter {path}: {have.get(path, 'missing')}, the config says {want.get(path, 'none')}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="folder of checkpoint steps")
    parser.add_argument("--step", type=int, default=None, help="default: the newest that verifies")
    parser.add_argument("--config", default=None, help="folder or config.json of the model, if the checkpoint has none")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write (new or empty)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--tokenizer", default=None, help="folder of tokenizer files; default: the checkpoint's")
    args = parser.parse_args(argv)
    from marc_jax import checkpoint
    from marc_jax.pretrained import load_parameters

    try:
        step = checkpoint.latest(args.checkpoint) if args.step is None else args.step
        if step is None:
            raise WeightsError(f"{args.checkpoint}: no checkpoint here")
        meta = checkpoint.read_meta(args.checkpoint, step)
        if args.config is None and "model" not in meta:
            raise WeightsError(f"{args.checkpoint}: its metadata has no model config; give --config")
        cfg = config_from_hf(args.config or meta["model"])
        if "trainable" in meta:  # a training stage: trainable and frozen parameters lie apart
            params = load_parameters(qwen25_vl.abstract(cfg), args.checkpoint, step)
        else:
            abstract = {"params": qwen25_vl.abstract(cfg, DTYPES[meta.get("dtype", "float32")])}
            params = checkpoint.restore(args.checkpoint, abstract, step, partial=True)[0]["params"]
        export(cfg, params, args.out, args.dtype, args.tokenizer or args.checkpoint)
    except (ConfigError, WeightsError, checkpoint.CheckpointError, OSError) as e:
        print(f"export_weights: {e}", file=sys.stderr)
        return 2
    print(f"step {step} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
