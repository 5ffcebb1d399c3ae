"""Writes golden_vision.npz: what qwen-vl-utils and transformers answer for pictures drawn by numpy from a seed.

    python tests/data_pipelines/make_golden_vision.py        (made with qwen-vl-utils 0.0.14, torchvision 0.28,
                                                              Pillow 13, transformers 5.17, torch 2.13)

Run through `pytest` where torchvision needs help to load: see `qwen_vl_utils` in tests/conftest.py.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "golden_vision.npz"
# (total frames, their rate, fps, min_frames, max_frames)
SAMPLED = [
    (total, rate, fps, low, high)
    for total in (2, 3, 5, 64, 491, 3001)
    for rate in (10.0, 30000 / 1001)
    for fps, low, high in ((2.0, 4, 768), (2.0, 4, 63), (0.3, 16, 64), (30.0, 5, 16))
]
# (height, width, min_pixels, max_pixels)
IMAGES = [(42, 70, 784, 10**6), (1080, 1920, 3136, 12845056), (33, 3300, 3136, 12845056), (6000, 4500, 3136, 10**6)]
IMAGES += [(20, 30, 3136, 12845056), (240, 320, 100352, 105369), (720, 1280, 3136, 200704), (98, 126, 784, 10**6)]
# (height, width, frames, min_pixels, max_pixels or 0, total_pixels)
VIDEOS = [(480, 640, 64, 100352, 100352, 90316800), (480, 640, 64, 100352, 0, 1)]
VIDEOS += [(1080, 1920, 768, 100352, 0, 90316800)]
VIDEOS += [(240, 320, 16, 3136, 50176, 90316800), (1280, 720, 400, 12544, 602112, 20_000_000)]
FRAMES_HW, VIDEO_HW, IMAGE_HW = (45, 80), (56, 84), (56, 28)


def frames() -> np.ndarray:
    """uint8 [3, 45, 80, 3]: edges, a ramp, noise."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[: FRAMES_HW[0], : FRAMES_HW[1]]
    edges = ((x // 5 + y // 7) % 2 * 255).astype(np.uint8)
    ramp = (x * 2 + y).astype(np.uint8)
    return np.stack([np.stack([edges, ramp, edges[::-1]], -1), np.stack([ramp] * 3, -1),
                     rng.integers(0, 256, (*FRAMES_HW, 3), np.uint8)])  # fmt: skip


def answers(module) -> dict[str, np.ndarray]:
    """The library's answers; `module` is qwen_vl_utils.vision_process."""
    import torch
    import transformers
    from PIL import Image

    indices = []
    for total, rate, fps, low, high in SAMPLED:
        element = {"fps": fps, "min_frames": low, "max_frames": min(high, total)}
        n = module.smart_nframes(element, total_frames=total, video_fps=rate)
        indices.append(torch.linspace(0, total - 1, n).round().long().numpy())
    sizes = [module.smart_resize(h, w, 28, low, high) for h, w, low, high in IMAGES]
    video_sizes, resize = [], module.transforms.functional.resize
    module.transforms.functional.resize = lambda x, size, **_: video_sizes.append(tuple(size)) or x[..., :1, :1]
    for h, w, n, low, high, total in VIDEOS:
        module.VIDEO_READER_BACKENDS["pyav"] = lambda _, s=(n, 3, h, w): (torch.zeros(1).expand(s), {}, 2.0)
        given = {"min_pixels": low, "total_pixels": total} | ({"max_pixels": high} if high else {})
        module.fetch_video({"video": "any", **given})
    module.transforms.functional.resize = resize
    planes = torch.from_numpy(frames()[[0, 1, 2, 2]]).permute(0, 3, 1, 2)
    bicubic = module.InterpolationMode.BICUBIC
    video = resize(planes, list(VIDEO_HW), interpolation=bicubic, antialias=True)
    size = {"shortest_edge": 784, "longest_edge": 12845056}
    processor = transformers.Qwen2VLVideoProcessor(size=size)
    rows = processor(videos=[video.float()], do_sample_frames=False, return_tensors="np")["pixel_values_videos"]
    image = Image.fromarray(frames()[2]).resize(IMAGE_HW[::-1])
    return {
        "counts": np.array([len(i) for i in indices]),
        "indices": np.concatenate(indices),
        "sizes": np.array(sizes),
        "video_sizes": np.array(video_sizes),
        "video": video.permute(0, 2, 3, 1).numpy(),
        "row_sums": rows.sum(1),
        "row": rows[5],
        "image": np.asarray(image),
    }


def main():
    import qwen_vl_utils.vision_process as module

    module.get_video_reader_backend = lambda: "pyav"
    np.savez_compressed(FILE, **answers(module))


if __name__ == "__main__":
    main()
