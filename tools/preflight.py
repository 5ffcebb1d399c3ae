"""Looks at a data set before a machine is rented for it: fields, options, files, decodability, tokens, sizes.

    python -m tools.preflight Video-R1-260k.json --root=VIDEOS --report=preflight.html
    python -m tools.preflight questions/ --benchmark=tempcompass --root=VIDEOS --report=preflight.json

Reads Video-R1's schema, or with --benchmark a benchmark's own. Every video and image is decoded once, frames as
training takes them, videos in worker processes with a deadline; --decode=0 only looks whether the files are there,
--decode=N decodes N of them, spread over the whole. --tokenizer=FOLDER (that of the checkpoint) counts tokens of text.

The exit code is 0 where every row can be used, 1 where some cannot (all are in the report, with their lines), 2 where
nothing can be looked at.
"""

import argparse
import collections
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from data_pipelines import sandbox, sources, video
from data_pipelines.benchmarks.read import FORMS, read
from data_pipelines.patches import FACTOR, IMAGE_MIN_PIXELS, TEMPORAL, VideoBudget, smart_resize
from data_pipelines.rows import RecordError
from marc_jax import files
from marc_jax.evaluation.html import STYLE
from marc_jax.tokenizer import Tokenizer, TokenizerError

SHOWN = 200  # problems in the HTML page; the JSON has all
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def records_of(file: str, benchmark: str) -> tuple[list[sources.Record], list[RecordError], int]:
    """(records, errors, rows in all). Raises RecordError where nothing can be read."""
    if benchmark:
        found = read(benchmark, file, skip_bad=True)
        return found.records, list(found.errors), found.total
    errors: list[RecordError] = []
    records = sources.load_records(file, errors=errors)
    total = len(records) + len(errors)
    first: dict = {}
    for record in records:
        other = first.setdefault(record.problem_id, record)
        if other is not record:
            where = f"line {other.line}" if other.line else f"row {other.row}"
            errors.append(_error(file, record, "problem_id", f"is {record.problem_id!r}, the id of {where} too"))
        if reason := answer_problem(record):
            errors.append(_error(file, record, "solution", reason))
    return records, errors, total


def _error(file, record: sources.Record, field: str, reason: str) -> RecordError:
    return RecordError(file, record.row, field, reason, record.line)


def answer_problem(record: sources.Record) -> str | None:
    """What is wrong with a record's answer: no answer tags, a letter of no option, no number where one is asked for."""
    answer = record.solution.strip()
    if not (answer.startswith("<answer>") and answer.endswith("</answer>")):
        return f"is {answer!r:.60}, not <answer>...</answer>"
    answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
    if not answer:
        return "is an empty answer"
    if record.problem_type == "multiple choice" and not any(o.startswith(answer) for o in record.options):
        return f"is {answer!r:.40}, the beginning of none of the {len(record.options)} options"
    if record.problem_type in ("numerical", "regression"):
        try:
            float(answer.replace(",", ""))
        except ValueError:
            return f"is {answer!r:.40}, not a number"
    return None


