"""Two video decoders behind one reader: PyAV first, OpenCV `grab` second.

A reader knows, before any picture is decoded, how many frames a file has and when each one is shown: PyAV reads all
packets of the video stream once (about 10 microseconds each) and keeps them, so files without a frame count, with
variable frame rate or with an offset start need no special rule. Decoding is then one forward pass over the packets,
which leaves out those between a wanted frame and the key frame before the next one: nothing is decoded twice, and the
container's own seeking, wrong in several formats, is not needed.

A file that holds fewer frames than it announces, or whose decoding fails in the middle, is an error, never a shorter
clip.
"""

import bisect
import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines.containers import DEFAULT_LIMITS, MOV, Limits, VideoError, check_file
from data_pipelines.opencv_reader import OpenCVReader
from data_pipelines.reader import ANNOUNCES, Reader, quarter_turns

# Damage is an error, not a picture patched from its neighbours; checksums are compared where a format has them.
_STRICT = "crccheck+bitstream+buffer+explode"
_KEEP_PACKETS_BELOW = 256 << 20  # bytes of file whose packets stay in memory between scanning and decoding
_WORTH_A_JUMP = 16  # packets that decoding threads get through while they would be emptied and filled again
_NO_PROBING = {"probesize": "32", "skip_frame": "all"}  # the latter is for the decoder that probes alone


