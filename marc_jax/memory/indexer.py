"""Index once: a video file becomes a memory entry that answers any number of questions.

decode -> events -> vision tower -> event embeddings. `marc_jax.index`, the evaluation and `marc_jax.ask` share this.
The embeddings are those of the run's own retriever, or of any other encoder (`memory.encoders`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import patches, video
from marc_jax.memory import events, store
from marc_jax.memory.encoders import Encoder, embed_shown, in_chunks, patch_encoder, pool_frames, tower_sha256
from marc_jax.memory.shots import Shots

KEYS_WITHIN = 11.0  # seconds that a key frame may stand for (x264's default are 250 frames), see `Indexer.look`
KEY_EVENTS = events.Options(cut=0.9)  # seconds apart, frames of one shot differ more than neighbours do


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How frames are taken from a file: squashed to size x size pixels, `fps` per second, at most `max_frames`."""

    size: int
    fps: float
    max_frames: int

    @property
    def grid_hw(self) -> tuple[int, int]:
        """One frame in patches of 14 pixels."""
        return self.size // 14, self.size // 14

    def read(self, path, read: Callable = video.read_frames) -> video.Clip:
        """Raises VideoError naming the file and the reason. `read`: called in place of `video.read_frames`."""
        return read(path, fps=self.fps, max_frames=self.max_frames, resize=(self.size, self.size))

    def read_full(self, path, read: Callable = video.read_frames) -> video.Clip:
        """The same frames in the file's own size, for an encoder with its own preprocessing."""
        return read(path, fps=self.fps, max_frames=self.max_frames)

    def shrink(self, clip: video.Clip) -> video.Clip:
        """`read` from `read_full`."""
        return dataclasses.replace(clip, frames=patches.resize_frames(clip.frames, self.size, self.size))


