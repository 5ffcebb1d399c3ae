"""Index once: a video file becomes a memory entry that answers any number of questions.

decode -> events -> vision tower -> event embeddings. `marc_jax.index`, the evaluation and `marc_jax.ask` share this.
The embeddings are those of the run's own retriever, or of any other encoder (`memory.encoders`).
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from data_pipelines import patches, video
from marc_jax.memory import events, store
from marc_jax.memory.encoders import Encoder, in_chunks, patch_encoder, pool_frames, tower_sha256
from marc_jax.memory.shots import Shots


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
        self, cfg, params: dict, retriever: dict, sampling: Sampling, *, encoder: Encoder | None = None,
        pool: str = "mean", shots: Shots | None = None,
    ):  # fmt: skip
        """Args:
        encoder: embeds events in place of `retriever`, from frames of the file's own size.
        pool: how an event's frames become its embedding, see `encoders.pool_frames`.
        shots: divides files by TransNetV2; default `memory.events` on the sampled frames.
        """
        self.sampling, self.params, self.retriever = sampling, params, retriever
        self.encoder, self.pool, self.shots = encoder, pool, shots
        self.fingerprint = store.fingerprint(
            tower=tower_sha256(params),
            retriever=encoder.fingerprint if encoder else store.tree_sha256(jax.device_get(retriever)),
            preprocessing={**dataclasses.asdict(sampling), "resize": patches.RESIZE},
            segmenter=shots.fingerprint if shots else events.FINGERPRINT,
            pool=pool,
        )
        self._run = patch_encoder(cfg, sampling.grid_hw)

    def features(self, pixels_tnc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tower features [T, n, V] and patch embeddings [T, D] of uint8 pixel patches, in chunks of one shape."""
        return in_chunks(lambda x: self._run(self.params, self.retriever, x), pixels_tnc, self.CHUNK)

    def entry(
        self, clip: video.Clip, sha256: str, *, spans: list | None = None, full: np.ndarray | None = None
    ) -> store.MemoryEntry:
        """The memory of one decoded clip.

        Features are kept of every patch, also of those in no event.

        Args:
          spans: its events in temporal patches, in time order; default those that `memory.events` finds.
          full: the clip's frames in the file's own size, for the encoder; default those of the clip.
        """
        features, emb_td = self.features(patches.frames_to_pixel_patches(clip.frames)[0])
        spans = events.segment(clip.frames, self.sampling.fps) if spans is None else spans
        rows = spans
        if self.encoder is not None:
            emb_td = self.encoder.embed_frames(clip.frames if full is None else full)
            rows = [(patches.TEMPORAL * a, patches.TEMPORAL * b) for a, b in spans]
        emb = pool_frames(emb_td, rows, self.pool)
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
            grid=self.sampling.grid_hw,
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
            clip, full = self.sampling.shrink(whole), whole.frames
        if self.shots:
            spans = self.shots.spans(path, clip.seconds, read=read)
        else:
            spans = events.segment(clip.frames, self.sampling.fps)
        return Decoded(clip, sha256 or store.file_sha256(path), spans, full)

    def encode(self, decoded: Decoded) -> store.MemoryEntry:
        """The memory of a decoded file; `extra` holds its length in seconds."""
        entry = self.entry(decoded.clip, decoded.sha256, spans=decoded.spans, full=decoded.full)
        length = float(decoded.clip.info.duration)
        begin_e, end_e = entry.event_seconds.T  # the last ends one step after its last patch: not after the file
        end_e = np.where(begin_e < length, np.minimum(end_e, length), end_e)
        return dataclasses.replace(entry, event_seconds=np.stack([begin_e, end_e], 1), extra={"duration": length})

    def file(self, path) -> store.MemoryEntry:
        """Reads and indexes a file."""
        return self.encode(self.decode(path))
