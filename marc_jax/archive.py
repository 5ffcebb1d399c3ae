"""Index once, ask many: the two verbs behind `marc_jax.index` and `marc_jax.ask`.

    archive = Archive("/data/memory", checkpoint="runs/quickstart")      # or a published Qwen2.5-VL, encoder=FOLDER
    archive.index(["holiday.mp4", "/data/videos"])             # what is there already is skipped
    answer = archive.ask("how many in blue stripes ?")         # or ask(..., video="holiday.mp4")
    print(answer.text, answer.events)                          # events: video, seconds, similarity
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

from data_pipelines import loader, patches, sandbox
from data_pipelines.containers import DEFAULT_LIMITS
from data_pipelines.folders import Found, find_videos
from data_pipelines.video import Clip, VideoError, read_frames
from marc_jax import files, media, pretrained, run, settings, stage_settings
from marc_jax.config import ConfigError
from marc_jax.evaluation import single, timeline
from marc_jax.memory import store
from marc_jax.memory.indexer import Decoded, Indexer
from marc_jax.memory.table import EventTable

SETTINGS = "made_with.json"  # what index was told; what ask takes where it is told nothing
FLUSH_SECONDS = 30.0
KEEP_BYTES = 1 << 30  # of the videos asked about last: their next question reads no disk
ENCODER = "--encoder=FOLDER (PE-Core or SigLIP 2)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a memory was made with; paths are absolute, "" is the run's own.

    Attributes:
      checkpoint: folder of the run, of one of its stages, or of a published model.
      encoder: folder of PE-Core, SigLIP 2 or a run whose retriever embeds; shots: folder of TransNetV2.
      pool: "mean" or "max".
    """

    checkpoint: str = ""
    encoder: str = ""
    shots: str = ""
    pool: str = ""


@dataclasses.dataclass
class Indexed:
    """What `Archive.index` did.

    Attributes:
      videos: all that were asked for; new: indexed now; same: {file: id} already there, by name or by content.
      failed: {file: reason}.
      frames, events, bytes: of the new ones (sampled frames; bytes as stored).
      video_seconds: length of the new videos; seconds: time it took.
      stopped: ended early because `stop` said so; what was done is in the memory.
    """

    videos: int = 0
    new: list[str] = dataclasses.field(default_factory=list)
    same: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    frames: int = 0
    events: int = 0
    bytes: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0
    stopped: bool = False