@dataclasses.dataclass(frozen=True)
class Published:
    """How Video-R1 takes frames from videos, and images: aspect ratio kept, sizes by the budgets of qwen-vl-utils.

    Attributes:
      fps, max_frames: of videos; at least four frames, an even number.
      frame_tokens: budget of a frame in visual tokens; a little more where rounding goes up (128: Video-R1's training).
      image_tokens: most visual tokens of an image.
    """

    fps: float
    max_frames: int
    frame_tokens: int
    image_tokens: int

    @property
    def tokens(self) -> int:
        """Most visual tokens of a temporal patch; all are padded to as many."""
        return max(self.frame_tokens * 9 // 8, self.image_tokens)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """A padded temporal patch as one row of merged tokens."""
        return patches.MERGE, patches.MERGE * self.tokens

    @property
    def budget(self) -> patches.FrameBudget:
        limit = self.frame_tokens * patches.FACTOR**2
        return patches.FrameBudget(min(patches.VIDEO_MIN_PIXELS, limit), frame_limit=limit, most=self.tokens)

    def read(self, path, read: Callable = video.read_frames) -> video.Clip:
        """Raises VideoError naming the file and the reason."""
        least = min(4, self.max_frames)
        return read(path, fps=self.fps, max_frames=self.max_frames, min_frames=least, resize=self.budget)

    def read_full(self, path, read: Callable = video.read_frames) -> video.Clip:
        """The same frames in the file's own size."""
        return read(path, fps=self.fps, max_frames=self.max_frames, min_frames=min(4, self.max_frames))

    def shrink(self, clip: video.Clip) -> video.Clip:
        """`read` from `read_full`."""
        height, width = self.budget.size(*clip.frames.shape[1:3], len(clip.frames))
        return dataclasses.replace(clip, frames=patches.resize_frames(clip.frames, height, width))

    def image(self, path) -> tuple[video.Clip, np.ndarray]:
        """A picture as a clip of one frame, and itself [1, H, W, 3] in its own size. Raises VideoError."""
        picture = video.read_image(path)
        limits = {"min_pixels": patches.IMAGE_MIN_PIXELS, "max_pixels": self.image_tokens * patches.FACTOR**2}
        try:
            size = patches.smart_resize(*picture.shape[:2], **limits)
        except ValueError as error:
            raise video.VideoError(path, str(error)) from None
        info = video.VideoInfo(picture.shape[1], picture.shape[0], 1.0, 1, 0.0, "image")
        frames = patches.resize_frames(picture[None], *size, like="pillow")
        return video.Clip(frames, np.zeros(1), info, np.zeros(1, np.int64)), picture[None]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A file after everything that needs no device.

    Attributes:
      clip: the sampled frames.
      sha256: of the file.
      spans: its events in temporal patches.
      full: the frames in the file's own size where an encoder wants them, else None.
    """

    clip: video.Clip
    sha256: str
    spans: list
    full: np.ndarray | None = None


class Indexer:
    """Turns clips into memory entries with one model and one retriever; compiled once."""

    CHUNK = 16

    def __init__(
        self, cfg, params: dict, retriever: dict | None, sampling: Sampling | Published, *,
        encoder: Encoder | None = None, pool: str = "mean", shots: Shots | None = None, dtype=jnp.float32,
        place: Callable = lambda x: x,
    ):  # fmt: skip
        """Args:
        retriever: None and no encoder: events are not embedded (zeros).
        encoder: embeds events in place of `retriever`, from frames of the file's own size.
        pool: how an event's frames become its embedding, see `encoders.pool_frames`.
        shots: divides files by TransNetV2; default `memory.events` on the sampled frames.
        dtype: of the vision tower's activations.
        place: puts a chunk of patches on the devices.
        """
        self.sampling, self.params, self.retriever = sampling, params, retriever
        self.encoder, self.pool, self.shots, self.place = encoder, pool, shots, place
        rounding = {} if dtype == jnp.float32 else {"dtype": jnp.dtype(dtype).name}
        self.fingerprint = store.fingerprint(
            tower=tower_sha256(params),
            retriever=encoder.fingerprint if encoder else store.tree_sha256(jax.device_get(retriever or {})),
            preprocessing={**dataclasses.asdict(sampling), "resize": patches.RESIZE, **rounding},
            segmenter=shots.fingerprint if shots else events.FINGERPRINT,
            pool=pool,
        )
        self._run = patch_encoder(cfg, dtype)

    def features(self, pixels_tnc: np.ndarray, grid_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Tower features [T, n, V] and patch embeddings [T, D] of uint8 pixel patches, in chunks of one shape."""
        run = lambda x: self._run(self.params, self.retriever, self.place(x), grid_hw)  # noqa: E731
        return in_chunks(run, pixels_tnc, self.CHUNK)

    def entry(
        self, clip: video.Clip, sha256: str, *, spans: list | None = None, full: np.ndarray | None = None
    ) -> store.MemoryEntry:
        """The memory of one decoded clip.

        Features are kept of every patch, also of those in no event.

        Args:
          spans: its events in temporal patches, in time order; default those that `memory.events` finds.
          full: the clip's frames in the file's own size, for the encoder; default those of the clip.
        """
        pixels, (_, *grid_hw) = patches.frames_to_pixel_patches(clip.frames)
        features, emb_td = self.features(pixels, tuple(grid_hw))
        spans = events.segment(clip.frames, self.sampling.fps) if spans is None else spans
        if self.encoder is None:
            emb = pool_frames(emb_td, spans, self.pool)
        else:
            emb = self.embed_events(clip.frames if full is None else full, spans, clip.shown)
        return self._entry(clip, sha256, spans, emb, features, tuple(grid_hw))

    def embed_events(self, frames: np.ndarray, spans: list, shown: np.ndarray | None = None) -> np.ndarray:
        """Event embeddings of frames [T, H, W, 3] by the encoder, pooled.

        Args:
          spans: in temporal patches.
          shown: `video.Clip.shown`; a key frame that stands for several frames is embedded once.
        """
        rows = [(patches.TEMPORAL * a, patches.TEMPORAL * b) for a, b in spans]
        return pool_frames(embed_shown(self.encoder, frames, shown), rows, self.pool)

    @staticmethod
    def _entry(clip: video.Clip, sha256: str, spans, emb, features, grid_hw: tuple[int, int]) -> store.MemoryEntry:
        seconds = np.asarray(clip.seconds, np.float64)[::2]
        step = seconds[1] - seconds[0] if len(seconds) > 1 else 1.0
        ends = np.append(seconds, seconds[-1] + step)
        return store.MemoryEntry(
            video_sha256=sha256,
            seconds=seconds,
            event_spans=np.asarray(spans, np.int32),
            event_seconds=np.array([[ends[a], ends[b]] for a, b in spans]),
            event_embeddings=emb,
            tokens=features,
            grid=grid_hw,
        )

    def decode(self, path, sha256: str | None = None, read: Callable = video.read_frames) -> Decoded:
        """Reads and divides a file; safe in threads.

        Args:
          sha256: of the file, where it is known already.
          read: called in place of `video.read_frames`, e.g. to decode in another process.

        Raises VideoError naming the file and the reason.
        """
        if self.encoder is None:
            clip, full = self.sampling.read(path, read), None
        else:
            whole = self.sampling.read_full(path, read)
            clip, full = whole if whole.shown is not None else self.sampling.shrink(whole), whole.frames
        if self.shots:
            spans = self.shots.spans(path, clip.seconds, read=read)
        else:
            options = None if clip.shown is None else KEY_EVENTS
            spans = events.segment(clip.frames, self.sampling.fps, options)
        return Decoded(clip, sha256 or store.file_sha256(path), spans, full)

    def decode_image(self, path) -> Decoded:
        """Reads a picture: one event of one temporal patch. Raises VideoError as `decode`."""
        clip, full = self.sampling.image(path)
        return Decoded(clip, store.file_sha256(path), [(0, 1)], full)

    def encode(self, decoded: Decoded) -> store.MemoryEntry:
        """The memory of a decoded file; `extra` holds its length and the time between temporal patches, in seconds."""
        entry = self.entry(decoded.clip, decoded.sha256, spans=decoded.spans, full=decoded.full)
        return _to_the_end(entry, decoded.clip)

    def look(self, path, read: Callable = video.read_frames, within: float = KEYS_WITHIN) -> Decoded:
        """`decode` of key frames alone: what they show, and the events they divide; `encode_events` reads the rest.

        Where they are too sparse (`video.read_frames(keys_within=within)`) it is `decode`, and `clip.shown` is None.
        For an encoder, without `shots`. Raises VideoError as `decode`.
        """
        return self.decode(path, read=functools.partial(read, keys_within=within, keys_side=self.encoder.side))

    def encode_events(
        self, path, looked: Decoded, emb: np.ndarray, chosen, read: Callable = video.read_frames
    ) -> store.MemoryEntry:
        """The memory of a file that was looked at, with features of the chosen events alone; the others' are zero.

        Args:
          emb: event embeddings, of `embed_events(looked.clip.frames, looked.spans, looked.clip.shown)`.
          chosen: numbers of events, increasing.

        Raises VideoError as `decode`.
        """
        slots = np.concatenate([np.arange(*looked.spans[event]) for event in chosen])
        rows = (patches.TEMPORAL * slots[:, None] + np.arange(patches.TEMPORAL)).ravel()
        clip = self.sampling.read(path, functools.partial(read, rows=rows))
        pixels, (_, *grid_hw) = patches.frames_to_pixel_patches(clip.frames)
        seen, _ = self.features(pixels, tuple(grid_hw))
        features = np.zeros((len(looked.clip.frames) // patches.TEMPORAL, *seen.shape[1:]), seen.dtype)
        features[slots] = seen
        entry = self._entry(looked.clip, looked.sha256, looked.spans, emb, features, tuple(grid_hw))
        return _to_the_end(entry, looked.clip)

    def file(self, path) -> store.MemoryEntry:
        """Reads and indexes a file."""
        return self.encode(self.decode(path))


def _to_the_end(entry: store.MemoryEntry, clip: video.Clip) -> store.MemoryEntry:
    """With what `MemoryEntry.extra` holds, and no event longer than the file."""
    length = float(clip.info.duration)
    extra = {"duration": length, "second_per_grid": clip.seconds_per_patch}
    begin_e, end_e = entry.event_seconds.T  # the last ends one step after its last patch: not after the file
    end_e = np.where(begin_e < length, np.minimum(end_e, length), end_e)
    return dataclasses.replace(entry, event_seconds=np.stack([begin_e, end_e], 1), extra=extra)
