"""Scenes of the synthetic set: latents, sampling, rendering. numpy and OpenCV only.

A video is a row of events. An event is a background (hue x texture, unique inside its video) with one to three
identical objects, each in its own lane, all moving the same way and wrapping round; its (colour, shape) pair is unique
inside the video too, so it can be asked for by background or by content. Event borders fall on temporal patches of two
frames.
"""

import dataclasses
import functools
from collections.abc import Mapping

import cv2
import numpy as np

FRAMES_PER_PATCH = 2
LANES = 3

# RGB, (light, dark). Backgrounds stay below half brightness and objects above it, so that the halved colour
# resolution of MP4 (4:2:0) cannot confuse the two.
HUES = {
    "blue": ((40, 62, 160), (18, 28, 84)),
    "green": ((28, 98, 42), (11, 50, 20)),
    "grey": ((84, 84, 84), (42, 42, 42)),
    "purple": ((112, 38, 132), (58, 18, 72)),
}
TEXTURES = ("plain", "stripes", "bars", "checks")
COLOURS = {"red": (255, 72, 56), "yellow": (255, 224, 30), "white": (255, 255, 255), "cyan": (40, 232, 255)}
SHAPES = ("square", "disc", "cross", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
# What can be asked, of one scene and of two; `questions` says how.
SINGLE = ("colour", "shape", "direction", "count", "happens")
PAIRS = ("colours", "shapes", "directions", "total", "happened", "order")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One scene. `patches` counts temporal patches (two frames each); `speed` is pixels per frame.

    `lanes[i]` and `phases[i]` are the lane and the starting position in pixels of object i; `dissolve` blends the
    first patch with the scene before it.
    """

    hue: str
    texture: str
    colour: str
    shape: str
    direction: str
    count: int
    patches: int
    dissolve: bool = False
    speed: int = 4
    lanes: tuple[int, ...] = (0, 1, 2)
    phases: tuple[int, ...] = (0, 0, 0)

    @property
    def background(self) -> str:
        return f"{self.hue} {self.texture}"

    @property
    def content(self) -> str:
        return f"{self.colour} {self.shape}"

    def undissolved(self) -> "Event":
        """The scene without its blended first patch, its objects where they are by then; itself if it has none."""
        if not self.dissolve:
            return self
        moved = sum(DIRECTIONS[self.direction]) * FRAMES_PER_PATCH * self.speed
        phases = tuple(phase + moved for phase in self.phases)
        return dataclasses.replace(self, patches=self.patches - 1, dissolve=False, phases=phases)

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Event":
        """The event of one entry of a record's "events"; what is not about the scene itself is left out."""
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "lanes": tuple(known["lanes"]), "phases": tuple(known["phases"])})


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard the videos and questions are; (low, high) ranges include both ends.

    More events, shorter events, more dissolves, `noise` and shuffled options are harder; fewer hues make scenes more
    alike. `size` is in pixels and `patches` counts temporal patches of 2 frames, 2 / fps seconds each. `types` are the
    question types asked in files, in turn; by default those that need two scenes, which one retrieved scene or one
    random patch cannot answer. Raises ValueError, one line, for what cannot be.
    """

    size: int = 56
    fps: float = 4.0
    events: tuple[int, int] = (6, 8)
    patches: tuple[int, int] = (1, 2)
    p_dissolve: float = 0.2
    hues: tuple[str, ...] = tuple(HUES)
    speed: tuple[int, int] = (3, 5)
    noise: float = 0.0
    options: str = "fixed"
    types: tuple[str, ...] = PAIRS

    def __post_init__(self):
        contents = len(COLOURS) * len(SHAPES)
        most = min(len(self.hues) * len(TEXTURES), contents)
        unknown = [hue for hue in self.hues if hue not in HUES]
        if unknown or len(set(self.hues)) != len(self.hues) or not self.hues:
            raise ValueError(f"hues must be different names out of {sorted(HUES)}, got {self.hues}")
        if self.size < 28 or self.size % 28:
            raise ValueError(f"size must be a multiple of 28, got {self.size}")
        if not 1 <= self.events[0] <= self.events[1] <= most:
            raise ValueError(f"events must be a range inside 1..{most} (no repeats in a video), got {self.events}")
        if not 1 <= self.patches[0] <= self.patches[1]:
            raise ValueError(f"patches must be a range of positive lengths, got {self.patches}")
        if not 1 <= self.speed[0] <= self.speed[1] < 14:
            raise ValueError(f"speed must be a range inside 1..13 pixels per frame of 56, got {self.speed}")
        if not (0 <= self.p_dissolve <= 1 and 0 <= self.noise < 1 and self.fps > 0):
            raise ValueError("need 0 <= p_dissolve <= 1, 0 <= noise < 1, fps > 0")
        if self.options not in ("fixed", "shuffled"):
            raise ValueError(f"options must be 'fixed' or 'shuffled', got {self.options!r}")
        if not self.types or len(set(self.types)) != len(self.types) or set(self.types) - {*SINGLE, *PAIRS}:
            raise ValueError(f"types must be different names out of {', '.join(SINGLE + PAIRS)}, got {self.types!r}")
        if self.events[0] < 2 and set(self.types) & set(PAIRS):
            pairs = ", ".join(t for t in self.types if t in PAIRS)
            raise ValueError(f"types {pairs} need videos of at least two events, got events = {self.events}")

    @property
    def patch_seconds(self) -> float:
        return FRAMES_PER_PATCH / self.fps


def integers(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    """n integers in low..high, both ends included, from plain uniform doubles (stable across numpy versions)."""
    return low + (rng.random(n) * (high - low + 1)).astype(np.int64)


def sample_video(rng: np.random.Generator, difficulty: Difficulty) -> list[Event]:
    """Draws the latents of one video: every attribute uniform, backgrounds and contents without repeats."""
    hues, colours, directions = difficulty.hues, tuple(COLOURS), tuple(DIRECTIONS)
    n = int(integers(rng, *difficulty.events, 1)[0])
    backgrounds = np.argsort(rng.random(len(hues) * len(TEXTURES)))[:n].tolist()
    contents = np.argsort(rng.random(len(colours) * len(SHAPES)))[:n].tolist()
    direction = integers(rng, 0, 3, n).tolist()
    count = integers(rng, 1, LANES, n).tolist()
    patches = integers(rng, *difficulty.patches, n).tolist()
    dissolve = (rng.random(n) < difficulty.p_dissolve).tolist()
    scale = difficulty.size / 56
    speed = integers(rng, *difficulty.speed, n).tolist()
    lanes = np.argsort(rng.random((n, LANES)), axis=1).tolist()
    phases = integers(rng, 0, difficulty.size - 1, n * LANES).reshape(n, LANES).tolist()
    return [
        Event(
            hue=hues[backgrounds[i] // len(TEXTURES)],
            texture=TEXTURES[backgrounds[i] % len(TEXTURES)],
            colour=colours[contents[i] // len(SHAPES)],
            shape=SHAPES[contents[i] % len(SHAPES)],
            direction=directions[direction[i]],
            count=count[i],
            patches=patches[i],
            dissolve=i > 0 and dissolve[i] and patches[i] >= 2,
            speed=max(1, round(speed[i] * scale)),
            lanes=tuple(lanes[i][: count[i]]),
            phases=tuple(phases[i][: count[i]]),
        )
        for i in range(n)
    ]


def patch_spans(events: list[Event]) -> list[tuple[int, int]]:
    """(start, end) of every event in temporal patches, end exclusive."""
    ends = np.cumsum([event.patches for event in events]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@functools.lru_cache(maxsize=256)
def background(hue: str, texture: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3]; `stripes` are vertical, `bars` horizontal, one eighth of the frame wide."""
    light, dark = (np.array(tone, np.float32) for tone in HUES[hue])
    i = np.arange(size) // (size // 8) % 2
    on = {
        "plain": np.full((size, size), 0.5),
        "stripes": np.broadcast_to(i[None, :], (size, size)),
        "bars": np.broadcast_to(i[:, None], (size, size)),
        "checks": i[:, None] ^ i[None, :],
    }[texture][..., None]
    image = np.round(light * on + dark * (1 - on)).astype(np.uint8)
    image.setflags(write=False)
    return image


