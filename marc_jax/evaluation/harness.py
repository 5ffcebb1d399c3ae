"""One checkpoint on one benchmark: every arm of the config answers its questions, then one report.

    <out>/predictions/<arm>.jsonl     a line per question as soon as its batch is answered; a restart goes on there
    <out>/submission/<arm>/...        the same in the benchmark's own form
    <out>/bad_rows.jsonl              rows and videos that cannot be used
    <out>/report.html, .md, results.json

The videos go through the vision tower once (`records`), whatever the number of arms. Scores are computed from the
predictions at the end, by all three rules of `benchmarks`; each says n of the N questions of the file.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from data_pipelines import sources
from data_pipelines.benchmarks.read import BadRows, Questions, read
from marc_jax import files, hardware, locks, pretrained, records
from marc_jax import run as runs
from marc_jax.config import ConfigError
from marc_jax.evaluation import benchmarks, compare, equal_tokens, report, run, submissions
from marc_jax.rl.teacher import weights_hash

STYLE = "eval"  # Video-R1's wording of questions at evaluation


def evaluate(config, checkpoint: str, out: Path, arms: Sequence[str] = (), against: str = "") -> dict:
    """Answers, scores and reports. Returns the results, see `report`.

    Args:
      config: of an experiment with eval.benchmark.
      checkpoint: a folder of published weights, of a converted checkpoint, or of a training stage.
      arms: of config.eval.arms; default all.
      out: where everything goes; the same command there goes on where it stopped.
      against: `out` of another evaluation of the same benchmark, whose arms are compared with the main one.
    Raises:
      ConfigError: what the user can mend, in one message. LockedError: another process writes there.
    """
    begun = time.monotonic()
    config = config.copy_and_resolve_references()
    config.init_from = checkpoint
    arms = chosen(config, arms)
    others = _others(against, config.eval.benchmark) if against else {}
    questions = numbered(read_questions(config, out), config.eval.limit)
    out.mkdir(parents=True, exist_ok=True)
    with locks.held(out / ".lock", f"the evaluation in {out}"):
        here = surroundings(config, out)
        test = records.over_memory(here, config.data.test, questions.records, STYLE)
        ready = time.monotonic()
        params = here.parameters("")
        identity = {
            "weights": weights_hash(params), "questions": _digest(questions), "decoding": config.max_new_tokens,
            "encoder": config.encoder.to_dict(), "model": config.model.to_dict(),
            "sampling": [str(here.sampling), config.data.second_per_grid],
        }  # fmt: skip
        said = {}
        for arm in arms:
            said[arm] = _answered(here, params, test, questions, arm, identity, out)
        timings = {"memory": ready - begun, "answers": time.monotonic() - ready}
        results = assemble(config, questions, said, timings, others)
        results["predictions"] = {arm: str((out / "predictions" / f"{arm}.jsonl").resolve()) for arm in said}
        if jax.process_index() == 0:
            _submit(config.eval.benchmark, questions, said, out)
            report.write(out, results)
    return results


def chosen(config, arms: Sequence[str]) -> list[str]:
    """The arms of config.eval.arms that are named, or all. Raises ConfigError: no such arm, an encoder is missing."""
    known = list(config.eval.arms)
    if unknown := [arm for arm in arms if arm not in known]:
        raise ConfigError(f"--arms: {unknown[0]!r} is not one of {', '.join(known)}")
    arms = [arm for arm in known if arm in (arms or known)]
    retrieve = [arm for arm in arms if config.views[config.eval.arms[arm].view].select == "retrieve"]
    if retrieve and not config.encoder.path:
        rest = ",".join(arm for arm in known if arm not in retrieve)
        raise ConfigError(f"arms {', '.join(retrieve)} retrieve: name a --config.encoder.path, or --arms={rest}")
    return arms


def read_questions(config, out: Path) -> Questions:
    """The questions of config.eval.benchmark; rows that cannot be used are in `<out>/bad_rows.jsonl`.

    Raises ConfigError: such rows without config.data.skip_bad, a file that cannot be read, nothing left.
    """
    data = config.data
    if not data.test or not data.root:
        raise ConfigError("config.data.test (annotations, a file or folder) and config.data.root (videos) are required")
    try:
        questions = read(config.eval.benchmark, data.test, root=data.root, skip_bad=data.skip_bad)
    except BadRows as error:
        _list_bad(out, error.errors)
        count, *rows = str(error).splitlines()
        print("\n".join(rows), file=sys.stderr)
        raise ConfigError(f"{count}; all are in {out / 'bad_rows.jsonl'}") from None
    except sources.RecordError as error:
        raise ConfigError(str(error)) from None
    if questions.errors:
        _list_bad(out, questions.errors)
        left = f"{len(questions.errors)} of {questions.total} rows are left out, see {out / 'bad_rows.jsonl'}"
        print(f"warning: {left}", file=sys.stderr)
    if not questions.records:
        raise ConfigError(f"{data.test}: none of its {questions.total} rows can be used")
    return questions


def _list_bad(out: Path, errors) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [{k: getattr(e, k) for k in ("file", "row", "line", "field", "reason")} for e in errors]
    files.write_whole(out / "bad_rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def numbered(questions: Questions, limit: int = 0) -> Questions:
    """The first `limit` questions (0: all), with rows that count through all files: what tells them apart in a run."""
    kept = questions.records[: limit or None]
    renumbered = [dataclasses.replace(record, row=i) for i, record in enumerate(kept)]
    total = questions.total if len(kept) == len(questions.records) else len(kept)
    return dataclasses.replace(questions, records=renumbered, total=total)


def _digest(questions: Questions) -> str:
    told = [(str(r.problem_id), r.problem, r.options, r.solution, r.path) for r in questions.records]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def surroundings(config, out: Path) -> runs.Run:
    """A run's surroundings around config.init_from alone: no training came before."""
    pretrained.check(config.init_from)
    files.write_whole(out / "tokenizer.json", pretrained.tokenizer(config.init_from).to_json())
    here = runs.surroundings(config, out)
    pretrained.fits(here.cfg, here.tokenizer)
    return here


