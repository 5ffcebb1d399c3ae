"""A made-up video to measure with: scenes of a colour and texture of their own, each panned over for four seconds."""

import pathlib

import av
import cv2
import numpy as np

FPS, SHOT = 24, 4  # frames per second; seconds of a scene
GRAIN = 3.0  # levels of noise, new in every frame: smooth pictures would cost the decoder next to nothing


def write_scenes(
    path: pathlib.Path, height: int = 480, width: int = 854, seconds: int = 32, keyint: int | None = None
) -> None:
    """32 s are 64 frames at 2 per second, in 8 scenes; H.264 as x264 writes it where nothing is asked for.

    That is preset medium, crf 23, B-frames, a key frame at cuts and after 250 frames at most; `keyint`: another
    number. Sides are rounded down to even ones.
    """
    rng, height, width = np.random.default_rng(0), height // 2 * 2, width // 2 * 2
    grain = rng.normal(0, GRAIN, (height + 64, width + 64)).round().astype(np.int16)
    grain = np.repeat(grain[..., None], 3, axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(keyint)} if keyint else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if keyint is None:
            stream.codec_context.gop_size = -1  # x264's own
        for _ in range(max(1, seconds // SHOT)):
            scene = _scene(rng, height, width + 5 * SHOT * FPS)
            for t in range(SHOT * FPS):
                y, x = rng.integers(0, 64, 2)
                noise = grain[y : y + height, x : x + width]
                noisy = cv2.add(scene[:, 5 * t : 5 * t + width], noise, dtype=cv2.CV_8U)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        container.mux(stream.encode())


def _scene(rng, height: int, width: int) -> np.ndarray:
    """int16 [height, width, 3]: colours that change slowly, under a texture of details 4 to 32 pixels wide."""
    base = (rng.integers(0, 256, 3) * 3 + rng.integers(0, 256, (9, 18, 3))) / 4
    out = cv2.resize(base.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    for size in (4, 8, 16, 32):
        detail = rng.normal(0, 8, (height // size + 1, width // size + 1)).astype(np.float32)
        out += cv2.resize(detail, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    return out.round().astype(np.int16)
