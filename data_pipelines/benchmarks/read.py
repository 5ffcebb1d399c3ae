"""A benchmark's annotations as records, and which rows cannot be used.

    questions = read("videomme", "eval_videomme.json", root="/data/videos")
    questions.records        list[sources.Record]; record.extra["question_type"], ["duration"], ["published"]
    questions.total          rows in the files, those that cannot be used included

Files come in the published form (`published`) or in Video-R1's evaluation schema, told apart by their first row. A row
that cannot be used (no options, an id met twice, an unknown type, bytes that are not UTF-8, a video that is absent or
outside the data root) stops the reading with the list of all of them; `skip_bad` leaves them out and counts them.
"""

import dataclasses
import os
from pathlib import Path

from data_pipelines import sources
from data_pipelines.benchmarks import published
from data_pipelines.rows import RecordError, nested, read_rows

_SHOWN = 20
# Benchmark: (published form, levels of a file that is one JSON object).
FORMS = {
    "vsibench": (published.vsibench, 0),
    "videommmu": (published.videommmu, 2),
    "mmvu": (published.mmvu, 0),
    "mvbench": (published.mvbench, 0),
    "tempcompass": (published.tempcompass, 3),
    "videomme": (published.videomme, 0),
    "nextqa": (published.nextqa, 0),
    "qvhighlights": (published.qvhighlights, 0),
}
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_NO_ROOT = os.path.join(os.sep, "no data root")