class Media:
    """The files of some records: where they are, how large, what decoding them gives."""

    def __init__(self, root: str, sampling: Mapping, image_tokens: int):
        self.root, self.sampling, self.image_tokens = root, dict(sampling), image_tokens
        self.reasons: dict[str, str] = {}  # path: why it cannot be used
        self.facts: dict[str, dict] = {}  # path: bytes; and of those decoded: seconds, width, height, frames, tokens

    def look(self, records: Iterable[sources.Record]) -> dict[str, str]:
        """{path: data type} of the files that are there."""
        found = {}
        for path, kind in {record.path: record.data_type for record in records}.items():
            try:
                if kind == "frame" and os.path.isdir(sources.confined_path(self.root, path)):
                    continue
                size = os.stat(sources.media_path(self.root, path)).st_size
            except (ValueError, OSError) as error:
                self.reasons[path] = str(error)
                continue
            self.facts[path] = {"bytes": size}
            found[path] = kind
        return found

    def decode(self, paths: Mapping[str, str], workers: int, seconds: float, progress=lambda done: None) -> None:
        """Decodes videos in worker processes and images here; what fails is in `reasons`."""
        full = {sources.media_path(self.root, path): path for path, kind in paths.items() if kind != "image"}
        done = 0
        for file, clip in sandbox.decode_many(full, self.sampling, workers, seconds):
            self._take(full[file], clip)
            progress(done := done + 1)
        for path in (path for path, kind in paths.items() if kind == "image"):
            try:
                picture = video.read_image(sources.media_path(self.root, path))
                most = self.image_tokens * FACTOR**2
                height, width = smart_resize(*picture.shape[:2], min_pixels=IMAGE_MIN_PIXELS, max_pixels=most)
                tokens = height * width // FACTOR**2
                size = {"width": picture.shape[1], "height": picture.shape[0]}
                self.facts[path] |= {**size, "frames": 1, "visual_tokens": tokens}
            except (video.VideoError, ValueError) as error:
                self.reasons[path] = getattr(error, "reason", str(error))
            progress(done := done + 1)

    def _take(self, path: str, clip: video.Clip | video.VideoError) -> None:
        if isinstance(clip, video.VideoError):
            self.reasons[path] = clip.reason
            return
        frames, height, width = clip.frames.shape[:3]
        tokens = frames // TEMPORAL * (height // FACTOR) * (width // FACTOR)
        self.facts[path] |= {
            "seconds": clip.info.duration, "width": clip.info.width, "height": clip.info.height, "frames": frames,
            "visual_tokens": tokens, "warnings": list(clip.warnings),
        }  # fmt: skip


def spread(paths: Mapping[str, str], count: int | None) -> dict[str, str]:
    """`count` of the files, evenly over the whole; None: all."""
    names = list(paths)
    if count is None or count >= len(names):
        return dict(paths)
    chosen = np.linspace(0, len(names) - 1, count).round().astype(int) if count else []
    return {names[i]: paths[names[i]] for i in chosen}


def text_tokens(tokenizer: Tokenizer, record: sources.Record) -> dict[str, int]:
    question = sources.question_text(record.problem, record.problem_type, record.options, "train")
    answer = f"{record.process}\n{record.solution}" if record.process else record.solution
    return {"question_tokens": len(tokenizer.encode(question)), "answer_tokens": len(tokenizer.encode(answer))}


def summary(values: Sequence[float]) -> dict:
    """Count, sum and quantiles of some numbers."""
    if not len(values):
        return {"count": 0}
    numbers = np.asarray(values, np.float64)
    named = {f"p{100 * q:g}": round(float(np.quantile(numbers, q)), 2) for q in QUANTILES}
    total = float(numbers.sum())
    return {"count": len(values), "sum": round(total, 2), "mean": round(total / len(values), 2), **named}


def check(args: argparse.Namespace) -> dict:
    """The report as a dict; `clean` says whether every row can be used."""
    begun = time.monotonic()
    records, errors, total = records_of(args.file, args.benchmark)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    frame_limit = args.frame_tokens * FACTOR**2
    budget = VideoBudget(min(VideoBudget.min_pixels, frame_limit), frame_limit=frame_limit)
    sampling = {"fps": args.fps, "max_frames": args.max_frames, "resize": budget}
    media = Media(args.root, sampling, args.image_tokens or args.frame_tokens)
    found = media.look(records)
    chosen = spread(found, args.decode)
    media.decode(chosen, args.workers, args.seconds, lambda done: _progress(done, len(chosen), args.quiet))
    errors += [_error(args.file, r, "path", media.reasons[r.path]) for r in records if r.path in media.reasons]
    asked = [record for record in records if tokenizer and record.problem_type in sources.PROBLEM_TYPES]
    counts = [text_tokens(tokenizer, record) for record in asked]
    facts = list(media.facts.values())
    sizes = {key: summary([f[key] for f in facts if key in f]) for key in
             ("bytes", "seconds", "frames", "width", "height", "visual_tokens")}  # fmt: skip
    sizes |= {key: summary([c[key] for c in counts]) for key in (counts[0] if counts else ())}
    problems = [{k: getattr(e, k) for k in ("file", "row", "line", "field", "reason")} for e in errors]
    problems.sort(key=lambda p: (p["file"], p["row"]))
    kinds = {name: dict(collections.Counter(str(getattr(r, name)) for r in records).most_common(30))
             for name in ("data_type", "problem_type", "data_source")}  # fmt: skip
    return {
        "file": args.file, "root": args.root, "rows": total,
        "usable": total - len({(p["file"], p["row"]) for p in problems}),
        "clean": not problems, "media": len(found) + len(media.reasons), "decoded": len(chosen), "kinds": kinds,
        "sizes": sizes, "warned": {p: f["warnings"] for p, f in media.facts.items() if f.get("warnings")},
        "sampling": {"fps": args.fps, "max_frames": args.max_frames, "frame_tokens": args.frame_tokens},
        "took_seconds": round(time.monotonic() - begun, 1), "problems": problems,
    }  # fmt: skip