class Archive:
    """Videos indexed by one run's model, and questions about them. Models are loaded and compiled when first needed.

    Files are decoded in child processes: one that hangs or kills its decoder is a VideoError like any other.
    """

    def __init__(
        self, memory=None, checkpoint: str = "", *, encoder: str = "", pool: str = "", shots: str = "", view: str = "",
        approx: bool = False, decode_seconds: float | None = None, max_new: int | None = None,
        key_frames: bool = False,
    ):  # fmt: skip
        """Args:
        memory: its folder; None: videos are indexed when they are asked about, and forgotten.
        checkpoint: a run, whose main student answers, or a stage of it; or a published Qwen2.5-VL as it is.
        encoder, pool, shots: see `Settings`. What is "" is as the memory was made.
        view: one of the run's views to answer with; default the stage's. A published model has those of
          `settings.published`: one patch per retrieved event, and without an encoder all of the video ("full").
        approx: search the archive by `lax.approx_max_k`: faster on TPU, and may miss an event (`retrieve.search`).
        decode_seconds: how long decoding one file may take [s]; default that of `Limits`, half an hour.
        max_new: most tokens of an answer; default the run's.
        key_frames: without a memory, events are found and chosen in a file's key frames, and only the chosen ones are
          decoded (`Indexer.look`): sooner answered; other events may be chosen than `index` would find.

        Raises ConfigError, VideoError, WeightsError, CheckpointError: one line.
        """
        self.folder, self.approx = None if memory is None else Path(memory), approx
        if self.folder and self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--memory={memory}: a file, not a folder")
        told = Settings(*(os.path.realpath(p) if p else "" for p in (checkpoint, encoder, shots)), pool)
        made = _recorded(self.folder)
        self.settings = Settings(*(a or b for a, b in zip(_values(told), _values(made), strict=True)))
        if not self.settings.checkpoint:
            which = f" ({_lacking(self.folder) or f'{memory} does not say'})" if self.folder else ""
            raise ConfigError(f"--checkpoint=FOLDER is required: which run's model is it ?{which}")
        try:
            self.here, stage = _opened(self.settings.checkpoint)
        except ConfigError as e:
            hint = "" if checkpoint else f"; {memory} was made with it: give --checkpoint=FOLDER, where it is now"
            raise ConfigError(f"{e}{hint}") from None
        config = self.here.config
        arm, self.on_files = config.eval.arms[config.eval.main], settings.on_files(config)
        self.stage = stage or arm.stage
        if self.stage and self.stage not in config.stages:
            raise ConfigError(f"--checkpoint: {self.stage!r} is not a stage of this run")
        self.encoder, self.pool = run.chosen_encoder(self.here, self.settings.encoder, self.settings.pool)
        usual = config[self.stage].get("view", "full") if self.stage else arm.view if self.encoder else "full"
        self.view, self.max_new = self.here.view(view or usual), max_new
        if self.view.select == "retrieve" and self.encoder is None and self.here.retriever is None:
            raise ConfigError(f"view {view or usual!r} retrieves events, which needs {ENCODER}, for index and ask")
        self.key_frames = key_frames
        if key_frames and (self.folder or shots or self.encoder is None or self.view.select != "retrieve"):
            raise ConfigError(f"--key_frames is for a file without --memory and --shots, and retrieves by {ENCODER}")
        self.decode_seconds = decode_seconds or DEFAULT_LIMITS.decode_seconds
        self._hashes: dict[tuple, str] = {}

    @functools.cached_property
    def indexer(self) -> Indexer:
        # On files the tower is frozen: that of the stage which answers is the one it started from.
        params = self.answerer.params if self.on_files else self.here.parameters(self.here.config.eval.teacher)
        return media.open_indexer(self.here, params, self.encoder, self.pool, self.settings.shots, "--shots")

    @functools.cached_property
    def answerer(self) -> single.Answerer:
        return single.Answerer(self.here, self.stage, self.view, self.encoder, self.max_new)

    # ---------------------------------------------------------------- index

    def index(
        self, places: Iterable | Found, *, workers: int = 2, tokens: str = "keep",
        progress: Callable[[int, int, Indexed], None] | None = None, report: Callable[[str, str], None] | None = None,
        stop: Callable[[], bool] = lambda: False, read: Callable | None = None,
    ) -> Indexed:  # fmt: skip
        """Adds the videos of files and folders; what cannot be read is in the result's `failed`.

        A video is skipped where the memory holds a file of its name or its content, unchanged. What is done is safe
        after half a minute at most: a killed run goes on from there.

        Args:
          places: files and folders, or what `find_videos` found there.
          workers: processes that decode; at most workers + 1 decoded videos are held.
          tokens: how they are stored, see `store.MemoryWriter`.
          progress: called with (done, total, so far); report: with (file, reason) of what cannot be read.
          stop: asked after every video.
          read: called, from threads, in place of decoding in child processes: `video.read_frames` or the like.
        """
        if self.folder is None:
            raise ConfigError("--memory=FOLDER is required: where the memory is kept")
        begun, done = time.monotonic(), Indexed()
        found = places if isinstance(places, Found) else find_videos(places)
        done.videos, done.failed = found.total, dict(found.failed)
        for place, reason in done.failed.items():
            report and report(place, reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = store.MemoryWriter(self.folder, self.indexer.fingerprint, tokens=tokens, reader=self.reader)
        pool = sandbox.Pool(max(1, min(workers, len(found.files))), self.decode_seconds)
        decode = functools.partial(self._decode, writer, read or pool.read_frames)
        work = loader.decode_ahead(found.files, decode, workers)
        with writer, contextlib.closing(work), pool:  # stopped, the pool ends first: no thread waits for a file then
            _record(self.folder, self.settings)
            for finished, (name, decoded, bad) in enumerate(work, len(done.failed) + 1):
                if bad is not None:
                    done.failed[name] = bad["reason"]
                    report and report(name, bad["reason"])
                else:
                    self._add(writer, name, decoded, done)
                done.bytes = writer.bytes
                done.seconds = time.monotonic() - begun
                if time.monotonic() - writer.flushed > FLUSH_SECONDS:
                    writer.flush()
                progress and progress(finished, found.total, done)
                if stop():
                    done.stopped = finished < found.total
                    break
        self.reader.refresh()
        done.seconds = time.monotonic() - begun
        return done

    def _decode(self, writer: store.MemoryWriter, read: Callable, name: str) -> Decoded | str:
        """In a thread: the decoded file, or the id under which its content is there."""
        if not os.path.isfile(name):
            raise VideoError(name, "no such file" if not os.path.exists(name) else "not a regular file")
        sha256 = store.file_sha256(name)
        there = writer.same_content(sha256)
        return self.indexer.decode(name, sha256, read) if there is None else there

    def _add(self, writer: store.MemoryWriter, name: str, decoded: Decoded | str, done: Indexed) -> None:
        if not isinstance(decoded, str):
            there = writer.same_content(decoded.sha256)  # a copy that was being decoded at the same time
            decoded = decoded if there is None else there
        if isinstance(decoded, str):
            done.same[name] = decoded
            return
        entry = self.indexer.encode(decoded)
        writer.add(os.path.realpath(name), entry)
        done.new.append(name)
        done.frames += len(decoded.clip.frames)
        done.events += len(entry.event_spans)
        done.video_seconds += entry.extra["duration"]

    # ---------------------------------------------------------------- ask

    def ask(self, question: str, video: str | None = None) -> single.Answer:
        """Answers from one video, or from those videos of the memory whose events are nearest to the question.

        On files it is the one video with the nearest event: videos differ in shape and rate, and a prompt holds one.

        Raises:
          ConfigError: an empty memory, a video it does not hold, a view that cannot look at an archive.
          StaleMemory: made by another model or from another file. VideoError: no memory, and an unreadable video.
        """
        clock, clips = single.Clock(), None
        if self.folder is None:
            if not video:
                raise ConfigError("--video=FILE or --memory=FOLDER is required: what is the question about ?")
            # A stage whose own tower sees the video wants its frames.
            decode = self.indexer.look if self.key_frames and not self.answerer.pixels else self.indexer.decode
            decoded = clock.once("decode", lambda: decode(video, read=self._read))
            clips = {video: decoded.clip}
            query = clock.once("embed question", lambda: self.answerer.embed(question))
            if decoded.clip.shown is None:
                entries = {video: clock.once("vision, events", lambda: self.indexer.encode(decoded))}
            else:
                entries, clips = {video: self._glimpsed(video, decoded, query, clock)}, None
        else:
            clock.once("memory", self._contents)
            query = clock.once("embed question", lambda: self.answerer.embed(question))
            names = [clock.once("memory", lambda: self._named(video))] if video else self._nearest(query, clock)
            entries = clock.once("memory", lambda: {name: self._entry(name) for name in names})
            if self.answerer.pixels:
                clips = clock.once("decode", lambda: self.clips(names))
        return self.answerer.answer(question, query, entries, clock, clips)

    def _glimpsed(self, video: str, looked: Decoded, query: np.ndarray, clock: single.Clock) -> store.MemoryEntry:
        """The memory of a file of which only key frames were looked at: the events for this question alone."""
        clip, indexer = looked.clip, self.indexer
        emb = clock.once("events", lambda: indexer.embed_events(clip.frames, looked.spans, clip.shown))
        chosen = self.answerer.chosen(emb, query)
        return clock.once(
            "decode, vision of events", lambda: indexer.encode_events(video, looked, emb, chosen, self._read)
        )

    def clips(self, names: Iterable[str]) -> Mapping[str, Clip]:
        """The sampled frames of videos of the memory. VideoError where a file is gone."""
        return {name: self.indexer.sampling.read(name, self._read) for name in names}

    @functools.cached_property
    def _read(self) -> Callable:
        """`read_frames` in one child process, which ends with this object; the file is waited for, so on all cores."""
        pool = sandbox.Pool(1, self.decode_seconds)
        weakref.finalize(self, pool.close)
        return functools.partial(pool.read_frames, parts=os.cpu_count() or 1)

    def draw(self, path, answer: single.Answer) -> None:
        """The picture of an answer: a timeline (.html), or the film strip with what was merged into what (.png)."""
        if Path(path).suffix == ".png":
            self.answerer.draw(path, answer, self.clips(answer.entries))
            return
        tracks = {
            name: timeline.Track(_length(entry), [(*entry.event_seconds[i], s) for i, s in enumerate(scores.tolist())])
            for (name, entry), scores in zip(answer.entries.items(), answer.scores.values(), strict=True)
        }
        shown = [
            timeline.Shown(
                e.video, e.number, e.begin, e.end, e.score, frame_jpeg(e.video, (e.begin + e.end) / 2, self._read)
            )
            for e in answer.events
        ]
        read = f"{answer.tokens} visual tokens of {answer.all_tokens}"
        note = f"{read}, first token after {1000 * answer.first_token:.1f} ms"
        text = timeline.page(answer.question, answer.text, tracks, shown, answer.seconds, note)
        files.write_whole(path, text)

    @functools.cached_property
    def reader(self) -> store.MemoryReader:
        return store.MemoryReader(self.folder, self.indexer.fingerprint, KEEP_BYTES)

    def _contents(self) -> None:
        """Sees what was added since the last question. ConfigError where there is nothing."""
        if lacking := _lacking(self.folder):
            raise ConfigError(f"{lacking}; index videos first: python -m marc_jax.index")
        self.reader.refresh()

    def _named(self, name: str) -> str:
        """The id of a video given by its file: by name, or by content where it was indexed under another name."""
        contents, key = self.reader.contents(), os.path.realpath(name)
        if key in contents:
            return key
        sha256 = self._sha256(key) if os.path.isfile(key) else None
        found = next((video for video, known in contents.items() if known == sha256), None)
        if found is None:
            raise ConfigError(f"{self.folder} does not hold {name}; add it with python -m marc_jax.index")
        return found

    def _entry(self, name: str) -> store.MemoryEntry:
        """With its tokens. StaleMemory if the file has changed since; a file that is gone is answered about."""
        return self.reader.get_checked(name, self._sha256(name)) if os.path.isfile(name) else self.reader[name]

    def _sha256(self, name: str) -> str:
        """Of a file; computed again when its size or time has changed."""
        stat = os.stat(name)
        key = name, stat.st_size, stat.st_mtime_ns, stat.st_ino
        if key not in self._hashes:
            self._hashes[key] = store.file_sha256(name)
        return self._hashes[key]

    def _nearest(self, query: np.ndarray, clock: single.Clock) -> list[str]:
        """The videos, by name, of the events of the whole memory that are nearest to the question."""
        if self.view.select != "retrieve":
            raise ConfigError(
                "this view looks at whole videos: name one with --video=FILE, or --view=NAME of a view that retrieves"
                + ("" if self.encoder or self.here.retriever else f" (it needs {ENCODER})")
            )
        clock.once("memory", lambda: self._events.update(self.reader))
        k = 1 if self.on_files else self.view.k
        best = clock.once("search", lambda: self._events.nearest(query[0], k))
        return sorted({name for name, _ in best})

    @functools.cached_property
    def _events(self) -> EventTable:
        return EventTable(self.here.mesh.devices, approx=self.approx)


def frame_jpeg(path, seconds: float, read: Callable = read_frames, height: int = 180) -> bytes | None:
    """The frame shown at a time as a small JPEG; None where the file is gone or cannot be read."""
    try:
        frames = read(path, num_frames=1, start=seconds).frames[:1]
    except VideoError:
        return None
    h, w = frames.shape[1:3]
    small = patches.resize_frames(frames, min(h, height), max(1, round(w * min(h, height) / h)))
    done, data = cv2.imencode(".jpg", small[0, :, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return data.tobytes() if done else None


def _length(entry: store.MemoryEntry) -> float:
    return float(entry.extra.get("duration") or entry.event_seconds.max())


def _opened(checkpoint: str) -> tuple[run.Run, str]:
    """(run, stage) as `run.opened`; or a published checkpoint as it is, safetensors or converted, and no stage.

    Raises ConfigError, WeightsError, CheckpointError, TokenizerError: neither there, or one that cannot be read.
    """
    folder = Path(checkpoint)
    runs = (folder,) if (folder / "config.json").exists() else (folder.parent, folder.parent.parent)
    if any(map(run.kept_config, runs)) or not stage_settings.holds_weights(folder):
        return run.opened(checkpoint)
    pretrained.check(folder)
    here = run.surroundings(settings.published(checkpoint), folder, pretrained.tokenizer(folder))
    pretrained.fits(here.cfg, here.tokenizer)
    return here, ""


def _values(settings: Settings) -> tuple:
    return dataclasses.astuple(settings)


def _lacking(folder: Path) -> str | None:
    """Why no question can be answered from there, if so."""
    if not folder.is_dir():
        return f"there is no memory {folder}"
    return None if any(folder.glob(f"*{store.SUFFIX}")) else f"the memory {folder} is empty"


def _recorded(folder: Path | None) -> Settings:
    """What the memory was made with; nothing where it does not say."""
    path = None if folder is None else folder / SETTINGS
    if path is None or not path.is_file():
        return Settings()
    try:
        return Settings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path} cannot be read ({e}); remove it and give --checkpoint") from None


def _record(folder: Path, settings: Settings) -> None:
    """Writes the settings beside the shards."""
    if _recorded(folder) != settings:
        files.write_whole(folder / SETTINGS, json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