class BadRows(ValueError):
    """Rows of a benchmark's files that cannot be used: .errors, all of them, .total rows there."""

    def __init__(self, benchmark: str, errors: list[RecordError], total: int):
        self.errors, self.total = errors, total
        lines = [f"{benchmark}: {len(errors)} of {total} rows cannot be used (--skip_bad leaves them out)"]
        lines += [f"  {error}" for error in errors[:_SHOWN]]
        lines += [f"  and {len(errors) - _SHOWN} more"] * (len(errors) > _SHOWN)
        super().__init__("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Questions:
    """A benchmark's questions in the order of its files: the usable ones, why the others are not, rows in all."""

    benchmark: str
    records: list[sources.Record]
    errors: list[RecordError]
    total: int


def read(benchmark: str, file, *, root=None, skip_bad: bool = False) -> Questions:
    """Reads a benchmark's annotation file, or all of a folder (MVBench, TempCompass and VideoMMMU have several).

    Args:
      benchmark: one of FORMS.
      root: folder of the videos; with it, every record's `path` is a file there. None: media are not looked at, but a
        path that would lead out of any root is refused.
      skip_bad: leave rows that cannot be used out instead of stopping.
    Raises:
      BadRows: see above. RecordError: a file that cannot be read at all. ValueError: an unknown benchmark.
    """
    if benchmark not in FORMS:
        raise ValueError(f"benchmark {benchmark!r} is not one of {', '.join(FORMS)}")
    files = _files(Path(file))
    if not files:
        raise RecordError(file, None, None, f"holds no file ending in {', '.join(_SUFFIXES)}")
    records, errors, total = [], [], 0
    for one in files:
        for found in _file(benchmark, one):
            total += 1
            (errors if isinstance(found, RecordError) else records).append(found)
    records = [_found(record, root, errors) for record in _once(records, errors)]
    records = [record for record in records if record is not None]
    if not records and not errors:
        raise RecordError(file, None, None, "holds no rows")
    errors.sort(key=lambda error: (error.file, error.row))
    if errors and not skip_bad:
        raise BadRows(benchmark, errors, total)
    return Questions(benchmark, records, errors, total)


def _files(place: Path) -> list[Path]:
    """The file itself, or those of a folder; Parquet also in the folders in it, one for each task."""
    if not place.is_dir():
        return [place]
    found = [f for f in place.iterdir() if f.suffix in _SUFFIXES and f.stem != "meta_info"]  # TempCompass' is no task
    return sorted([*found, *place.glob("*/*.parquet")])


@dataclasses.dataclass(frozen=True)
class _Origin(sources.Record):
    """A record that still knows its file."""

    file: str = ""


def _file(benchmark: str, file: Path):
    form, depth = FORMS[benchmark]
    name, video_r1 = file.parent.name if file.suffix == ".parquet" else file.stem, None
    for row, line, keys, value in _rows(file, depth):
        if isinstance(value, RecordError):
            yield value
            continue
        if not isinstance(value, dict):
            yield RecordError(file, row, None, f"is {type(value).__name__}, not an object", line)
            continue
        if video_r1 is None:
            video_r1 = "problem_type" in value and "solution" in value and benchmark != "qvhighlights"
        try:
            raw = _video_r1(benchmark, value) if video_r1 else form(value, name, keys)
            yield _parsed(benchmark, raw, file, row, line)
        except published.Wrong as error:
            yield RecordError(file, row, error.field, error.reason, line)
        except RecordError as error:
            yield error
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # values of kinds nobody thought of
            yield RecordError(file, row, None, f"is no row of {benchmark} ({error})", line)


def _parsed(benchmark: str, raw: dict, file: Path, row: int, line: int | None) -> _Origin:
    kind = raw.get("problem_type")
    if kind == "moment retrieval":  # the one type that is no question with an answer in words
        raw = raw | {"problem_type": "free-form"}
    record = sources.parse_record(raw, file, row, line)
    if "published" not in record.extra:
        fields = vars(record) | record.extra
        record.extra["published"] = published.of_video_r1(benchmark, fields, raw["question_type"])
        if "task" in record.extra["published"]:
            record.extra["task"] = record.extra["published"]["task"]
    return _Origin(**vars(record) | {"problem_type": kind}, file=os.fspath(file))


def _rows(file: Path, depth: int):
    """(row, line, keys, value): of a list or of lines, the only key is the row."""
    if depth and file.suffix == ".json":
        with open(file, "rb") as handle:
            head = handle.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head[:1] == b"{":
            yield from nested(file, depth)
            return
    for row, line, value in read_rows(file):
        yield row, line, (row,), value


def _video_r1(benchmark: str, row: dict) -> dict:
    """A row of Video-R1's evaluation schema with the fields that breakdowns go by."""
    number, path = row.get("problem_id"), str(row.get("path") or "")
    number = number if isinstance(number, int) else None
    kind = row.get("original_question_type") or row.get("problem_type") or ""
    if benchmark == "mvbench" and number is not None:  # 20 tasks of 200 questions, in alphabetical order
        kind = (list(published.MVBENCH)[(number - 1) // 200 :] or [""])[0]
    elif benchmark == "videommmu" and number is not None:
        kind = (["Adaptation", "Comprehension", "Perception"][(number - 1) // 300 :] or [""])[0]
    elif benchmark == "mmvu":
        kind = path.split("/")[-2].replace("_", " ") if "/" in path else ""
    kind = row.get("task_type") or row.get("dim") or kind
    for name, value in (("question_type", kind), *((n, row.get(n) or "") for n in ("duration", "video_id"))):
        if not isinstance(value, str):
            raise published.Wrong(name, f"is {value!r:.60}, not a text")
    solution, options = str(row.get("solution")).strip(), row.get("options") or []
    if not (solution.startswith("<answer>") and solution.endswith("</answer>")):
        raise published.Wrong("solution", f"is {solution!r:.60}, not <answer>...</answer>")
    if row.get("problem_type") == "multiple choice":
        _check_letter(solution, options)
    paths = (path, path.removesuffix(".mp4")) if row.get("data_type") == "frame" else (path,)
    return {**row, "question_type": kind, "duration": row.get("duration") or "", "paths": paths}


def _check_letter(solution: str, options) -> None:
    """Wrong unless a choice's solution is the letter of one of its options."""
    if not isinstance(options, list) or len(options) < 2:
        return  # `parse_record` says so
    if blank := [option for option in options if not str(option).strip()]:
        raise published.Wrong("options", f"holds {blank[0]!r}, an option without text")
    letter = published.unwrapped(solution)
    own = dict(zip(published.LETTERS, map(str, options), strict=False)).get(letter)
    if own is None or not own.startswith(letter):
        raise published.Wrong("solution", f"is {letter!r:.40}, the letter of none of the {len(options)} options")


def _once(records: list[_Origin], errors: list[RecordError]):
    """The records, without those whose id an earlier one has."""
    first: dict = {}
    for record in records:
        other = first.setdefault(record.problem_id, record)
        if other is record:
            yield record
            continue
        where = f"line {other.line}" if other.line else f"row {other.row}"
        where += f" of {other.file}" if other.file != record.file else ""
        reason = f"is {record.problem_id!r}, the id of {where} too"
        errors.append(RecordError(record.file, record.row, "problem_id", reason, record.line))


def _found(record: _Origin, root, errors: list[RecordError]) -> sources.Record | None:
    """The record with the path at which its video lies."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(sources.Record)}
    extra = dict(record.extra)
    reasons = []
    for path in extra.pop("paths"):
        try:
            _check(path, record.data_type, root)
            return sources.Record(**fields | {"path": path, "extra": extra})
        except ValueError as error:
            reasons.append(str(error))
    errors.append(RecordError(record.file, record.row, "path", reasons[0], record.line))
    return None


def _check(path: str, data_type: str, root) -> None:
    """ValueError unless the medium is there, inside the root; "frame" is a folder of pictures, or a file of them."""
    if root is None:
        sources.confined_path(_NO_ROOT, path)
    elif data_type != "frame" or not os.path.isdir(sources.confined_path(root, path)):
        sources.media_path(root, path)
