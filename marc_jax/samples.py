"""The table of sample completions of a stage: `samples.jsonl`, `samples.html`, and TensorBoard's text tab."""

import json
from html import escape
from pathlib import Path

import jax

from marc_jax import files, metrics

SHOWN = 200  # rows of the page, the newest first; the JSON lines keep all
STYLE = """:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.4rem .6rem;
border-top:1px solid #8884}td{white-space:pre-wrap;overflow-wrap:anywhere}td.n{white-space:nowrap;text-align:right}"""


class Table:
    """Rows are flat dicts of texts and numbers; only process 0 writes. TensorBoard shows the folder as its own run.

    Args:
      folder: made when there is something to write.
      last: the step the run goes on from; rows of later steps are dropped.
    """

    def __init__(self, folder: Path, last: int = 0):
        self.folder, self._board = Path(folder), None
        self._enabled = jax.process_index() == 0
        if self._enabled:
            metrics.cut(self.folder / "samples.jsonl", last)
        self._last = last

    def write(self, step: int, rows: list[dict]) -> None:
        """Appends the rows of a step and draws the page anew."""
        if not self._enabled or not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "samples.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows))
        files.write_whole(self.folder / "samples.html", page(metrics.read(path)[-SHOWN:][::-1]))
        if self._board is None:
            self._board = metrics.summary_writer()(str(self.folder), purge_step=self._last + 1, flush_secs=10)
        self._board.add_text("completions", markdown(rows), step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def columns(rows: list[dict]) -> list[str]:
    """The keys of all rows, in the order they are met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def page(rows: list[dict]) -> str:
    """One HTML file without scripts."""
    names = columns(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    cells = ("".join(_cell(row.get(name, "")) for name in names) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in cells)
    return (
        f'<!doctype html><meta charset="utf-8"><title>Sample completions</title><style>{STYLE}</style>\n'
        f"<table><tr>{head}</tr>\n{body}</table>\n"
    )


def _cell(value) -> str:
    style = ' class="n"' if isinstance(value, int | float) else ""
    return f"<td{style}>{escape(_text(value))}</td>"


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table for TensorBoard's text tab."""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([_text(row.get(name, "")) for name in names] for row in rows)]
    safe = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)
