"""Rows of a data file with the lines they stand on: JSON list, JSON lines, nested JSON objects, CSV, Parquet.

A row that cannot be used is a `RecordError` in its place, so that the rows behind it keep their numbers.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_RAW_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not UTF-8
_DECODER = json.JSONDecoder()


class RecordError(ValueError):
    """A row that cannot be used: .file, .row (from 0; None for the whole file), .line (from 1), .field, .reason."""

    def __init__(self, file, row: int | None, field: str | None, reason: str, line: int | None = None):
        self.file, self.row, self.field, self.reason, self.line = os.fspath(file), row, field, reason, line
        super().__init__(self.file, row, field, reason)

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        where += f", field {self.field!r}" if self.field else ""
        return f"{self.file}{where}: {self.reason}" + ("" if self.line is None else f" (line {self.line})")


def read_text(file) -> str:
    """A file as text. Bytes that are not UTF-8 become lone surrogates, which `check_text` finds in the row they are of.

    Raises RecordError: it cannot be read, or is UTF-16 or UTF-32 as a whole.
    """
    try:
        with open(file, "rb") as handle:
            content = handle.read()
    except OSError as error:
        raise RecordError(file, None, None, f"cannot be read ({error.strerror})") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise RecordError(file, None, None, "cannot be read (UTF-16 or UTF-32; convert it to UTF-8)")
    return content.decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n")


def check_text(file, row: int, line: int, text: str) -> RecordError | None:
    """The error of a row whose text holds bytes that are not UTF-8, with the line of the first."""
    found = _RAW_BYTE.search(text)
    if found is None:
        return None
    at = line + text.count("\n", 0, found.start())
    return RecordError(file, row, None, f"holds byte 0x{ord(found[0]) - 0xDC00:02x}, which is not UTF-8", at)


def members(text: str, at: int) -> Iterator[tuple[Any, int, int, Any]]:
    """(key or index, start, end, value) of the array or object that begins at text[at].

    Raises json.JSONDecodeError where the text is none, or goes on behind the end of a document (at = 0).
    """
    at = begin = _SPACE.match(text, at).end()
    close = {"[": "]", "{": "}"}.get(text[at : at + 1])
    if close is None:
        raise json.JSONDecodeError("Expecting an array or an object", text, at)
    at, index = _SPACE.match(text, at + 1).end(), 0
    while text[at : at + 1] != close or index:
        key = index
        if close == "}":
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting a name in double quotes", text, at)
            key, at = _DECODER.raw_decode(text, at)
            at = _SPACE.match(text, at).end()
            if text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':'", text, at)
            at = _SPACE.match(text, at + 1).end()
        value, end = _DECODER.raw_decode(text, at)
        yield key, at, end, value
        at, index = _SPACE.match(text, end).end(), index + 1
        if text[at : at + 1] == close:
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError(f"Expecting ',' or '{close}'", text, at)
        at = _SPACE.match(text, at + 1).end()
    if begin == _SPACE.match(text).end() and _SPACE.match(text, at + 1).end() != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def nested(file, depth: int) -> Iterator[tuple[int, int, tuple, Any]]:
    """(row, line, keys, value or RecordError) of what lies `depth` levels deep in a JSON file; 1: a plain list.

    Raises RecordError: no JSON, or fewer levels.
    """
    text = read_text(file)
    found = ((keys, start, end, value) for keys, start, end, value in _descend(file, text, 0, depth, ()))
    row, line, seen = 0, 1, 0
    try:
        for keys, start, end, value in found:
            line, seen = line + text.count("\n", seen, start), start
            yield row, line, keys, check_text(file, row, line, text[start:end]) or value
            row += 1
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists nested without end
        raise RecordError(file, None, None, f"is no JSON ({error})", getattr(error, "lineno", None)) from None


def _descend(file, text: str, at: int, depth: int, keys: tuple):
    for key, start, end, value in members(text, at):
        if depth == 1:
            yield (*keys, key), start, end, value
        elif isinstance(value, list | dict):
            yield from _descend(file, text, start, depth - 1, (*keys, key))
        else:
            line = text.count("\n", 0, start) + 1
            raise RecordError(file, None, str(key), f"holds {type(value).__name__}, not a list or an object", line)


def read_rows(file) -> Iterator[tuple[int, int | None, Any]]:
    """(row, line, value or RecordError) of a JSON list, JSON lines, a CSV with a header or a Parquet file.

    Lines count from 1; a Parquet file has none. Raises RecordError where nothing can be read at all.
    """
    suffix = os.path.splitext(os.fspath(file))[1].lower()
    if suffix == ".parquet":
        yield from _parquet(file)
    elif suffix == ".csv":
        yield from _csv(file)
    else:
        text = read_text(file)
        if text.lstrip()[:1] == "[":
            yield from ((row, line, value) for row, line, _, value in nested(file, 1))
        else:
            yield from _lines(file, text)


def _lines(file, text: str):
    row = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield row, number, check_text(file, row, number, line) or json.loads(line)
        except (ValueError, RecursionError) as error:
            yield row, number, RecordError(file, row, None, f"is no JSON ({error})", number)
        row += 1
    if row == 0:
        raise RecordError(file, None, None, "holds no rows")


def _csv(file):
    reader = csv.DictReader(io.StringIO(read_text(file)), restkey="", strict=True)
    row, line = 0, 2
    try:
        for value in reader:
            error = check_text(file, row, line, "\n".join(str(text) for text in value.values()))
            if error is None and ("" in value or None in value.values()):
                wanted, many = len(reader.fieldnames), len([v for k, v in value.items() if v is not None and k != ""])
                have = many + len(value.get("", ()))
                error = RecordError(file, row, None, f"holds {have} fields, its header {wanted}", line)
            yield row, line, error or value
            row, line = row + 1, reader.line_num + 1
    except csv.Error as error:
        raise RecordError(file, row, None, f"is no CSV ({error})", reader.line_num) from None


def _parquet(file):
    try:
        from pyarrow import lib, parquet  # imported on first use: 170 MB
    except ImportError:
        raise RecordError(file, None, None, "cannot be read without pyarrow (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(file) as opened:
            values = (value for batch in opened.iter_batches(1024) for value in batch.to_pylist())
            yield from ((row, None, value) for row, value in enumerate(values))
    except (OSError, lib.ArrowException) as error:
        raise RecordError(file, None, None, f"cannot be read ({str(error).splitlines()[0]})") from None
