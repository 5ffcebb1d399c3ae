"""Published PE-Core weights (or SigLIP 2's) -> an Orbax checkpoint that `marc_jax.memory.encoders` opens.

    python -m tools.convert_pe --source=PE-Core-L14-336.pt --out=weights/pe-l14 --tokenizer=bpe_simple_vocab_16e6.txt.gz
    python -m tools.convert_pe --source=siglip2-base-patch16-224 --out=weights/siglip2 [--dtype=bfloat16] [--model=NAME]

A .pt file is read by torch with weights_only=True (torch is needed here alone, never by a run); a folder holds
safetensors in any form of `marc_jax.models.clip_weights`. Every tensor is consumed once and every parameter written
once, or nothing is written. `{"params": ...}` is saved as step 0, the sizes in the metadata, the tokenizer beside it.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
import tempfile

import ml_dtypes
import numpy as np

from marc_jax.models import clip_weights, perception_encoder, siglip2
from marc_jax.models.clip import Config
from marc_jax.models.safetensors_io import WeightsError, open_folder
from marc_jax.tokenizer import TokenizerError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZERS = ("bpe_simple_vocab_16e6.txt.gz", "tokenizer.json")


class Staged(np.memmap):
    """An array on disk; a copy of it is itself, so that saving does not pull it into memory."""

    def __deepcopy__(self, memo):
        return self


def config_named(name: str) -> Config:
    """The published model of this name, of either family. Raises WeightsError."""
    for sizes, make in ((perception_encoder.SIZES, perception_encoder.pe_core), (siglip2.SIZES, siglip2.siglip2)):
        if name in sizes:
            return make(name)
    known = ", ".join([*perception_encoder.SIZES, *siglip2.SIZES])
    raise WeightsError(f"{name!r} is no known model: give --model, one of {known}")


def read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a .pt file, memory-mapped where torch can. Raises WeightsError."""
    try:
        import torch
    except ImportError:
        raise WeightsError(f"{path}: reading a torch pickle needs torch: pip install 'marc_jax[parity]'") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # pickle, zip and torch raise many kinds
        raise WeightsError(f"{path}: not a torch file of plain tensors ({' '.join(str(e).split())[:200]})") from None
    for key in ("state_dict", "weights"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise WeightsError(f"{path}: not a dict of tensors")
    half = lambda t: t.float() if t.dtype == torch.bfloat16 else t  # noqa: E731  (numpy knows no bfloat16)
    return {name.removeprefix("module."): half(t.detach()).numpy() for name, t in found.items()}


def convert(source, out, model: str = "", dtype: str = "bfloat16", tokenizer=None, cfg: Config | None = None) -> int:
    """Converts `source` into checkpoint folder `out`; returns the number of parameters.

    Args:
      model: published name; default that of the file or folder.
      tokenizer: copied beside the checkpoint; default one found beside the source.
      cfg: sizes of one's own instead of `model`.
    Raises:
      WeightsError, TokenizerError: one line naming file and tensor; `out` is then untouched.
    """
    from marc_jax import checkpoint

    source, out = pathlib.Path(source), pathlib.Path(out)
    cfg = cfg or config_named(model or (source.name if source.is_dir() else source.stem))
    if source.is_dir():
        files = open_folder(source)
        shapes = {name: file.tensors[name][1] for name, file in files.items()}
        read = lambda name: files[name].read(name)  # noqa: E731
    else:
        tensors = read_pickle(source)
        shapes, read = {name: t.shape for name, t in tensors.items()}, tensors.__getitem__
    form = clip_weights.match(cfg, shapes, str(source))
    if form == "timm":
        raise WeightsError(f"{source}: timm's file holds the image tower alone; questions need the text tower too")
    clip_weights.check_zero(form, shapes, read, str(source))
    found = _tokenizer(source, tokenizer)
    if out.exists() and any(out.iterdir()):
        raise WeightsError(f"{out}: exists and is not empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch, done = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)), 0

    def stage(path, shape, piece):
        nonlocal done
        leaf = np.memmap(scratch / path.replace("/", "."), DTYPES[dtype], "w+", shape=shape or (1,)).view(Staged)
        if "/blocks/" in path:
            for i in range(shape[0]):
                leaf[i] = piece((slice(i, i + 1),))[0]
        else:
            leaf[...] = piece(())
        done += leaf.size
        return leaf.reshape(shape)

    try:
        params = clip_weights.assemble(cfg, form, read, stage)
        meta = {"model": dataclasses.asdict(cfg), "source": source.name, "dtype": dtype}
        checkpoint.save(scratch / "checkpoint", 0, {"params": params}, meta)
        shutil.copyfile(found, scratch / "checkpoint" / found.name)
        if out.exists():
            out.rmdir()
        (scratch / "checkpoint").rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def _tokenizer(source: pathlib.Path, given) -> pathlib.Path:
    folder = source if source.is_dir() else source.parent
    places = [pathlib.Path(given)] if given else [folder / name for name in TOKENIZERS]
    for path in places:
        if path.is_file() and path.name in TOKENIZERS:
            return path
    raise TokenizerError(f"no tokenizer: {' and '.join(map(str, places))} not found; give --tokenizer=FILE")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=pathlib.Path, required=True, help=".pt file, or folder of safetensors")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the Orbax checkpoint (new or empty)")
    parser.add_argument("--model", default="", help="published name; default: that of the file or folder")
    parser.add_argument("--tokenizer", type=pathlib.Path, help=f"{' or '.join(TOKENIZERS)}; default: beside the source")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the result")
    args = parser.parse_args(argv)
    try:
        count = convert(args.source, args.out, args.model, args.dtype, args.tokenizer)
    except (WeightsError, TokenizerError, OSError) as e:
        print(f"convert_pe: {e}", file=sys.stderr)
        return 2
    print(f"{count:,} parameters -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
