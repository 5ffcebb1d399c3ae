"""Writes golden_transnetv2.npz: what the authors' PyTorch port answers for weights and clips drawn from a seed.

    python tests/models/make_golden_transnetv2.py PATH/inference-pytorch/transnetv2_pytorch.py      (needs torch)

Made with soCzech/TransNetV2 at 85cef72. The file holds answers only; weights and clips are redrawn, so it stays small.
`TRANSNETV2_PORT=PATH pytest tests/models/test_transnetv2.py` compares with the port itself, at the published size too.
"""

import importlib.util
import pathlib
import sys

import numpy as np

from marc_jax.models import transnetv2
from marc_jax.paths import flatten

FILE = pathlib.Path(__file__).parent / "golden_transnetv2.npz"
LENGTHS = (7, 100, 130)
SMALL = transnetv2.Config(filters=2, width=16)


def their_shape(shape):
    """torch's shape of a parameter of ours."""
    return tuple(shape[i] for i in (4, 3, 0, 1, 2)) if len(shape) == 5 else shape[::-1]


def weights(cfg, seed=7):
    """Published (PyTorch) name -> float32 tensor; everything random, batch statistics too."""
    rng, out, shapes = np.random.default_rng(seed), {}, flatten(transnetv2.describe(cfg))
    for path, name in transnetv2.names(cfg, "torch").items():
        shape = their_shape(shapes[path].shape)
        z = rng.standard_normal(shape)
        if len(shape) > 1:
            z *= 1.1 / np.prod(shape[1:]) ** 0.5
        elif path.endswith("norm/var"):
            z = np.exp(0.3 * z)
        else:
            z = 0.2 * z + path.endswith("norm/scale")
        out[name] = z.astype(np.float32)
    return out


def clip(length, batch=2, seed=11):
    """uint8 [B, T, 27, 48, 3]: shots of random colours with noise; the third frame is black."""
    rng = np.random.default_rng(seed + length)
    shot = np.cumsum(rng.random((batch, length)) < 0.1, axis=1)
    colours = rng.integers(0, 256, (batch, length + 1, 27, 48, 3))
    frames = np.take_along_axis(colours, shot[:, :, None, None, None], axis=1)
    frames = frames + rng.integers(-20, 20, (batch, length, 1, 1, 3))
    frames[:, 2] = 0
    return np.clip(frames, 0, 255).astype(np.uint8)


def port(path, cfg, tensors):
    """The authors' module with these tensors."""
    import torch

    spec = importlib.util.spec_from_file_location("transnetv2_port", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TransNetV2(F=cfg.filters, L=cfg.stacks, S=cfg.cells, D=cfg.width)
    state = {name: torch.from_numpy(t) for name, t in tensors.items()}
    counters = {n: t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")}
    model.load_state_dict(state | counters, strict=True)
    return model


def answers(model, frames):
    """float32 [2, B, T]: one-hot and many-hot logits."""
    import torch

    with torch.no_grad():
        one, many = model(torch.from_numpy(frames))
    return np.stack([one[..., 0].numpy(), many["many_hot"][..., 0].numpy()])


def main(path):
    model = port(path, SMALL, weights(SMALL))
    np.savez_compressed(FILE, **{f"t{t}": answers(model, clip(t)) for t in LENGTHS})


if __name__ == "__main__":
    main(sys.argv[1])
