"""B equal streams, a video and a question each, through every stage: uncompressed, MARC cold in two ways, MARC warm.

    uncompressed  open + decode (and resize), patchify, vision, prefill, decode: every token of every sampled frame
    cold          open + decode, events, embed, retrieve, patchify (and resize) and vision of the chosen events alone,
                  compress to one temporal patch, prefill, decode
    key frames    look (key frames in place of sampled ones, `Indexer.look`), events, embed, retrieve, then open +
                  decode of the chosen events alone and on as cold; absent where the key frames are too sparse
    warm          memory (kept, as of a video asked about last), embed (the question), retrieve, compress, prefill,
                  decode

Cold, events and their embeddings come from the frames as decoded, so only the chosen events' frames are resized. The
question is the same in every stream; the prompt has tools.bench.model's 122 text tokens. Answers never stop before
`new` tokens.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import patches, stretches
from data_pipelines.decoders import open_reader
from data_pipelines.video import Clip, read_frames
from marc_jax.memory import encoders, events, store
from marc_jax.memory import view as views
from marc_jax.memory.indexer import KEY_EVENTS, KEYS_WITHIN, Published
from marc_jax.models import perception_encoder, qwen25_vl
from marc_jax.rl import rollout
from tools.bench import model as shapes
from tools.bench import timing
from tools.bench.efficiency_report import STAGES

WAYS = ("uncompressed", "cold", "key frames", "warm")
SIZES = {"uncompressed": "all", "cold": "one", "key frames": "keys", "warm": "one"}  # which compiled programs
FULL, MARC = views.View("all", "keep"), views.View("retrieve", "merge", k=3, keep=1)
KEEP_BYTES = 1 << 30  # of the videos asked about last, as `marc_jax.archive` keeps them
SECOND_PER_GRID = 1.0  # two frames at 2 per second


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: `cap` visual tokens per frame pair, `batch` streams, at most `frames` frames of each video."""

    cap: int
    batch: int
    frames: int

    @property
    def key(self) -> str:
        return f"{self.cap}x{self.batch}"

    @property
    def sampling(self) -> Published:
        return Published(2.0, self.frames, self.cap, self.cap)


