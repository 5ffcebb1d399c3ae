"""A folder of published Qwen2.5-VL weights -> an Orbax checkpoint.

    python -m tools.convert_weights --source=Qwen2.5-VL-3B-Instruct --out=weights/3b [--dtype=bfloat16]

Safetensors, sharded or not, of any transformers naming generation. Every tensor is consumed once and every parameter
written once, or nothing is written. Parameters are staged one by one in a scratch file beside the result (as large as
the result, removed at the end), so memory stays far below one copy of the model. `{"params": ...}` is saved as step 0
with the model's config.json in the metadata.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

import ml_dtypes
import numpy as np

from marc_jax.models import weights
from marc_jax.models.qwen25_vl import ConfigError, config_from_hf
from marc_jax.models.safetensors_io import WeightsError, open_folder

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Staged(np.memmap):
    """An array on disk; a copy of it is itself, so that saving does not pull it into memory."""

    def __deepcopy__(self, memo):
        return self


def convert(source: pathlib.Path, out: pathlib.Path, dtype: str, progress=lambda path, done, total: None) -> int:
    """Converts `source` into checkpoint `out`; returns the number of parameters.

    Raises:
      ConfigError, WeightsError: one line naming the file and the tensor; `out` is then untouched.
    """
    from marc_jax import checkpoint

    cfg = config_from_hf(source)
    files = open_folder(source)
    names = weights.match(cfg, {name: file.tensors[name][1] for name, file in files.items()}, str(source))
    weights.check_tied(cfg, files, source)
    if out.exists() and any(out.iterdir()):
        raise WeightsError(f"{out}: exists and is not empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    total, done = sum(int(np.prod(s)) for s in weights.published_shapes(cfg).values()), 0

    def stage(path, shape, piece):
        nonlocal done
        leaf = np.memmap(scratch / path.replace("/", "."), DTYPES[dtype], "w+", shape=shape).view(Staged)
        if path.startswith(("text/layers/", "vision/blocks/")):
            for i in range(shape[0]):
                leaf[i] = piece((slice(i, i + 1),))[0]
        else:
            leaf[...] = piece(())
        done += leaf.size
        progress(path, done, total)
        return leaf

    try:
        params = weights.assemble(cfg, lambda name: files[names[name]].read(names[name]), stage)
        meta = {"model": weights.hf_config(cfg, dtype), "source": source.name, "dtype": dtype}
        checkpoint.save(scratch / "checkpoint", 0, {"params": params}, meta)
        if out.exists():
            out.rmdir()
        (scratch / "checkpoint").rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=pathlib.Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the Orbax checkpoint (new or empty)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the result")
    args = parser.parse_args(argv)

    def progress(path, done, total):
        print(f"{100 * done / total:5.1f}%  {path}", flush=True)

    try:
        count = convert(args.source, args.out, args.dtype, progress)
    except (ConfigError, WeightsError, OSError) as e:
        print(f"convert_weights: {e}", file=sys.stderr)
        return 2
    print(f"{count:,} parameters -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