@functools.lru_cache(maxsize=256)
def sprite(shape: str, size: int) -> np.ndarray:
    """Coverage in 0..1, float32 [s, s, 1] with s a quarter of the frame, antialiased."""
    s, fine = size // 4, 8
    n = s * fine
    canvas = np.zeros((n, n), np.uint8)
    if shape == "square":
        canvas[:] = 255
    elif shape == "disc":
        cv2.circle(canvas, (n // 2, n // 2), n // 2 - 1, 255, -1)
    elif shape == "cross":
        canvas[:, n * 5 // 14 : n * 9 // 14] = canvas[n * 5 // 14 : n * 9 // 14, :] = 255
    else:
        cv2.fillPoly(canvas, [np.array([[0, n - 1], [n - 1, n - 1], [n // 2, 0]])], 255)
    return (cv2.resize(canvas, (s, s), interpolation=cv2.INTER_AREA) / np.float32(255))[..., None]


def render_event(event: Event, size: int, frames: int, start: int = 0) -> np.ndarray:
    """uint8 RGB [frames, size, size, 3] of the scene alone, from its frame `start` on (motion never ends)."""
    out = np.repeat(background(event.hue, event.texture, size)[None], frames, axis=0)
    alpha, colour = sprite(event.shape, size), np.array(COLOURS[event.colour], np.float32)
    s = alpha.shape[0]
    down, right = DIRECTIONS[event.direction]
    f = np.arange(frames)[:, None, None]
    travelled = (start + np.arange(frames)) * event.speed
    for lane, phase in zip(event.lanes, event.phases, strict=True):
        across = lane * size // LANES + (size // LANES - s) // 2 + np.arange(s)
        along = (phase + (down + right) * travelled[:, None] + np.arange(s)) % size  # [frames, s]
        lane_f = np.broadcast_to(across, (frames, s))
        rows, cols = (lane_f, along) if right else (along, lane_f)
        where = (f, rows[:, :, None], cols[:, None, :])
        out[where] = np.rint(out[where] * (1 - alpha) + colour * alpha).astype(np.uint8)
    return out


def render(
    events: list[Event], size: int = 56, *, noise: float = 0.0, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Frames of a whole video, uint8 RGB [T, size, size, 3], T = 2 * total patches.

    A dissolving event blends its first patch with the scene before it (one third, then two thirds new); every other
    frame is clean. `noise` is the standard deviation in units of full brightness and needs `rng`.
    """
    parts = []
    for i, event in enumerate(events):
        part = render_event(event, size, event.patches * FRAMES_PER_PATCH)
        if event.dissolve and i:
            old = events[i - 1]
            tail = render_event(old, size, FRAMES_PER_PATCH, start=old.patches * FRAMES_PER_PATCH)
            new = ((1 + np.arange(FRAMES_PER_PATCH)) / (1 + FRAMES_PER_PATCH)).reshape(-1, 1, 1, 1)
            part[:FRAMES_PER_PATCH] = np.rint(part[:FRAMES_PER_PATCH] * new + tail * (1 - new)).astype(np.uint8)
        parts.append(part)
    frames = np.concatenate(parts)
    if noise:
        grain = rng.standard_normal(frames.shape[:3], np.float32)[..., None] * np.float32(255 * noise)
        frames = np.clip(np.rint(frames + grain), 0, 255).astype(np.uint8)
    return frames
