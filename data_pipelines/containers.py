"""What a video file is, before anything decodes it: its errors, its limits, and whether its first bytes are a video's.

Files are not trusted. The first bytes must be those of a known container, only demuxers of that container may open
the file and only the `file` protocol may be used, so a playlist named `clip.mp4` opens nothing.
"""

import dataclasses
import hashlib
import os
import stat


class VideoError(Exception):
    """A video (or image) file that cannot be used; `str` is "<path>: <reason>"."""

    def __init__(self, path, reason: str):
        self.path, self.reason = os.fspath(path), " ".join(str(reason).split())
        super().__init__(self.path, self.reason)

    def __str__(self):
        return f"{self.path}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says about itself. Width and height are as shown, after rotation; fps is the average rate [1/s];
    duration in seconds; rotation in degrees counter-clockwise, already applied to decoded frames."""

    width: int
    height: int
    fps: float
    num_frames: int
    duration: float
    codec: str
    rotation: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Refuse what would take the machine down. Pixels per frame, seconds and frames per file, bytes of one decoded
    clip, seconds of wall clock spent on one file."""

    max_pixels: int = 50_000_000
    max_seconds: float = 6 * 3600.0
    max_frames: int = 1_000_000
    max_bytes: int = 8 << 30
    decode_seconds: float = 1800.0


DEFAULT_LIMITS = Limits()
MOV = "mov,mp4,m4a,3gp,3g2,mj2"


def sniff(path, head: bytes) -> str:
    """The FFmpeg demuxers (a comma-separated whitelist) for a file that begins with `head`; VideoError if none."""
    if len(head) == 0:
        raise VideoError(path, "the file is empty")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot"):
        return MOV
    starts = {
        b"\x1aE\xdf\xa3": "matroska,webm",
        b"GIF87a": "gif",
        b"GIF89a": "gif",
        b"\x00\x00\x01\xba": "mpeg",
        b"\x00\x00\x01\xb3": "mpegvideo",
        b"\x00\x00\x00\x01": "hevc,h264",
        b"\x00\x00\x01": "hevc,h264,m4v",
        b"FLV\x01": "flv",
        b"OggS": "ogg",
        b"0&\xb2u\x8ef\xcf\x11": "asf",
    }
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for magic, demuxers in starts.items():
        if head.startswith(magic):
            return demuxers
    for first, step in ((0, 188), (4, 192), (0, 204)):
        sync = head[first::step][:4]
        if len(sync) >= 2 and set(sync) == {0x47}:
            return "mpegts"
    if not set(head) - set(range(32, 127)) - set(b"\t\n\r\f"):
        raise VideoError(path, "a text file, not a video")
    raise VideoError(path, "not a video file (no known container starts with these bytes)")


def _announced_size(head: bytes, demuxers: str) -> int:
    """Bytes a Matroska segment or an AVI's first RIFF chunk says the file has at least; 0 where it does not say."""
    if demuxers == "avi":
        return 8 + int.from_bytes(head[4:8], "little")
    if demuxers != "matroska,webm":
        return 0
    at = 4
    for skip_body in (True, False):  # the EBML header, then the segment that is everything else
        length = 9 - head[at].bit_length() if at < len(head) and head[at] else 0
        size = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        if not length or size == (1 << 7 * length) - 1:
            return 0
        at += length + size
        if skip_body:
            if head[at : at + 4] != b"\x18S\x80g":
                return 0
            at += 4
    return at


def check_file(path) -> tuple[str, int, str]:
    """Absolute path, size in bytes and demuxer whitelist of an existing regular file that begins like a video."""
    if "\0" in os.fspath(path):
        raise VideoError(path, "the path holds a NUL character")
    full = os.path.abspath(path)
    try:
        status = os.stat(full)
        if stat.S_ISDIR(status.st_mode):
            raise VideoError(path, "a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise VideoError(path, "not a regular file")
        with open(full, "rb") as file:
            head = file.read(1024)
            file.seek(max(0, status.st_size - 64))
            tail = file.read(64)
    except FileNotFoundError:
        raise VideoError(path, "no such file") from None
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from None
    demuxers = sniff(path, head)
    announced = _announced_size(head, demuxers)
    if status.st_size < announced:
        raise VideoError(path, f"truncated: {status.st_size} of at least {announced} bytes")
    if demuxers == "gif" and not tail.rstrip(b"\0\r\n").endswith(b";"):
        raise VideoError(path, "truncated: the GIF has no end mark")
    return full, status.st_size, demuxers


def check_sha256(path, expected: str) -> None:
    """VideoError if the file's content is not the one with this hash (hexadecimal), or cannot be read."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from None
    if found != expected.lower():
        raise VideoError(path, f"its content has changed: sha256 {found[:12]}..., expected {expected[:12]}...")
