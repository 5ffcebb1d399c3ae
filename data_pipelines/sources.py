"""Question files in Video-R1's JSON schema, files of (clip, text) pairs, the text a model is asked, and where media
files may lie.

A file is a JSON list or JSON lines of objects; every mistake is reported with its file, row and field. Media paths
come from strangers: they are resolved under one data root and may lead nowhere else.
"""

import dataclasses
import os
import stat
from collections.abc import Callable, Sequence

from data_pipelines.rows import RecordError, read_rows

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
DATA_TYPES = ("video", "image", "frame")  # frame: a folder of pictures, in MVBench only

# The wording of Video-R1 (tulerfeng/Video-R1, src/r1-v/src/open_r1/grpo.py for training, src/eval_bench.py for
# evaluation), to the letter: published checkpoints were trained and scored with exactly these characters.
TRAIN_TEMPLATE = (
    "{Question}\n"
    "Please think about this question as if you were a human pondering deeply. "
    "Engage in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', "
    "'let's break it down', etc, or other natural language thought expressions "
    "It's encouraged to include self-reflection or verification in the reasoning process. "
    "Provide your detailed reasoning between the <think> </think> tags, "
    "and then give your final answer between the <answer> </answer> tags."
)
EVAL_TEMPLATE = TRAIN_TEMPLATE.replace("<think> </think>", "<think> and </think>").replace(
    "<answer> </answer>", "<answer> and </answer>"
)
_NUMBER = " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> </answer> tags."
TYPE_SUFFIX = {
    "multiple choice": " Please provide only the single option letter (e.g., A, B, C, D, etc.) "
    "within the <answer> </answer> tags.",
    "numerical": _NUMBER,
    "OCR": " Please transcribe text from the image/video clearly and provide your text answer "
    "within the <answer> </answer> tags.",
    "free-form": " Please provide your text answer within the <answer> </answer> tags.",
    "regression": _NUMBER,
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One question about one video or image, as in Video-R1-260k.json.

    `solution` is the answer wrapped as `<answer>X</answer>`; `options` carry their letters ("A. ..."); `process` is the
    worked reasoning of an SFT row; `path` is relative to the data root; `extra` holds every other field of the row,
    `row` its place in the file from 0 and `line` the one it starts on from 1, where it has one.
    """

    problem_id: int | str
    problem: str
    data_type: str
    problem_type: str
    options: tuple[str, ...]
    solution: str
    path: str
    data_source: str = ""
    process: str = ""
    extra: dict = dataclasses.field(default_factory=dict)
    row: int = -1
    line: int | None = None

    @property
    def target(self) -> str:
        """What SFT learns to say: the worked reasoning where there is one, and the solution."""
        return f"{self.process}\n{self.solution}" if self.process else self.solution


_FIELDS = {field.name for field in dataclasses.fields(Record)} - {"extra", "row", "line"}


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_record(raw, file, row: int, line: int | None = None) -> Record:
    """Checks one decoded JSON object; RecordError names the first wrong field."""

    def wrong(field, reason):
        return RecordError(file, row, field, reason, line)

    if not isinstance(raw, dict):
        raise wrong(None, f"is {type(raw).__name__}, not an object")

    def text(name, default=None, allowed=None):
        value = raw.get(name, default)
        if value is None:
            if default is not None:
                return default
            raise wrong(name, "is missing")
        if not isinstance(value, str):
            raise wrong(name, f"is {_shown(value)}, not a text")
        if default is None and not value.strip():
            raise wrong(name, "is empty")
        if allowed and value not in allowed:
            raise wrong(name, f"is {_shown(value)}, not one of {', '.join(allowed)}")
        return value

    number = raw.get("problem_id", row)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise wrong("problem_id", f"is {_shown(number)}, not a number or a text")
    options = raw.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise wrong("options", f"is {_shown(options)}, not a list of texts")
    problem_type = text("problem_type", allowed=PROBLEM_TYPES)
    if problem_type == "multiple choice" and len(options) < 2:
        raise wrong("options", f"holds {len(options)} of a multiple choice question, fewer than 2")
    return Record(
        problem_id=number,
        problem=text("problem"),
        data_type=text("data_type", allowed=DATA_TYPES),
        problem_type=problem_type,
        options=tuple(options),
        solution=text("solution"),
        path=text("path"),
        data_source=text("data_source", ""),
        process=text("process", ""),
        extra={name: value for name, value in raw.items() if name not in _FIELDS},
        row=row,
        line=line,
    )


@dataclasses.dataclass(frozen=True)
class Pair:
    """A clip and a text that says what it shows, one object of a file of pairs:

        {"path": "videos/a.mp4", "text": "a red car turns left", "start": 3.0, "end": 7.5}

    `path` is relative to the data root; `start` and `end` are seconds of the video, its beginning and its end where
    they are left out; `row` is the place in the file. Other fields are ignored.
    """

    path: str
    text: str
    start: float | None = None
    end: float | None = None
    row: int = -1


def parse_pair(raw, file, row: int, line: int | None = None) -> Pair:
    """Checks one decoded JSON object; RecordError names the first wrong field."""

    def wrong(field, reason) -> RecordError:
        return RecordError(file, row, field, reason, line)

    if not isinstance(raw, dict):
        raise wrong(None, f"is {type(raw).__name__}, not an object")
    for name in ("path", "text"):
        if not isinstance(raw.get(name), str) or not raw[name].strip():
            raise wrong(name, f"is {_shown(raw[name])}, not a text" if name in raw else "is missing")
    times = raw.get("start"), raw.get("end")
    for name, value in zip(("start", "end"), times, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise wrong(name, f"is {_shown(value)}, not a number of seconds")
    if None not in times and times[0] >= times[1]:
        raise wrong("end", f"is {times[1]}, not after the start {times[0]}")
    return Pair(raw["path"], raw["text"], *times, row)


def load_pairs(file, *, errors: list | None = None) -> list[Pair]:
    """Reads a file of (clip, text) pairs; `errors` as for `load_records`."""
    return _load(file, parse_pair, errors)


def load_records(file, *, errors: list | None = None) -> list[Record]:
    """Reads a question file (JSON list, JSON lines, CSV or Parquet), or the "train" split of a `video_r1` set's folder.

    With `errors` given, a RecordError of each bad row is appended to it and the row is left out (`Record.row` keeps
    the numbering of the file); otherwise the first one is raised. A file that cannot be parsed at all always raises.
    """
    if os.path.isdir(file):
        from data_pipelines.video_r1.read import Stored  # which knows this module

        try:
            return list(Stored(file))
        except ValueError as error:
            raise RecordError(file, None, None, str(error)) from None
    return _load(file, parse_record, errors)


def _load(file, parse: Callable, errors: list | None) -> list:
    records = []
    for row, line, raw in read_rows(file):
        try:
            if isinstance(raw, RecordError):
                raise raw
            records.append(parse(raw, file, row, line))
        except RecordError as error:
            if errors is None:
                raise
            errors.append(error)
    if not records and not errors:
        raise RecordError(file, None, None, "holds no rows")
    return records


def confined_path(root, path: str) -> str:
    """The absolute path that a record's `path` means inside `root`, links resolved, whether it exists or not.

    Video-R1 writes "./folder/file.mp4", meaning from the data root. ValueError with the reason for anything that is
    absolute, climbs out, follows a link out or names a protocol.
    """
    if "\0" in path:
        raise ValueError("the path holds a NUL character")
    if not path.strip():
        raise ValueError("the path is empty")
    if os.path.isabs(path) or path.startswith(("~", "\\")):
        raise ValueError(f"{path} is not relative to the data root")
    if "://" in path:
        raise ValueError(f"{path} is a URL, not a file under the data root")
    base = os.path.realpath(root)
    full = os.path.realpath(os.path.join(base, path))
    if full == base or os.path.commonpath([base, full]) != base:
        raise ValueError(f"{path} leads out of the data root")
    return full


def media_path(root, path: str) -> str:
    """The `confined_path` of a record's medium, which must be an existing regular file; ValueError with the reason."""
    full = confined_path(root, path)
    try:
        mode = os.stat(full).st_mode
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path} {reason} under the data root {os.path.realpath(root)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")
    return full


def question_text(problem: str, problem_type: str, options: Sequence[str] = (), style: str = "train") -> str:
    """The text of the user's turn.

    Styles: "train" and "eval" are Video-R1's two wordings, with options glued on as it glues them; "glued" is the
    problem and its options in that way, and nothing else (the synthetic set's); "plain" has them all on lines.
    """
    if problem_type not in TYPE_SUFFIX:
        raise ValueError(f"problem_type {problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}")
    choices = options if problem_type == "multiple choice" else ()
    if style == "plain":
        return "\n".join([problem, *choices])
    if style not in ("train", "eval", "glued"):
        raise ValueError(f"style {style!r} is not one of train, eval, glued, plain")
    if choices:
        problem = problem + "Options:\n" + "".join(option + "\n" for option in choices)
    if style == "glued":
        return problem.removesuffix("\n") if choices else problem
    template = TRAIN_TEMPLATE if style == "train" else EVAL_TEMPLATE
    return template.replace("{Question}", problem) + TYPE_SUFFIX[problem_type]
