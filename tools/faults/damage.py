"""Files that have changed: checkpoints, memories, question files. Nothing wrong may be taken for right."""

import json
import pathlib
import random
import shutil

import numpy as np

from data_pipelines import sources
from marc_jax import checkpoint
from marc_jax.memory import store
from marc_jax.memory.entry import ARRAYS
from tools.faults import drill

HARMS = ("flip", "zero", "cut", "delete", "swap")


def injure(path: pathlib.Path, harm: str, rng: random.Random, others: list[pathlib.Path]) -> list[str]:
    """Changes `path` (never into what it was) and returns the names of the files that are no longer as they were."""
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
        return [path.name]
    if harm == "swap":
        other = rng.choice([p for p in others if p.read_bytes() != bytes(data)])
        path.write_bytes(other.read_bytes())
        other.write_bytes(bytes(data))
        return [path.name, other.name]
    at = rng.randrange(len(data))
    if harm == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif harm == "zero":
        piece = data[at : at + 64]
        data[at : at + 64] = bytes(len(piece)) if any(piece) else bytes(x ^ 255 for x in piece)
    elif harm == "cut":
        del data[at:]
    path.write_bytes(bytes(data))
    return [path.name]


def checkpoints(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """Injures the newest of two steps, restores, and compares every number with the step before."""
    outcome = drill.Outcome(
        "checkpoint file changed: bit flip, zeroed, cut, deleted, swapped",
        "never silent: the file is named and the newest step that verifies is restored, bit for bit",
    )
    rng = random.Random(seed)
    trees = {step: _tree(step) for step in (1, 2)}
    whole, here = folder / "whole", folder / "injured"
    for step, tree in trees.items():
        checkpoint.save(whole, step, tree, {"step": step})
    victims = [p.relative_to(whole) for p in sorted(whole.glob("step_00000002/**/*")) if p.is_file()]
    for i in range(count):
        shutil.copytree(whole, here)
        files = [here / p for p in victims if (here / p).stat().st_size]
        path, harm = rng.choice(files), HARMS[i % len(HARMS)]
        names = injure(path, harm, rng, files)
        found = checkpoint.check(here, 2)
        problem = "silent" if found is None else None
        if found and not any(name in found for name in names):
            problem = f"another file named: {found}"
        if problem is None:
            got, meta = checkpoint.restore(here, trees[1])
            same = all(np.asarray(got[k]).tobytes() == np.asarray(x).tobytes() for k, x in trees[1].items())
            problem = None if same and meta == {"step": 1} else "not the step before"
        outcome.count(problem and f"{harm} of {path.relative_to(here)}: {problem}")
        shutil.rmtree(here)
    return outcome


def _tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {f"part{i}/kernel": rng.normal(size=(16, 8 << i)).astype(np.float32) for i in range(4)}


def _entry(seed: int) -> store.MemoryEntry:
    rng = np.random.default_rng(seed)
    return store.MemoryEntry(
        video_sha256=f"{seed:064x}", seconds=np.arange(6.0), event_spans=np.array([[0, 2], [3, 6]], np.int32),
        event_seconds=rng.random((2, 2)), event_embeddings=rng.random((2, 8)).astype(np.float32),
        tokens=rng.random((6, 4, 16)).astype(np.float32), grid=(2, 2), extra={"name": seed},
    )  # fmt: skip


def memories(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """Injures a shard of a memory and reads every video of it."""
    outcome = drill.Outcome(
        "memory shard changed: bit flip, zeroed, cut, swapped pieces",
        "an error that names the shard, or every number as it was",
    )
    rng, made_with = random.Random(seed), store.fingerprint(model="m")
    truth = {f"v{i}": _entry(i) for i in range(4)}
    with store.MemoryWriter(folder / "memory", made_with) as writer:
        for video, entry in truth.items():
            writer.add(video, entry)
    (shard,) = (folder / "memory").iterdir()
    data = shard.read_bytes()
    refused = 0
    for i in range(count):
        harm = ("flip", "zero", "cut", "pieces")[i % 4]
        if harm == "pieces":
            a, b = sorted(rng.sample(range(0, len(data) - 64, 64), 2))
            shard.write_bytes(
                data[:a] + data[b : b + 64] + data[a + 64 : b] + data[a : a + 64] + data[b + 64 :]
            )
        else:
            injure(shard, harm, rng, [])
        problem = None
        try:
            reader = store.MemoryReader(folder / "memory", made_with)
            if set(reader) != set(truth):
                problem = f"holds {sorted(reader)}"
            else:
                problem = next((f"{v} differs" for v, entry in truth.items() if not _same(reader[v], entry)), None)
        except store.StoreError as error:
            refused += 1
            problem = None if shard.name in str(error) or str(shard.parent) in str(error) else f"unclear: {error}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        outcome.count(problem and f"attempt {i}, {harm}: {problem}")
        shard.write_bytes(data)
    outcome.note = f"{refused} refused, the others read back as they were"
    return outcome


def _same(got: store.MemoryEntry, want: store.MemoryEntry) -> bool:
    arrays = all(getattr(got, n).tobytes() == getattr(want, n).tobytes() for n in ARRAYS)
    return arrays and (got.video_sha256, got.grid, got.extra) == (want.video_sha256, want.grid, want.extra)


ROW = {
    "problem_id": 7, "problem": "Which comes first?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. the red one", "B. the blue one"], "solution": "<answer>A</answer>", "path": "./videos/7.mp4",
    "data_source": "s", "process": "",
}  # fmt: skip
STRANGE = (None, True, -1, 1e308, 10**400, "", " ", "\0", "../../etc/passwd", "/etc/passwd", "concat:a|b", "file:///x",
           [], [[]], {}, {"a": {}}, "A" * 100_000, "\ud800", "\u202e", ["A"] * 10_000)  # fmt: skip


def annotations(folder: pathlib.Path, count: int, seed: int = 0) -> drill.Outcome:
    """Mutates question files, byte by byte and field by field, reads them and resolves their paths."""
    outcome = drill.Outcome(
        "question file changed: bytes, fields of another type, absurd values, deep nesting",
        "records that keep the schema and stay under the data root, or an error that names the file",
    )
    rng, refused = random.Random(seed), 0
    root = folder / "data"
    root.mkdir()
    path = folder / "rows.json"
    for i in range(count):
        path.write_bytes(_mutated(rng, i))
        try:
            errors: list = []
            records = sources.load_records(path, errors=errors)
            refused += bool(errors)
            problem = next((p for p in (_wrong(record, root) for record in records) if p), None)
        except sources.RecordError as error:
            refused += 1
            problem = None if str(path) in str(error) else f"unclear: {error}"
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        outcome.count(problem and f"attempt {i}: {problem}")
    outcome.note = f"{refused} refused in whole or in part"
    return outcome


def _mutated(rng: random.Random, i: int) -> bytes:
    rows = [dict(ROW) for _ in range(3)]
    if i % 3 == 0:
        row = rng.choice(rows)
        row[rng.choice([*ROW, "extra"])] = rng.choice(STRANGE)
    elif i % 3 == 1 and rng.random() < 0.5:
        rows[1].pop(rng.choice(list(ROW)))
    lines = rng.random() < 0.5
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    data = bytearray(text.encode())
    if i % 3 == 2:
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at:]
                data += b" "
            elif kind == 2:
                data[at:at] = b"[" * rng.choice((1, 100_000))
            else:
                data[at:at] = rng.choice((b"\xff\xfe", b"NaN", b"\0", b"1e999", b'"', b"\xed\xa0\x80", b"9" * 5000))
    return bytes(data)


def _wrong(record: sources.Record, root: pathlib.Path) -> str | None:
    texts = (record.problem, record.solution, record.path, record.problem_type, record.data_type)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "an empty or missing text came through"
    try:
        where = sources.confined_path(root, record.path)
    except ValueError:
        return None
    return None if pathlib.Path(where).is_relative_to(root.resolve()) else f"{record.path!r} leads to {where}"