def _answered(here: runs.Run, params, test: records.Records, questions: Questions, arm: str, identity: dict, out: Path):
    """The predictions of one arm, those of an earlier run included."""
    view = here.config.eval.arms[arm].view
    made_with = identity | {"view": dataclasses.asdict(here.view(view))}
    path = out / "predictions" / f"{arm}.jsonl"
    said = _resumed(path, made_with)
    by_row = {record.row: record for record in questions.records}
    lengths = test.lengths()
    todo = [i for i, row in enumerate(test.records) if by_row[row["problem_id"]].problem_id not in said]
    todo.sort(key=lambda i: (lengths[i][0], len(test.records[i]["problem"])))  # batches of one shape
    with open(path, "a", encoding="utf-8") as file:
        unread = [by_row[row["problem_id"]].problem_id for row in test.unreadable]
        _append(file, said, [{"problem_id": i, "error": "unreadable video"} for i in unread if i not in said])
        before = time.monotonic()
        for chosen, rows in run.answers(here, params, view, "features", test, f"eval {arm}", todo):
            seconds, before = (time.monotonic() - before) / len(rows), time.monotonic()
            fields = ("completion", "truncated", "visual_tokens", "completion_tokens")
            _append(file, said, [
                {"problem_id": by_row[row["problem_id"]].problem_id, **{field: row[field] for field in fields},
                 "seconds": round(seconds, 4), "video_seconds": lengths[i][1]}
                for i, row in zip(chosen, rows, strict=True)
            ])  # fmt: skip
    return list(said.values())


def _append(file, said: dict, rows: list[dict]) -> None:
    if jax.process_index() == 0:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
    said.update((row["problem_id"], row) for row in rows)