class PyAVReader(Reader):
    """FFmpeg through PyAV. One thread for small pictures: starting threads costs more than decoding them."""

    def __init__(self, path, limits: Limits = DEFAULT_LIMITS, threads: int | None = None):
        super().__init__(path, limits)
        import av  # a tenth of a second, only paid where a video is opened; its logging stays off: it can deadlock

        self._av, self._threads, self._containers = av, threads, []
        self._full, size, self._demuxers = check_file(path)
        try:
            self._container, self._stream = self._open()
            self._depth = self._found_by_probing(self._stream.codec_context)
            self._scan(keep=size <= _KEEP_PACKETS_BELOW)
            self._start()
            self._describe()
        except BaseException:
            self.close()
            raise

    def close(self):
        self._pass = self._first = self._packets = None
        for container in self._containers:
            container.close()

    def fork(self, threads: int | None) -> "PyAVReader":
        """Another reader of this file, to decode beside this one: what is known of the file is not read again."""
        if self._packets is None:
            return PyAVReader(self.path, self.limits, threads)
        other = copy.copy(self)
        other._threads, other._containers, other._pass, other._first = threads, [], None, None
        other._container, other._stream = other._open(probe=self._depth is None)
        return other

    def facts(self) -> "PyAVReader":
        """What is known of the file, to be forked later: nothing is open, the time to decode begins anew."""
        other = super().facts()
        other._containers, other._pass, other._first, other._container, other._stream = [], None, None, None, None
        return other

    def _found_by_probing(self, context) -> int | None:
        """How many pictures the decoder is told to hold back, where that is all that it does not find itself.

        So it is of H.264 in a container with headers, of which seven to twenty pictures are probed to find it.
        """
        told = self._demuxers in (MOV, "matroska,webm") and context.name == "h264" and context.extradata
        return getattr(context, "reorder_depth", None) if told else None  # PyAV 16 and 17 do not say

    def _open(self, probe: bool = True):
        """Container and stream; without `probe` of a file that is known, to decode packets of another container."""
        options = {"protocol_whitelist": "file", "format_whitelist": self._demuxers, "err_detect": _STRICT}
        options |= {} if probe else _NO_PROBING
        try:
            container = self._av.open(self._full, options=options)
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise VideoError(self.path, f"cannot be opened as video ({_text(error)})") from None
        self._containers.append(container)
        if not container.streams.video:
            kinds = sorted({s.type for s in container.streams}) or ["nothing"]
            raise VideoError(self.path, f"no video stream (the file holds {', '.join(kinds)})")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise VideoError(self.path, "no decoder for its video codec")
        small = context.width * context.height <= 512 * 512
        threads = (1 if small else 0) if self._threads is None else self._threads
        self._check_size(context.width, context.height)
        context.options = {"err_detect": _STRICT, "max_pixels": str(self.limits.max_pixels)}
        context.thread_count, context.thread_type = threads, "NONE" if threads == 1 else "AUTO"
        if not probe:
            context.reorder_depth = self._depth
        return container, stream

    def _scan(self, keep: bool):
        """Reads every packet once: how many frames there are, when they are shown, whether the file is whole."""
        stream, packets, pts, place = self._stream, [], [], -1
        self._keys = []  # (pts, number of the packet) where decoding can begin
        vp8 = stream.codec_context.name in ("vp8", "libvpx")
        self._mid_start, cut = None, 0
        try:
            for packet in self._container.demux(stream):
                if packet.size == 0:
                    continue
                place += 1
                if self._mid_start is None:
                    self._mid_start = not packet.is_keyframe
                if keep:
                    packets.append(packet)
                # Packets that show nothing: cut away by an edit list, or VP8 references with show_frame off.
                if packet.is_discard or (vp8 and not memoryview(packet)[0] & 0x10):
                    cut += 1
                    continue
                if packet.is_keyframe:
                    self._keys.append((packet.pts, place))
                pts.append(packet.pts)
                if len(pts) > self.limits.max_frames:
                    break
        except self._av.FFmpegError as error:
            raise VideoError(self.path, f"damaged: reading stopped after {len(pts)} packets ({_text(error)})") from None
        self._check_count(len(pts))
        announced = stream.frames if self._demuxers in ANNOUNCES else 0
        if len(pts) < announced - cut:
            raise VideoError(self.path, f"truncated: announces {announced} frames, holds {len(pts)}")
        self._packets, self._count, self._ticks = packets if keep else None, len(pts), None
        if self._demuxers != "avi" and None not in pts and len(set(pts)) == len(pts):  # AVI stores decoding order
            self._ticks = sorted(pts)
            # Pictures before the first in decoding order refer to what the file does not hold.
            self._mid_start |= pts[0] != self._ticks[0]

    def _start(self):
        """Decodes up to the first frame, which tells the true picture size, the rotation and where pictures begin."""
        self._pass = self._begin()
        self._first = next(self._pass, None)
        if self._first is None:
            raise VideoError(self.path, f"none of its {self._count} frames can be decoded")
        if self._mid_start and self._ticks:
            self._drop_head()

    def _drop_head(self):
        """A broadcast recording begins between key frames: its first pictures refer to ones that are not there and
        decode to nothing. Those (up to the deepest reordering, 16, after the first good one) do not count."""
        first, seen = self._first, set()
        after = bisect.bisect_left(self._ticks, first.pts) + 17
        for frame in itertools.chain([first], self._pass):
            if frame.pts in self._ticks[after:]:
                break
            seen.add(frame.pts)
        self._ticks = [tick for tick in self._ticks[:after] if tick in seen] + self._ticks[after:]
        self._count = len(self._ticks)
        self._pass = self._begin()
        self._first = next(self._pass)

    def _describe(self):
        stream, first = self._stream, self._first
        if self._ticks:
            rate = stream.average_rate
            times = (np.asarray(self._ticks, np.int64) - self._ticks[0]) * float(stream.time_base)
        else:
            rate = (stream.average_rate if self._demuxers == "avi" else None) or stream.guessed_rate or 25
            times = np.arange(self._count) / float(rate)
        turns = quarter_turns(first.rotation)
        self._finish(first.width, first.height, times, float(rate or 0), stream.codec_context.name, turns)

    def _begin(self) -> "_Pass":
        if self._packets is not None:
            self._stream.codec_context.flush_buffers()
            return _Pass(self, self._stream.codec_context, iter(self._packets))
        container, stream = self._open()
        return _Pass(self, stream.codec_context, (packet for packet in container.demux(stream) if packet.size))

    def _entries(self, ordinal: dict | None) -> list[tuple[int, int, int | None]]:
        """(frame, number of its packet, pts) at which decoding can begin; none where that cannot be told."""
        if ordinal:
            return sorted((ordinal[tick], place, tick) for tick, place in self._keys if tick in ordinal)
        # Without usable timestamps: only if every packet is a picture of its own.
        alone = len(self._keys) == self._count and self._keys[-1][1] == self._count - 1
        return [(k, k, None) for k in range(self._count)] if alone else []

    @property
    def starts(self) -> list[int]:
        """Frames, increasing, at which decoding can begin without those before them."""
        return [frame for frame, *_ in self._entries(self._ordinal())] or [0]

    def _ordinal(self) -> dict | None:
        return {tick: k for k, tick in enumerate(self._ticks)} if self._ticks else None

    def decode(self, indices) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, uint8 [H, W, 3] RGB, rotated) for the increasing `indices`, in one forward pass."""
        to_rgb = self._converter()
        for found, frame in self._find([int(i) for i in indices]):
            yield found, to_rgb(frame)

    def decode_starts(self, indices) -> Iterator[tuple[int, np.ndarray]]:
        """`decode` of frames that are all among `starts`: of no packet but theirs, where the decoder can do that."""
        indices, to_rgb, context = [int(i) for i in indices], self._converter(), self._stream.codec_context
        places = {frame: rest for frame, *rest in self._entries(self._ordinal())}
        self._pass = self._first = None  # the decoder is emptied
        for n, index in enumerate(indices):
            try:
                frame = self._alone(context, *places[index])
            except (KeyError, self._av.FFmpegError):
                frame = None
            if frame is None:
                yield from self.decode(indices[n:])
                return
            self._check_clock()
            yield index, to_rgb(frame)

    def _alone(self, context, place: int, tick: int | None):
        """The key frame of one packet, or None where another picture comes out, or a damaged one."""
        if self._packets is None:
            return None
        context.flush_buffers()
        for frame in [*context.decode(self._packets[place]), *context.decode(None)]:
            if frame.key_frame and tick in (None, frame.pts) and not frame.is_corrupt:
                return frame
        return None

    def _converter(self) -> Callable:
        """frame -> uint8 [H, W, 3] RGB, upright."""
        from av.video.reformatter import VideoReformatter

        to_rgb = VideoReformatter().reformat
        turned = self._turns % 2
        width, height = (self.info.height, self.info.width) if turned else (self.info.width, self.info.height)
        # One conversion thread: with more, a 56x56 picture spends its time waking them.
        size = {"width": width, "height": height, "format": "rgb24", "threads": 1}
        return lambda frame: self._rotate(to_rgb(frame, **size).to_ndarray())

    def _find(self, wanted: list[int]) -> Iterator:
        """(index, frame) of the wanted ones; VideoError at the first that cannot be had."""
        ordinal = self._ordinal()
        entries = self._entries(ordinal)
        run, first = self._pass, self._first
        self._pass = self._first = None
        if run is None:  # a fork, or a second call: start again
            run = self._begin()
            run.end(self._enough(entries, wanted[-1]) if wanted else None)
        place = 0
        try:
            for found, frame in self._pick(run, first, wanted, ordinal, entries):
                yield found, frame
                place += 1
        except VideoError:
            if not run.skipped:
                raise
            # What claimed to be a key frame was none, or pictures after it refer to some before it.
            yield from self._pick(self._begin(), None, wanted[place:], ordinal, [])

    def _enough(self, entries: list, last: int) -> int | None:
        """Packets up to which frame `last` is whole: before the next key frame, if all that follow are shown after it.

        Decoding threads would go on to that key frame, which takes as long as ten other pictures.
        """
        after = bisect.bisect_right(entries, last, key=lambda entry: entry[0])
        if self._packets is None or after == len(entries):
            return None
        _, place, tick = entries[after]
        group = self._packets[place : entries[after + 1][1] if after + 1 < len(entries) else None]
        closed = tick is None or all(packet.pts is None or packet.pts >= tick for packet in group)
        return place if closed else None

    def _pick(self, run: "_Pass", frame, wanted: list[int], ordinal: dict | None, entries: list) -> Iterator:
        place, found = 0, -1
        while place < len(wanted):
            at = bisect.bisect_right(entries, wanted[place], key=lambda entry: entry[0]) - 1
            if at >= 0 and run.worth(entries[at][1]) and entries[at][0] > found:
                run.jump(*entries[at][1:])
                frame, found = None, entries[at][0] - 1
            frame = frame or next(run, None)
            if frame is None:
                break
            found = ordinal.get(frame.pts, found) if ordinal else found + 1
            if found > wanted[place]:
                break
            if found == wanted[place]:
                yield found, frame
                place += 1
            frame = None
        if place < len(wanted):
            reason = f"damaged: {run.decoded} of {self._count} frames decoded, frame {wanted[place] + 1} is missing"
            raise VideoError(self.path, reason)


class _Pass:
    """Frames of a stream's packets in one forward pass; `decoded` and `skipped` count frames and packets."""

    def __init__(self, reader: PyAVReader, context, packets: Iterator):
        self._reader, self._context, self._packets = reader, context, packets
        self._fed = self.decoded = self.skipped = 0
        self._frames = self._run(None)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._frames)

    def end(self, place: int | None) -> None:
        """Takes no packet from `place` on; before the first frame is asked for."""
        self._packets = itertools.islice(self._packets, place)

    def worth(self, place: int) -> bool:
        """Whether leaving out the packets before this one saves more than emptying the decoder costs."""
        return place - self._fed >= (1 if self._context.thread_count == 1 else _WORTH_A_JUMP)

    def jump(self, place: int, tick: int | None) -> None:
        """Goes on at packet `place`, a key frame; the first picture is its own, or a VideoError says that it is not."""
        self._context.flush_buffers()
        self.skipped += place - self._fed
        for _ in itertools.islice(self._packets, place - self._fed):
            self._reader._check_clock()
        self._fed = place
        self._frames = self._after(tick)

    def _after(self, tick: int | None) -> Iterator:
        for n, frame in enumerate(self._run(tick)):
            if n == 0 and not (frame.key_frame and tick in (None, frame.pts)):
                raise VideoError(self._reader.path, "damaged: a key frame is none")
            yield frame

    def _run(self, since: int | None) -> Iterator:
        """Pictures shown before `since` refer to what was left out: they are not decoded."""
        reader, count = self._reader, self._reader._count
        try:
            for packet in itertools.chain(self._packets, [None]):
                self._fed += packet is not None
                if packet is not None and since is not None and packet.pts is not None and packet.pts < since:
                    continue
                for frame in self._context.decode(packet):
                    self.decoded += 1
                    if frame.is_corrupt:
                        raise VideoError(reader.path, f"damaged: frame {self.decoded} of {count} is corrupt")
                    yield frame
                reader._check_clock()
        except reader._av.FFmpegError as error:
            reason = f"damaged: {self.decoded} of {count} frames decoded, then {_text(error)}"
            raise VideoError(reader.path, reason) from None


def _text(error) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def open_reader(path, backend: str = "auto", limits: Limits = DEFAULT_LIMITS, threads: int | None = None) -> Reader:
    """The reader of a file. `auto` is PyAV, or OpenCV where PyAV is not installed; VideoError if it is no video."""
    if backend not in ("auto", "pyav", "opencv"):
        raise ValueError(f"backend {backend!r} is not one of auto, pyav, opencv")
    if backend == "auto":
        try:
            import av  # noqa: F401
        except ImportError:
            backend = "opencv"
    return (OpenCVReader if backend == "opencv" else PyAVReader)(path, limits, threads)
