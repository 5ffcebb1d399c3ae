"""Published PE-Core weights (or SigLIP 2's) -> an Orbax checkpoint that `marc_jax.memory.encoders` opens.

    python -m tools.convert_pe --source=PE-Core-L14-336.pt --out=weights/pe-l14 --tokenizer=bpe_simple_vocab_16e6.txt.gz
    python -m tools.convert_pe --source=siglip2-base-patch16-224 --out=weights/siglip2 [--dtype=bfloat16] [--model=NAME]

A .pt file is read by torch with weights_only=True (torch is needed here alone, never by a run); a folder holds
safetensors in any form of `marc_jax.models.clip_weights`. Every tensor is consumed once and every parameter written
once, chunk by chunk, or nothing is written. `{"params": ...}` is saved as step 0, the sizes in the metadata, the
tokenizer beside it.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys

from marc_jax.models import clip_weights, perception_encoder, siglip2
from marc_jax.models.clip import Config
from marc_jax.models.safetensors_io import WeightsError, open_folder
from marc_jax.tokenizer import TokenizerError
from tools import scratch, streaming, torch_pickle
from tools.streaming import DTYPES

TOKENIZERS = ("bpe_simple_vocab_16e6.txt.gz", "tokenizer.json")


def config_named(name: str) -> Config:
    """The published model of this name, of either family. Raises WeightsError."""
    for sizes, make in ((perception_encoder.SIZES, perception_encoder.pe_core), (siglip2.SIZES, siglip2.siglip2)):
        if name in sizes:
            return make(name)
    known = ", ".join([*perception_encoder.SIZES, *siglip2.SIZES])
    raise WeightsError(f"{name!r} is no known model: give --model, one of {known}")


def convert(source, out, model: str = "", dtype: str = "bfloat16", tokenizer=None, cfg: Config | None = None) -> int:
    """Converts `source` into checkpoint folder `out`; returns the number of parameters.

    Args:
      model: published name; default that of the file or folder.
      tokenizer: copied beside the checkpoint; default one found beside the source.
      cfg: sizes of one's own instead of `model`.
    Raises:
      WeightsError, TokenizerError: one line naming file and tensor; `out` is then untouched.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    cfg = cfg or config_named(model or (source.name if source.is_dir() else source.stem))
    files = _open(source)
    shapes = {name: file.tensors[named][1] for name, (file, named) in files.items()}
    form = clip_weights.match(cfg, shapes, str(source))
    if form == "timm":
        raise WeightsError(f"{source}: timm's file holds the image tower alone; questions need the text tower too")

    def read(name):
        file, named = files[name]
        return file.read(named)

    def release():
        for file in {file for file, _ in files.values()}:
            file.release()

    clip_weights.check_zero(form, shapes, read, str(source))
    found = _tokenizer(source, tokenizer)
    with scratch.whole(out) as folder:
        meta = {"model": dataclasses.asdict(cfg), "source": source.name, "dtype": dtype}
        done = streaming.save(
            folder, lambda make: clip_weights.assemble(cfg, form, read, make), meta, dtype,
            layered=lambda path: "/blocks/" in path, release=release,
        )  # fmt: skip
        shutil.copyfile(found, folder / found.name)
    return done


def _open(source: pathlib.Path) -> dict:
    """Published name -> (file, the name in it), of a folder of safetensors or a pickle."""
    if source.is_dir():
        return {name: (file, name) for name, file in open_folder(source).items()}
    file = torch_pickle.File(source)
    return {name.removeprefix("module."): (file, name) for name in file.tensors}  # saved from a parallel module


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
    from marc_jax.checkpoint import CheckpointError

    try:
        count = convert(args.source, args.out, args.model, args.dtype, args.tokenizer)
    except (WeightsError, TokenizerError, CheckpointError, OSError) as e:
        print(f"convert_pe: {e}", file=sys.stderr)
        return 2
    print(f"{count:,} parameters -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
