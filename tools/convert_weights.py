"""A folder of published Qwen2.5-VL weights -> an Orbax checkpoint.

    python -m tools.convert_weights --source=Qwen2.5-VL-3B-Instruct --out=weights/3b [--dtype=bfloat16]

Reads safetensors, sharded or not, of any transformers naming generation; where there are none, torch pickles
(pytorch_model.bin, its shards, .pt, .pth; needs torch, read with weights_only). Every tensor is consumed once and every
parameter written once, or nothing is written. Numbers go from the source to the result chunk by chunk, so memory stays
far below one copy of the model. `{"params": ...}` is saved as step 0 with the model's config.json in the metadata;
tokenizer files are copied beside it. Start from the result with `--config.init_from=weights/3b`.

Exit codes: 0 converted; 2 bad input or no space, one line says what; then nothing is left.
"""

import argparse
import pathlib
import shutil
import sys

from marc_jax.models import weights
from marc_jax.models.qwen25_vl import ConfigError, config_from_hf
from marc_jax.models.safetensors_io import WeightsError, open_folder, pickles
from tools import scratch, streaming, torch_pickle
from tools.streaming import DTYPES

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt chat_template.json chat_template.jinja "
    "preprocessor_config.json video_preprocessor_config.json generation_config.json"
).split()
STACKED = ("text/layers/", "vision/blocks/")


def convert(source: pathlib.Path, out: pathlib.Path, dtype: str, progress=lambda path, done, total: None) -> int:
    """Converts `source` into checkpoint `out`; returns the number of parameters.

    Args:
      progress: called after each part with (parameter, parameters written so far, all).
    Raises:
      ConfigError, WeightsError, TokenizerError, CheckpointError: one line naming the file and the tensor; `out` is then
        untouched.
    """
    from marc_jax import pretrained

    cfg = config_from_hf(source)
    files = _open(source)
    names = weights.match(cfg, {name: file.tensors[name][1] for name, file in files.items()}, str(source))
    weights.check_tied(cfg, files, source)
    pretrained.check_tokenizer(cfg, source)
    read = lambda name: files[names[name]].read(names[name])  # noqa: E731

    def release():
        for file in set(files.values()):
            file.release()

    with scratch.whole(out) as folder:
        meta = {"model": weights.hf_config(cfg, dtype), "source": source.name, "dtype": dtype}
        done = streaming.save(
            folder, lambda make: weights.assemble(cfg, read, make), meta, dtype,
            layered=lambda path: path.startswith(STACKED), release=release, progress=progress,
        )  # fmt: skip
        copy_tokenizer(source, folder)
    return done


def _open(source: pathlib.Path) -> dict:
    """Tensor name -> file: safetensors where there are any, else pickles."""
    if not any(source.glob("*.safetensors*")) and pickles(source):
        return torch_pickle.open_folder(source)
    return open_folder(source)


def copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies tokenizer and preprocessor files that are there."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_weights", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", type=pathlib.Path, required=True, help="folder with config.json and the weights")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the Orbax checkpoint (new or empty)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the result; default bfloat16")
    args = parser.parse_args(argv)
    from marc_jax.checkpoint import CheckpointError
    from marc_jax.tokenizer import TokenizerError

    shown = ""

    def progress(path, done, total):
        nonlocal shown
        if path != shown:
            shown = path
            print(f"{100 * done / total:5.1f}%  {path}", flush=True)

    try:
        count = convert(args.source, args.out, args.dtype, progress)
    except (ConfigError, WeightsError, TokenizerError, CheckpointError, OSError) as e:
        print(f"convert_weights: {e}", file=sys.stderr)
        return 2
    print(f"{count:,} parameters -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
