"""How far our antialiased bicubic is from torchvision's and Pillow's, and OpenCV's plain one from both; and its speed.

    python -m tools.bench.resize VIDEO...        (needs torch, torchvision and Pillow: the [parity] extra)

Four frames of each video are resized as Video-R1 does; differences are in levels of 255: mean, largest, share of the
values that differ at all.
"""

import sys
import time

import cv2
import numpy as np

from data_pipelines import patches, video


def torchvision_resize(frames: np.ndarray, size) -> np.ndarray:
    """As qwen-vl-utils resizes a video."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # built for CUDA beside a CPU torch: it loads once two operators exist by name
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_resize.library = library  # the operators go when it does
    from torchvision.transforms import InterpolationMode, functional

    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    out = functional.resize(planes, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return out.permute(0, 2, 3, 1).numpy()


def pillow_resize(frames: np.ndarray, size) -> np.ndarray:
    """As qwen-vl-utils resizes an image."""
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1])) for frame in frames])


def opencv_resize(frames: np.ndarray, size) -> np.ndarray:
    return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_CUBIC) for frame in frames])


def main(paths) -> None:
    if not paths:
        raise SystemExit(__doc__)
    for path in paths:
        frames = video.read_frames(path, num_frames=4).frames
        size = patches.VIDEO_R1_BUDGET.size(*frames.shape[1:3], len(frames))
        ways = {
            "ours": lambda frames, size: patches.resize_frames(frames, *size),
            "ours, like pillow": lambda frames, size: patches.resize_frames(frames, *size, like="pillow"),
            "torchvision": torchvision_resize,
            "pillow": pillow_resize,
            "opencv plain": opencv_resize,
        }
        out, seconds = {}, {}
        for name, way in ways.items():
            way(frames, size)
            begun = time.perf_counter()
            out[name] = way(frames, size)
            seconds[name] = time.perf_counter() - begun
        print(f"{path}: {frames.shape[2]}x{frames.shape[1]} -> {size[1]}x{size[0]}")
        for a, b in (
            ("ours", "torchvision"),
            ("ours, like pillow", "pillow"),
            ("ours", "ours, like pillow"),
            ("opencv plain", "torchvision"),
            ("opencv plain", "pillow"),
        ):
            off = np.abs(out[a].astype(int) - out[b])
            share = (off > 0).mean()
            print(f"  {a:>18} to {b:<18} mean {off.mean():8.5f}  largest {off.max():3d}  differ {share:8.5f}")
        print("  ms per frame: " + ", ".join(f"{name} {250 * s:.1f}" for name, s in seconds.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