def _resumed(path: Path, made_with: dict) -> dict:
    """{problem_id: prediction} that is there already; a line that a crash cut short is dropped, errors are tried again.

    Raises ConfigError: it was made with other weights, questions or settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told, text = path.with_suffix(".made_with.json"), json.dumps(made_with, indent=1, default=str) + "\n"
    if told.exists() and path.exists() and told.read_text() != text:
        before = json.loads(told.read_text())
        differ = [name for name, value in json.loads(text).items() if before.get(name) != value]
        raise ConfigError(f"{path} was made with other {', '.join(differ)}; give another --out, or remove it")
    first = jax.process_index() == 0
    if first:
        files.write_whole(told, text)
    if not path.exists():
        return {}
    rows = [row for row in report.read_jsonl(path) if not row.get("error")]
    if first:
        files.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {row["problem_id"]: row for row in rows}


def _others(against: str, benchmark: str) -> dict[str, list[dict]]:
    """The predictions of another evaluation, by "against <arm>"."""
    try:
        results, found = compare.finished(against)
    except ConfigError as error:
        raise ConfigError(f"--against={error}") from None
    if results["benchmark"] != benchmark:
        raise ConfigError(f"--against={against}: of {results['benchmark']}, not of {benchmark}")
    return {f"against {arm}": rows for arm, rows in found.items()}


def _submit(benchmark: str, questions: Questions, said: Mapping, out: Path) -> None:
    for arm, rows in said.items():
        for name, text in submissions.files(benchmark, questions.records, rows).items():
            (out / "submission" / arm).mkdir(parents=True, exist_ok=True)
            files.write_whole(out / "submission" / arm / name, text)


def assemble(config, questions: Questions, said: Mapping, timings: dict, others: Mapping) -> dict:
    """results.json of a benchmark, see `report`; `scores` holds every rule's table of every arm."""
    name, lead = config.eval.benchmark, config.eval.scoring
    rows = {
        rule: {arm: benchmarks.judged(name, questions.records, found, rule) for arm, found in (said | others).items()}
        for rule in benchmarks.RULES
    }
    teacher = config.eval.teacher if config.eval.teacher in said else None
    scores = {rule: {
        arm: benchmarks.table(name, found, rule, teacher=judged.get(teacher), seed=config.seed)
        for arm, found in judged.items()
    } for rule, judged in rows.items()}  # fmt: skip
    arms = [_arm(config, arm, scores[lead][arm]) for arm in (*said, *others)]
    main = config.eval.main if config.eval.main in said else next(iter(said))
    pairs = {
        arm: benchmarks.compare(name, rows[lead][main], rows[lead][arm], lead, seed=config.seed)
        for arm in (*said, *others) if arm != main
    }  # fmt: skip
    equal = equal_tokens.tables(name, rows[lead], config.eval.arms, config.views, lead, config.seed)
    return {
        "title": f"{benchmarks.BENCHMARKS[name].title}: {config.title}",
        "benchmark": name,
        "arms": arms + benchmarks.paper_arms(name),
        "comparisons": [{"a": main, "b": arm, **found} for arm, found in pairs.items() if found],
        "tables": [*equal, _rule_table(scores, arms), *_duration_table(arms), _cost_table(arms, said)],
        "scores": scores,
        "intervals": "a bootstrap over videos",
        "notes": _notes(name, lead, questions, arms),
        "timings": {key: round(seconds, 1) for key, seconds in timings.items()},
        "memory_gb": round(hardware.peak_gib(), 2),
        "seed": config.seed,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware.described(),
        "command": " ".join(["python -m marc_jax.eval", *sys.argv[1:]]),
        "split": f"{len(questions.records)} of the {questions.total} questions of {config.data.test}",
        "decoding": f"greedy, at most {config.max_new_tokens} tokens",
        "config": config.to_dict(),
    }  # fmt: skip


def _arm(config, key: str, table: dict) -> dict:
    if key not in config.eval.arms:
        return {"key": key, "label": key, "group": "baseline", **table}
    arm = config.eval.arms[key]
    own = {"main": True} if key == config.eval.main else {}
    return {"key": key, "label": arm.label or key, "group": arm.group, "note": arm.note, **own, **table}


def _rule_table(scores: Mapping, arms: list[dict]) -> dict:
    head, rows = ["arm"], []
    for rule in benchmarks.RULES:
        head += [f"{rule}, %", "answer found, %", "n (not scored)"]
    for arm in arms:
        cells = [arm["label"]]
        for rule in benchmarks.RULES:
            table = scores[rule][arm["key"]]
            scored = f"{table['n']} ({table['unscored']})"
            cells += [_number(table["accuracy"], 2), _number(table["extraction_rate"]), scored]
        rows.append(cells)
    return {"title": "By every rule of scoring", "head": head, "rows": rows}


def _duration_table(arms: list[dict]) -> list[dict]:
    names = list(dict.fromkeys(name for arm in arms for name in arm["per_duration"]))
    if not names:
        return []
    blank = {"accuracy": None, "n": 0}
    rows = []
    for arm in arms:
        cells = [arm["per_duration"].get(name, blank) for name in names]
        rows.append([arm["label"], *(f"{_number(cell['accuracy'])} ({cell['n']})" for cell in cells)])
    return [{"title": "By length of the video, % (n)", "head": ["arm", *names], "rows": rows}]


def _cost_table(arms: list[dict], said: Mapping) -> dict:
    rows = []
    for arm in arms:
        seconds = sorted(row["seconds"] for row in said.get(arm["key"], ()) if "seconds" in row)
        middle = seconds[len(seconds) // 2] if seconds else None
        tokens = [_number(arm["visual_tokens"]), _number(arm["completion_tokens"])]
        rows.append([arm["label"], *tokens, _number(middle, 3)])
    head = ["arm", "visual tokens", "tokens of the answer", "seconds per question in its batch (median)"]
    return {"title": "Cost", "head": head, "rows": rows}


def _number(value, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _notes(name: str, lead: str, questions: Questions, arms: list[dict]) -> list[str]:
    known = benchmarks.BENCHMARKS[name]
    notes = [f"Accuracy by the rule '{lead}' of marc_jax.evaluation.benchmarks."]
    notes += [f"{arm['label']}: {arm['n']} of {questions.total} questions scored." for arm in arms]
    if questions.total != known.questions:
        notes.append(f"{known.title} has {known.questions} questions as published; these are {questions.total}.")
    if questions.errors:
        notes.append(f"{len(questions.errors)} rows could not be used and were left out (bad_rows.jsonl).")
    return notes