def _progress(done: int, total: int, quiet: bool) -> None:
    if not quiet and (done == total or done % 200 == 0):
        print(f"decoded {done} of {total}", file=sys.stderr)


def page(found: dict) -> str:
    """The report as one HTML file."""
    def table(head, rows) -> str:
        cells = "".join(f"<th>{escape(str(c))}</th>" for c in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        return f'<div class="wide"><table class="text"><tr>{cells}</tr>{body}</table></div>'

    columns = ["count", "sum", "mean", *(f"p{100 * q:g}" for q in QUANTILES)]
    sizes = [[name, *(values[c] for c in columns)] for name, values in found["sizes"].items() if values["count"]]
    kinds = [[field, name, n] for field, counts in found["kinds"].items() for name, n in counts.items()]
    problems = [[p["line"] or "–", p["row"], p["field"] or "", p["reason"]] for p in found["problems"][:SHOWN]]
    more = len(found["problems"]) - len(problems)
    verdict = "every row can be used" if found["clean"] else f"{found['usable']} of {found['rows']} rows can be used"
    parts = [
        f"<h1>{escape(os.path.basename(found['file']))}: {verdict}</h1>",
        f'<p class="note">{found["decoded"]} of {found["media"]} files decoded in {found["took_seconds"]} s.</p>',
        "<h2>What cannot be used</h2>" + table(["line", "row", "field", "reason"], problems) if problems else "",
        f"<p>and {more} more, in the JSON report</p>" if more > 0 else "",
        "<h2>Sizes and tokens</h2>" + table(["", *columns], sizes),
        "<h2>Kinds</h2>" + table(["field", "value", "rows"], kinds),
    ]  # fmt: skip
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Pre-flight</title><style>{STYLE}</style>'
    return f"{head}<main>{''.join(parts)}</main></html>\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="questions: JSON, JSON lines, CSV, Parquet; a folder of them with --benchmark")
    parser.add_argument("--root", required=True, help="the folder that paths are relative to")
    parser.add_argument("--benchmark", default="", choices=["", *FORMS], help="read its own form")
    parser.add_argument("--report", type=Path, help="ends in .html or .json")
    parser.add_argument("--tokenizer", default="", help="folder of the checkpoint's tokenizer: counts tokens of text")
    parser.add_argument("--decode", type=int, help="how many files to decode; default all, 0 none")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--max_frames", type=int, default=64)
    parser.add_argument("--frame_tokens", type=int, default=128, help="visual tokens of a frame at most")
    parser.add_argument("--image_tokens", type=int, default=0, help="of an image; default as a frame")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=60.0, help="deadline of one video")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(argv)
    if args.report and args.report.suffix not in (".html", ".json"):
        parser.error(f"--report={args.report}: the name ends neither in .html nor in .json")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not os.path.isdir(args.root):
        print(f"error: --root={args.root} is no folder", file=sys.stderr)
        return 2
    try:
        found = check(args)
    except (RecordError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        text = page(found) if args.report.suffix == ".html" else json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        files.write_whole(args.report, text)
    for problem in found["problems"][:10]:
        print(RecordError(*(problem[k] for k in ("file", "row", "field", "reason", "line"))), file=sys.stderr)
    rows, media = (f"{found[a]} of {found[b]}" for a, b in (("usable", "rows"), ("decoded", "media")))
    print(f"{rows} rows can be used; {media} files decoded")
    return 0 if found["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
