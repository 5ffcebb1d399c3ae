"""The videos and images of chat messages as patches of a vision tower, as qwen-vl-utils 0.0.14 prepares them.

A visual is described by the dict that stands in a message's content, with that library's keys:

    {"type": "video", "video": "clip.mp4", "fps": 2.0, "max_frames": 64, "min_pixels": 100352}
    {"type": "image", "image": "photo.jpg", "max_pixels": 1003520}

Three deliberate differences: a photo is turned upright by its EXIF tag; a list of frames is resized once, not twice;
a variable frame rate is sampled by time. A key that is unknown or of the other kind is an error.
transformers' "path", "url" and "image_url" are taken for the source; all of them name files, nothing is downloaded.
"""

import dataclasses

import numpy as np

from data_pipelines import patches, sources, video
from data_pipelines.containers import DEFAULT_LIMITS, Limits, VideoError
from data_pipelines.patches import VideoBudget

_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
KEYS = {
    "image": ("type", "image", *_SIZE),
    "video": ("type", "video", "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end",
              "sample_fps", "total_pixels", *_SIZE),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Medium:
    """A video or an image, ready for the vision tower.

    Attributes:
      kind: "video" or "image".
      patches: uint8 [t, n, 1176], n = h * w; `patches.normalise_patches` makes them what the tower reads.
      grid: (t, h, w) in patches; t * h * w / 4 visual tokens.
      second_per_grid: seconds between temporal patches.
      name: the file, or "frames given".
      seconds: float64 [T], when each frame is shown; empty for an image.
    """

    kind: str
    patches: np.ndarray
    grid: tuple[int, int, int]
    second_per_grid: float = 1.0
    name: str = "frames given"
    seconds: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    @property
    def tokens(self) -> int:
        return int(np.prod(self.grid)) // patches.MERGE**2


def _plain(part: dict) -> tuple[str, dict]:
    """Kind and dict of a visual, with transformers' spellings of the source ("path", "url", "image_url") undone."""
    url = part.get("image_url")
    if url is not None:
        rest = {key: value for key, value in part.items() if key not in ("image_url", "type")}
        part = rest | {"image": url["url"] if isinstance(url, dict) else url}
    kind = "image" if part.get("type") == "image" or "image" in part else "video"
    for key in ("path", "url"):
        if key in part and kind not in part and part.get("type") == kind:
            part = {kind: part[key]} | {k: v for k, v in part.items() if k != key}
    if part.get(kind) is None:
        raise ValueError(f"a visual without 'image' or 'video': {sorted(part)}")
    return kind, part


def load(part: dict, *, budget: VideoBudget | None = None, root=None, limits: Limits = DEFAULT_LIMITS) -> Medium:
    """Reads, samples and resizes one visual.

    Args:
      part: its dict; see the module. The visual is a path (or "file://" path), or frames uint8 [T, H, W, 3] already
        sampled at `sample_fps` (default 2), or a picture uint8 [H, W, 3].
      budget: pixels of a video where the dict does not say; default qwen-vl-utils' own.
      root: a folder that paths are relative to and may not leave; None takes any path.
      limits: sizes beyond which a file is refused.

    Raises:
      VideoError: "<file>: <reason>": missing, damaged, no such kind of file, an aspect ratio above 200, no frame in
        the time asked for, more `nframes` than there are.
      ValueError: a key that is unknown, or two that contradict each other.
    """
    kind, part = _plain(part)
    unknown = sorted(set(part) - set(KEYS[kind]))
    if unknown:
        raise ValueError(f"{kind} has the key {unknown[0]!r}; known are {', '.join(KEYS[kind])}")
    if ("resized_height" in part) != ("resized_width" in part):
        raise ValueError(f"{kind}: resized_height and resized_width go together")
    source = part[kind]
    if not isinstance(source, np.ndarray):
        source = _path(source, root)
    return (_image if kind == "image" else _video)(part, source, budget or VideoBudget(), limits)


def _path(source, root) -> str:
    path = str(source).removeprefix("file://")
    if "://" in path or path.startswith("data:"):
        raise VideoError(path[:80], "a URL, not a file: download it first")
    if root is None:
        return path
    try:
        return sources.media_path(root, path)
    except ValueError as error:
        raise VideoError(path, str(error)) from None


def _given_size(part: dict) -> tuple[int, int] | None:
    """resized_height and resized_width, brought to multiples of 28 within an image's limits, for both kinds."""
    if "resized_height" not in part:
        return None
    limits = {"min_pixels": patches.IMAGE_MIN_PIXELS, "max_pixels": patches.IMAGE_MAX_PIXELS}
    return patches.smart_resize(part["resized_height"], part["resized_width"], **limits)


def _image(part, source, budget, limits) -> Medium:
    given = isinstance(source, np.ndarray)
    name = "frames given" if given else source
    picture = source if given else video.read_image(source, limits=limits)
    if picture.ndim != 3:
        raise VideoError(name, f"a picture is uint8 [H, W, 3], not {picture.dtype} {picture.shape}")
    try:
        size = _given_size(part) or patches.smart_resize(
            *picture.shape[:2],
            min_pixels=part.get("min_pixels", patches.IMAGE_MIN_PIXELS),
            max_pixels=part.get("max_pixels", patches.IMAGE_MAX_PIXELS),
        )
        resized = patches.resize_frames(picture[None], *size, like="pillow")
        rows, grid = patches.frames_to_pixel_patches(resized)
    except ValueError as error:
        raise VideoError(name, str(error)) from None
    return Medium("image", rows, grid, name=name)


def _video(part, source, budget, limits) -> Medium:
    if "fps" in part and "nframes" in part:
        raise ValueError("video: give fps or nframes, not both")
    keys = ("min_pixels", "max_pixels", "total_pixels")
    budget = dataclasses.replace(budget, **{key: part[key] for key in keys if key in part})
    if isinstance(source, np.ndarray):
        return _frames(part, source, budget)
    clip = _read(part, source, budget, limits)
    rows, grid = patches.frames_to_pixel_patches(clip.frames)
    return Medium("video", rows, grid, clip.seconds_per_patch, source, clip.seconds)


def _read(part, path, budget, limits) -> video.Clip:
    count, most = None, part.get("max_frames", 768)
    if "nframes" in part:
        count = round(part["nframes"] / 2) * 2
        if count < 2:
            raise VideoError(path, f"nframes {part['nframes']} is less than 2 frames")
    clip = video.read_frames(
        path,
        fps=part.get("fps", 2.0),
        min_frames=min(part.get("min_frames", 4), most),
        max_frames=most,
        num_frames=count,
        start=part.get("video_start"),
        end=part.get("video_end"),
        resize=_given_size(part) or budget,
        limits=limits,
    )
    if count and len(np.unique(clip.index)) < count:
        raise VideoError(path, f"nframes {count} is more than the frames there are ({len(np.unique(clip.index))})")
    return clip


def _frames(part, frames, budget) -> Medium:
    sample_fps, name = float(part.get("sample_fps", 2.0)), "frames given"
    if frames.ndim != 4 or not len(frames):
        raise VideoError(name, f"frames are uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")
    even = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
    try:
        size = _given_size(part) or budget.size(*even.shape[1:3], len(even))
        rows, grid = patches.frames_to_pixel_patches(patches.resize_frames(even, *size))
    except ValueError as error:
        raise VideoError(name, str(error)) from None
    return Medium("video", rows, grid, 2.0 / sample_fps, name, np.arange(len(even)) / sample_fps)
