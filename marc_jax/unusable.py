"""Rows of a question file that a run cannot use: found before anything is decoded, listed, left out on request."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from data_pipelines import sources
from marc_jax import files
from marc_jax.batches import Shape
from marc_jax.config import ConfigError
from marc_jax.run import Run


def too_long(run: Run, records: Sequence[sources.Record], style: str) -> dict[int, dict]:
    """{row: `line_of`} of records with more tokens than a batch takes."""
    around, bad = run.prompter.words("", Shape("video", (1, 1), 0.0))[1], {}
    asked = [sources.question_text(r.problem, r.problem_type, r.options, style) for r in records]
    frames = {kind: sources.question_text("", kind, (), style) for kind in {r.problem_type for r in records}}
    spared = {kind: max(len(text) - len(run.tokenizer.encode(text)) - 8, 0) for kind, text in frames.items()}
    texts = {"question": (asked, [spared[r.problem_type] for r in records], around)}
    if style == "train":
        texts["answer"] = [r.target for r in records], [0] * len(records), 1  # its stop token
    for name, (said, less, more) in texts.items():
        most = getattr(run.sizes, name)
        # No token is shorter than a byte, so short texts need no counting (NFC can lengthen what is not ASCII).
        unsure = [i for i, text in enumerate(said) if not text.isascii() or len(text) - less[i] + more > most]
        for i, count in zip(unsure, run.tokenizer.counts(said[i] for i in unsure), strict=True):
            if count + more > most and records[i].row not in bad:
                reason = f"{name} of {count + more} tokens, config.data.{name}_tokens = {most}"
                bad[records[i].row] = line_of(records[i], reason)
    return bad


def line_of(record: sources.Record, reason: str) -> dict:
    """A line of the list of rows that cannot be used."""
    return {"row": record.row, "line": record.line, "path": record.path, "reason": reason}


def absent(run: Run, record: sources.Record) -> str | None:
    """Why a record's medium is no file under the data root; a folder of pictures is looked at when it is read."""
    try:
        if record.data_type != "frame":
            sources.media_path(run.config.data.root, record.path)
    except ValueError as error:
        return str(error)
    return None


def exclude(run: Run, file: str, bad: dict[int, dict], total: int) -> None:
    """Lists rows that cannot be used; goes on without them only where the user said so."""
    if not bad:
        return
    path, listed = run.workdir / f"{Path(file).stem}.bad.jsonl", [bad[row] for row in sorted(bad)]
    if jax.process_index() == 0:
        files.write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in listed))
    first = listed[0]
    where = f"line {first['line']}" if first["line"] else f"row {first['row']}"
    first = f"{where}: {first['path']}: {first['reason']}".replace(": : ", ": ")
    line = f"{file}: {len(bad)} of {total} rows cannot be used (all in {path}); first: {first}"
    if not run.config.data.skip_bad:
        option = "--skip_bad leaves" if run.config.eval.benchmark else "--config.data.skip_bad=True leaves"
        raise ConfigError(f"{line}; {option} them out")
    if len(bad) == total:
        raise ConfigError(line)
    print(f"warning: {line}; going on with {total - len(bad)} of {total}", file=sys.stderr)
