"""A made-up video to measure with: scenes of a colour of their own, each panned over for four seconds."""

import pathlib

import cv2
import numpy as np

from data_pipelines.synthetic.build import write_video

FPS, SHOT = 24, 4  # frames per second; seconds of a scene


def write_scenes(path: pathlib.Path, height: int = 480, width: int = 854, seconds: int = 32) -> None:
    """32 s are 64 frames at 2 per second, in 8 scenes; MPEG-4 with a key frame every 12 frames."""
    rng, frames = np.random.default_rng(0), []
    for _ in range(seconds // SHOT):
        scene = (rng.integers(0, 256, 3) * 3 + rng.integers(0, 256, (9, 18, 3))) // 4
        scene = cv2.resize(scene.astype(np.uint8), (width + 5 * SHOT * FPS, height), interpolation=cv2.INTER_CUBIC)
        frames += [scene[:, 5 * t : 5 * t + width] for t in range(SHOT * FPS)]
    write_video(path, np.stack(frames), FPS)