class Host:
    """What needs no device, for B streams of one video; the cores are shared among them."""

    def __init__(self, video, row: Row):
        cores = len(os.sched_getaffinity(0))
        self.video, self.row = str(video), row
        self.threads = max(1, cores // row.batch)
        self._pool = concurrent.futures.ThreadPoolExecutor(min(row.batch, cores))

    def each(self, fn, *streams) -> list:
        """fn over the streams, side by side."""
        return list(self._pool.map(fn, *streams))

    def read(self, **how) -> list[Clip]:
        """The sampled frames of every stream in the file's own size."""
        how |= {"parts": self.threads} if self.threads > 1 else {"threads": 1}
        read = functools.partial(read_frames, **how)
        return self.each(lambda _: self.row.sampling.read_full(self.video, read), range(self.row.batch))

    def read_resized(self, slots: list | None = None) -> list[Clip]:
        """The sampled frames of every stream, or those of the temporal patches `slots`, resized while decoding."""
        how = {"parts": self.threads} if self.threads > 1 else {"threads": 1}

        def one(chosen):
            rows = None if chosen is None else frame_rows(chosen)
            return self.row.sampling.read(self.video, functools.partial(read_frames, rows=rows, **how))

        return self.each(one, slots or [None] * self.row.batch)

    def look(self, side: int) -> list[Clip]:
        """The key frames that stand for every stream's sampled frames; those themselves where they are too sparse."""
        return self.read(keys_within=KEYS_WITHIN, keys_side=side)

    def events(self, clips: list[Clip]) -> list[list]:
        """Event spans of every stream in temporal patches."""

        def one(clip):
            threads, options = (self.threads, None) if clip.shown is None else (1, KEY_EVENTS)
            return events.segment(clip.frames, self.row.sampling.fps, options, threads)

        return self.each(one, clips)

    def patchify(self, clips: list[Clip], slots: list | None = None) -> tuple[list[np.ndarray], tuple[int, int]]:
        """(uint8 [S, n, 1176] of every stream, grid (h, w)): of all temporal patches, or of those in `slots`."""

        def one(clip, chosen):
            frames, size = clip.frames, self.size
            if chosen is not None:
                frames = frames[frame_rows(chosen)]
            if frames.shape[1:3] == self.size:
                return patches.frames_to_pixel_patches(frames, self.threads)
            resized = patches.resize_frames(frames, *size, threads=self.threads)
            return patches.frames_to_pixel_patches(resized, self.threads)

        done = self.each(one, clips, slots or [None] * len(clips))
        return [pixels for pixels, _ in done], done[0][1][1:]

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of a resized frame."""
        first = functools.partial(read_frames, rows=[0])
        return self.row.sampling.read(self.video, first).frames.shape[1:3]

    def bounds(self, slots) -> dict:
        """What reading is bound by: milliseconds to open the file, its key frames, pictures that must be decoded."""
        begun = time.perf_counter()
        with open_reader(self.video, threads=1) as reader:
            spent = 1e3 * (time.perf_counter() - begun)
            starts, times, info = reader.starts, reader.times, reader.info
        index = self.row.sampling.read(self.video).index
        gaps = np.diff(np.append(times[starts], info.duration))
        shown = set(starts[k] for k in np.searchsorted(starts, index, side="right") - 1)
        return {
            "open_ms": spent, "pictures": info.num_frames, "codec": f"{info.codec} {info.width}x{info.height}",
            "gap": float(gaps.mean()), "longest_gap": float(gaps.max()), "key_frames": len(shown),
            "decoded": stretches.pictures(starts, index),
            "decoded_of_chosen": stretches.pictures(starts, index[frame_rows(slots)]),
        }  # fmt: skip


def frame_rows(slots: np.ndarray) -> np.ndarray:
    """The frames of temporal patches."""
    return (patches.TEMPORAL * slots[:, None] + np.arange(patches.TEMPORAL)).ravel()


@dataclasses.dataclass(frozen=True)
class Served:
    """A packed model and the encoder that embeds events and questions, random weights both."""

    cfg: qwen25_vl.Config
    params: dict
    encoder: encoders.DualEncoder
    dtype: jnp.dtype
    attention: str
    towers: dict = dataclasses.field(default_factory=dict)  # (grid, patches) -> compiled, for all rows of a cap

    def bind(self, params):
        return qwen25_vl.bind(self.cfg, params, dtype=self.dtype, attention=self.attention)


def serve(size: str, attention: str) -> Served:
    """Qwen2.5-VL of this size beside PE-Core B/16 (tiny beside tiny), in bfloat16 on an accelerator."""
    tiny, dtype = size == "tiny", encoders.compute_dtype()
    cfg = qwen25_vl.tiny() if tiny else qwen25_vl.qwen25_vl(size)
    pe = perception_encoder.tiny() if tiny else perception_encoder.pe_core("PE-Core-B16-224")
    plain = qwen25_vl.init(cfg, jax.random.key(0), dtype)
    params = jax.block_until_ready(jax.jit(functools.partial(qwen25_vl.pack, cfg, dtype=dtype))(plain))
    words = lambda texts: np.ones((len(texts), pe.text.context), np.int32)  # noqa: E731  (there is no vocabulary)
    weights = perception_encoder.init(pe, jax.random.key(1))
    encoder = encoders.DualEncoder(pe, weights, words, fingerprint="random", chunk=64)
    return Served(cfg, params, encoder, dtype, attention)


def nbytes(tree) -> int:
    """Of all arrays, or of what their shapes say."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Streams:
    """One row, compiled; `measure` runs it."""

    def __init__(self, served: Served, video, row: Row, new: int, memory: pathlib.Path, threads: int):
        self.served, self.row, self.new = served, row, new
        self.host, self.memory = Host(video, row), memory
        served.encoder.threads = self.host.threads
        begun = time.perf_counter()
        alone = Host(video, dataclasses.replace(row, batch=1))
        clip, (looked,) = alone.read()[0], alone.look(served.encoder.side)
        self.total = len(clip.frames) // patches.TEMPORAL
        _, self.grid = self.host.patchify([clip], [np.zeros(1, np.int64)])
        self.spans = events.segment(clip.frames, row.sampling.fps)
        self._retrieved = jax.jit(functools.partial(views.retrieved, MARC))
        self.spans_of = {"one": self.spans, "keys": self.host.events([looked])[0]}
        self.slots = {}
        for size, seen in (("one", clip), ("keys", looked)):
            spans = self.spans_of[size]
            self.slots[size] = self._chosen(*self._embedded([seen] * row.batch, [spans] * row.batch), spans)[0]
        self.ways = [way for way in WAYS if way != "key frames" or looked.shown is not None]
        if looked.shown is None:
            del self.slots["keys"]
        self._compile(threads)
        self._remember(clip)
        self.compile_s = time.perf_counter() - begun

    def _compile(self, threads: int) -> None:
        """Traces all programs one after the other, each from what the one before returns; compiles side by side."""
        served, batch = self.served, self.row.batch
        n, cfg, scale = self.grid[0] * self.grid[1], served.cfg, SECOND_PER_GRID * served.cfg.tokens_per_second
        shape = jax.ShapeDtypeStruct
        how = rollout.Sampling(self.new, (-1,), 0, temperature=0.0)
        self.keys, self.prompts = rollout.rollout_keys(0, 0, jnp.arange(batch), 1), {}
        self.inputs, traced, known = {}, {}, served.towers

        def trace(name, fn, *inputs):
            self.inputs[name], traced[name] = inputs, jax.jit(fn).lower(served.params, *inputs)
            return jax.tree.map(lambda x: shape(x.shape, x.dtype), traced[name].out_info)

        tower = lambda p, x: served.bind(p).vision_features(views.normalise(x), self.grid)  # noqa: E731
        sizes = [("all", FULL, self.total, self.total)]
        sizes += [(size, MARC, len(slots), 1) for size, slots in self.slots.items()]
        for size, view, patches_s, kept in sizes:
            encode = views.make_encode(view, self.grid, scale)
            case = shapes.Case("", "", "", 0, s=kept, grid=self.grid, batch=batch)
            prompt = self.prompts[size] = shapes.prompt_of(cfg, case)
            pixels = shape((patches_s, n, cfg.vision.patch_dim), np.uint8)
            seen = shape((batch, patches_s, n, cfg.vision.hidden_size), served.dtype)
            if (self.grid, patches_s) in known:
                self.inputs[f"tower {size}"] = (pixels,)
            else:
                trace(f"tower {size}", tower, pixels)
            see = lambda p, f, q, e=encode, s=size: e(served.bind(p), self._visual(f, s), q)  # noqa: E731
            vis, prompt = trace(f"see {size}", see, seen, prompt)
            prefix = trace(f"prefill {size}", lambda p, v, q: rollout.prefill(served.bind(p), v, q), vis, prompt)
            trace(f"decode {size}", lambda p, x, keys: rollout.decode(served.bind(p), x, keys, how), prefix, self.keys)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            self.run = dict(zip(traced, pool.map(lambda one: one.compile(), traced.values()), strict=True))
        for size, _, patches_s, _ in sizes:
            self.run[f"tower {size}"] = known.setdefault((self.grid, patches_s), self.run.get(f"tower {size}"))

    def _visual(self, features_bsnc, size: str) -> views.Visual:
        """Every stream's patches: all of its video, or the chosen events'."""
        b, s = features_bsnc.shape[:2]
        slots = np.arange(self.total) if size == "all" else self.slots[size]
        starts = np.array([begin for begin, _ in self.spans_of.get(size, self.spans)])
        event = np.searchsorted(starts, slots, side="right")
        rows = lambda x, dtype: jnp.broadcast_to(jnp.asarray(x, dtype), (b, s))  # noqa: E731
        whole = jnp.full(b, self.total)
        return views.Visual(features_bsnc, jnp.ones((b, s), bool), rows(event, int), rows(slots, jnp.float32), whole)

    def _embedded(self, clips: list[Clip], spans: list) -> tuple[np.ndarray, np.ndarray]:
        """Event embeddings [B, E, D] and the questions' [B, D]."""
        one = lambda clip: encoders.embed_shown(self.served.encoder, clip.frames, clip.shown)  # noqa: E731
        frames = self.host.each(one, clips)
        rows = [[(patches.TEMPORAL * a, patches.TEMPORAL * b) for a, b in one] for one in spans]
        pooled = np.stack([encoders.pool_frames(emb, row) for emb, row in zip(frames, rows, strict=True)])
        return pooled, self._query()

    def _query(self) -> np.ndarray:
        return self.served.encoder.embed_texts(["a question"] * self.row.batch)

    def _chosen(self, emb_bed: np.ndarray, query_bd: np.ndarray, events: list) -> list[np.ndarray]:
        """Temporal patches of each stream's nearest events, in time order."""
        b, e = emb_bed.shape[:2]
        none = np.zeros((b, 1), np.int32)
        index = views.VideoIndex(none, none > 0, none, none, none, np.ones((b, e), bool), emb_bed)
        ids_bk, valid_bk = map(np.asarray, self._retrieved(index, query_bd))
        spans = [[events[i] for i in ids[valid]] for ids, valid in zip(ids_bk, valid_bk, strict=True)]
        return [np.concatenate([np.arange(a, b) for a, b in one]) for one in spans]

    def _remember(self, clip: Clip) -> None:
        """Writes the video's memory, as `marc_jax.index` leaves it."""
        pixels, _ = self.host.patchify([clip])
        features = np.asarray(self.run["tower all"](self.served.params, pixels[0]))
        emb, _ = self._embedded([clip], [self.spans])
        seconds = np.arange(self.total) * SECOND_PER_GRID
        spans = np.asarray(self.spans, np.int32)
        entry = store.MemoryEntry("", seconds, spans, SECOND_PER_GRID * spans, emb[0], features, self.grid)
        with store.MemoryWriter(self.memory, store.fingerprint(bench="efficiency")) as writer:
            writer.add("video", entry)
            self.stored = writer.bytes
        self.reader = store.MemoryReader(self.memory, None, KEEP_BYTES)
        disk = store.MemoryReader(self.memory, None)
        self.disk_ms = timing.median_ms(lambda: disk["video"], 3, wait=lambda _: None)

    # ---------------------------------------------------------------- passes

    def go(self, way: str) -> tuple[dict[str, float], jax.Array]:
        """One pass: milliseconds of every stage, each waited for; and the answers' tokens."""
        spent, at = {}, time.perf_counter()

        def lap(name, value):
            nonlocal at
            value = jax.block_until_ready(value)
            now = time.perf_counter()
            spent[name], at = spent.get(name, 0.0) + 1e3 * (now - at), now
            return value

        run, params, size = self.run, self.served.params, SIZES[way]
        if way == "warm":
            entries = lap("memory", self.host.each(self.reader.__getitem__, ["video"] * self.row.batch))
            query = lap("embed", self._query())
            slots = lap("retrieve", self._chosen(np.stack([e.event_embeddings for e in entries]), query, self.spans))
            features = np.stack([entry.tokens[rows] for entry, rows in zip(entries, slots, strict=True)])
        else:
            clips, slots = self._clips(way, lap)
            pixels, _ = lap("patchify", self.host.patchify(clips, slots if way == "cold" else None))
            features = lap("vision", jnp.stack([run[f"tower {size}"](params, x) for x in pixels]))
        if way != "uncompressed" and any(len(rows) != len(self.slots[size]) for rows in slots):
            raise RuntimeError(f"{way}: other events were chosen than when the row was compiled")
        seen = run[f"see {size}"](params, features, self.prompts[size])
        prefix = lap("prefill", run[f"prefill {size}"](params, *lap("vision" if size == "all" else "compress", seen)))
        del features, seen
        done = lap("decode", run[f"decode {size}"](params, prefix, self.keys))
        return spent, done.tokens_bgr

    def _clips(self, way: str, lap) -> tuple[list[Clip], list | None]:
        """What is read of the files when nothing is remembered, and the chosen temporal patches."""
        if way == "uncompressed":
            return lap("open + decode", self.host.read_resized()), None
        read = self.host.read if way == "cold" else functools.partial(self.host.look, self.served.encoder.side)
        clips = lap("open + decode" if way == "cold" else "look", read())
        spans = lap("events", self.host.events(clips))
        slots = lap("retrieve", self._chosen(*lap("embed", self._embedded(clips, spans)), spans[0]))
        return clips if way == "cold" else lap("open + decode", self.host.read_resized(slots)), slots

    def measure(self, repeats: int, seconds: float = float("inf")) -> dict:
        """The row: medians of `repeats` passes of each way, in turn; fewer, at least one, once `seconds` are over."""
        passes, begun = {way: [] for way in self.ways}, time.perf_counter()
        for turn in range(repeats + 1):
            said = {}
            for way in self.ways:
                spent, said[way] = self.go(way)
                if turn:
                    passes[way].append(spent)
            if turn and (time.perf_counter() - begun) * (turn + 2) / (turn + 1) > seconds:
                break
        stages = {
            way: {s: statistics.median(one[s] for one in done) for s in STAGES if s in done[0]}
            for way, done in passes.items()
        }
        totals = {way: [sum(one.values()) for one in done] for way, done in passes.items()}
        tokens = self.grid[0] * self.grid[1] // 4
        return {
            "cap": self.row.cap, "batch": self.row.batch, "new": self.new, "repeats": turn,
            "patches": self.total, "grid": self.grid, "events": {s: len(x) for s, x in self.spans_of.items()},
            "encoded": {size: len(slots) for size, slots in self.slots.items()},
            "bounds": self.host.bounds(self.slots.get("keys", self.slots["one"])),
            "visual_tokens": {way: self.total * tokens if way == "uncompressed" else tokens for way in self.ways},
            "stages": stages, "spread": {way: max(x) - min(x) for way, x in totals.items()},
            "peak_bytes": {way: self.peak(way) for way in self.ways}, "state_bytes": self.state(),
            "stored": self.stored, "disk_ms": self.disk_ms,
            "weight_bytes": nbytes(self.served.params), "compile_s": self.compile_s,
            "same_answer": bool((said["cold"] == said["warm"]).all()),
        }  # fmt: skip

    # ---------------------------------------------------------------- memory

    def state(self) -> dict:
        """Bytes of one stream that live while it answers: keys and values of prompt and answer, visual tokens."""
        text, out = self.served.cfg.text, {}
        one = text.num_layers * 2 * text.num_kv_heads * text.head_dim * jnp.dtype(self.served.dtype).itemsize
        for way, size in ((way, SIZES[way]) for way in self.ways):
            prompt = int(self.prompts[size].mask_bp[0].sum())
            visual = int((self.prompts[size].vis_index_bp[0] >= 0).sum())
            out[way] = {"kv": (prompt + self.new) * one,
                        "visual": visual * text.hidden_size * jnp.dtype(self.served.dtype).itemsize}  # fmt: skip
        return out

    def peak(self, way: str) -> int:
        """Most bytes on the device in any stage, as the compiled programs say: weights, inputs, outputs, temporaries.

        MARC's include the encoder's weights.
        """
        size = SIZES[way]
        names = [f"{stage} {size}" for stage in ("tower", "see", "prefill", "decode")[way == "warm" :]]
        held = nbytes(self.served.params) + (nbytes(self.served.encoder.params) if size != "all" else 0)
        most = 0
        for name in names:
            memory = self.run[name].memory_analysis()
            streams = self.row.batch if name.startswith("tower") else 1  # the tower's outputs are gathered
            used = nbytes(self.inputs[name]) + streams * memory.output_size_in_bytes + memory.temp_size_in_bytes
            most = max(most, used)
        return held + most
