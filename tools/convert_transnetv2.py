"""Published TransNetV2 weights -> an Orbax checkpoint.

    python -m tools.convert_transnetv2 --source=transnetv2-pytorch-weights.pth --out=weights/transnetv2
    python -m tools.convert_transnetv2 --source=inference/transnetv2-weights --out=weights/transnetv2

The source is the PyTorch port's `.pth` (needs torch; read with weights_only=True, nothing in it is executed), a
`.safetensors` or `.npz` of it, or the authors' TensorFlow SavedModel (needs tensorflow, its variables are read without
building the graph). Every tensor is consumed once and every parameter written once, or nothing is written.
`{"params": ...}` is saved as step 0, float32.
"""

import argparse
import dataclasses
import pathlib
import sys

import numpy as np

from marc_jax.models import transnetv2
from marc_jax.models.transnetv2 import WeightsError
from marc_jax.paths import flatten
from tools import scratch, torch_pickle


def read(source: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by their published names. Raises WeightsError: absent, unreadable, or the library for it is missing."""
    if source.is_dir():
        return _saved_model(source)
    if not source.is_file():
        raise WeightsError(f"{source}: no such file or folder")
    if source.open("rb").read(24).startswith(b"version https://git-lfs"):
        raise WeightsError(f"{source}: a git-lfs pointer, not the weights; run `git lfs pull` in that repository")
    if source.suffix == ".npz":
        try:
            with np.load(source, allow_pickle=False) as file:
                return {name: file[name] for name in file}
        except Exception as error:  # numpy and zipfile raise many kinds on damaged files
            raise WeightsError(f"{source}: not a readable .npz ({error})") from None
    if source.suffix == ".safetensors":
        from marc_jax.models.safetensors_io import File

        file = File(source)
        return {name: file.read(name) for name in file.tensors}
    state = torch_pickle.load(source, mmap=False)
    if other := [name for name, tensor in state.items() if not hasattr(tensor, "numpy")]:
        raise WeightsError(f"{source}: {other[0]} is {type(state[other[0]]).__name__}, not a tensor")
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _saved_model(folder: pathlib.Path) -> dict[str, np.ndarray]:
    data = sorted((folder / "variables").glob("variables.data-*"))
    if not data or not (folder / "saved_model.pb").is_file():
        raise WeightsError(f"{folder}: not a SavedModel (saved_model.pb and variables/ expected)")
    for file in (*data, folder / "saved_model.pb"):
        if file.open("rb").read(24).startswith(b"version https://git-lfs"):
            raise WeightsError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull` in that repository")
    try:
        import tensorflow as tf
    except ImportError:
        advice = "install tensorflow-cpu, or convert the .pth that the repository's convert_weights.py writes"
        raise WeightsError(f"{folder}: reading a SavedModel needs tensorflow; {advice}") from None
    try:
        loaded = tf.saved_model.load(str(folder))
        return {variable.name: variable.numpy() for variable in loaded.variables}
    except Exception as error:
        raise WeightsError(f"{folder}: TensorFlow cannot load it: {' '.join(str(error).split())[:200]}") from None


def infer(tensors: dict[str, np.ndarray], source) -> transnetv2.Config:
    """The sizes that these tensors have; the defaults where they do not say. WeightsError when none can be told."""
    for name, tensor in tensors.items():
        if name.endswith("SDDCNN.0.DDCNN.0.Conv3D_1.layers.0.weight"):
            filters = tensor.shape[0] // 2
        elif "SDDCNN_1/DDCNN_1/Conv3D_1/conv_spatial/kernel" in name:
            filters = tensor.shape[-1] // 2
        else:
            continue
        wide = [t.size for n, t in tensors.items() if n.split(":")[0].endswith(("fc1.bias", "/dense/bias"))]
        return transnetv2.Config(filters=filters, width=wide[0] if wide else 1024)
    raise WeightsError(f"{source}: no tensor of TransNetV2 in it (first names: {', '.join(sorted(tensors)[:3])})")


def convert(source: pathlib.Path, out: pathlib.Path) -> int:
    """Converts `source` into checkpoint `out`; returns the number of parameters. WeightsError: `out` is as before."""
    from marc_jax import checkpoint

    tensors = read(source)
    cfg = infer(tensors, source)
    params = transnetv2.assemble(cfg, tensors, str(source))
    meta = {"model": {"model_type": "transnetv2", **dataclasses.asdict(cfg)}, "source": source.name, "dtype": "float32"}
    with scratch.whole(out) as folder:
        checkpoint.save(folder, 0, {"params": params}, meta)
    return sum(w.size for w in flatten(params).values())


def main(argv=None) -> int:
    from marc_jax.config import UserError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=pathlib.Path, required=True, help=".pth, .safetensors, .npz or SavedModel")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the Orbax checkpoint (new or empty)")
    args = parser.parse_args(argv)
    try:
        count = convert(args.source, args.out)
    except (WeightsError, UserError, OSError) as error:
        print(f"convert_transnetv2: {error}", file=sys.stderr)
        return 2
    print(f"{count:,} parameters -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
