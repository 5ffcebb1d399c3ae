"""Batches by number: exact resume at any worker count, host slices, epochs, bad rows masked and reported."""

import json
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import loader
from data_pipelines.containers import VideoError

Row = namedtuple("Row", "row path bad", defaults=(False,))


def load(record):
    if record.bad:
        raise VideoError(record.path, "truncated")
    return {"x": np.full((2, 3), record.row, np.float32), "n": record.row, "text": f"t{record.row}"}


def rows(n, bad=()):
    return [Row(i, f"v{i}.mp4", i in bad) for i in range(n)]


def numbers(batches):
    return [b["row"].tolist() for b in batches]


def test_an_epoch_holds_every_row_once_and_differs_from_the_next():
    got = np.concatenate([b["row"] for b in loader.iterate(rows(12), load, batch_size=4, epochs=2)])
    assert sorted(got[:12]) == sorted(got[12:]) == list(range(12))
    assert got[:12].tolist() != got[12:].tolist() and got[:12].tolist() != list(range(12))
    again = np.concatenate([b["row"] for b in loader.iterate(rows(12), load, batch_size=4, epochs=2)])
    other = np.concatenate([b["row"] for b in loader.iterate(rows(12), load, batch_size=4, epochs=2, seed=1)])
    assert got.tolist() == again.tolist() != other.tolist()
    plain = np.concatenate([b["row"] for b in loader.iterate(rows(12), load, batch_size=4, epochs=1, shuffle=False)])
    assert plain.tolist() == list(range(12))


def test_batches_cross_epochs_and_never_end_by_default():
    stream = loader.iterate(rows(5), load, batch_size=3)
    first = np.concatenate([next(stream)["row"] for _ in range(5)])
    assert all(sorted(first[i : i + 5]) == list(range(5)) for i in (0, 5, 10))


def test_values_are_stacked():
    batch = next(loader.iterate(rows(6), load, batch_size=4))
    assert batch["value"]["x"].shape == (4, 2, 3) and (batch["value"]["x"][:, 0, 0] == batch["row"]).all()
    assert batch["value"]["n"].tolist() == batch["row"].tolist() and batch["mask"].all()
    assert batch["value"]["text"] == [f"t{r}" for r in batch["row"]] and batch["number"] == 0


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (0, 16), (1, 1), (2, 3), (4, 1)])
def test_resume_is_exact_at_any_worker_count(workers, prefetch):
    options = dict(batch_size=4, epochs=3, seed=5, max_bad_fraction=0.5)
    records = rows(10, bad=(3,))
    whole = list(loader.iterate(records, load, **options))
    tail = list(loader.iterate(records, load, start=3, workers=workers, prefetch=prefetch, **options))
    assert [b["number"] for b in tail] == list(range(3, len(whole)))
    for a, b in zip(whole[3:], tail, strict=True):
        assert a["bad"] == b["bad"] and (a["row"] == b["row"]).all() and (a["mask"] == b["mask"]).all()
        assert (a["value"]["x"] == b["value"]["x"]).all() and a["value"]["text"] == b["value"]["text"]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_hosts_get_slices_of_the_global_batch(hosts):
    options = dict(batch_size=12, epochs=4)
    whole = numbers(loader.iterate(rows(14), load, **options))
    for start in (0, 2):  # also those that come after a run on another number of hosts
        parts = [
            numbers(loader.iterate(rows(14), load, start=start, process_index=i, process_count=hosts, **options))
            for i in range(hosts)
        ]
        assert whole[start:] == [sum((p[k] for p in parts), []) for k in range(len(whole) - start)]
    with pytest.raises(ValueError, match="does not divide"):
        loader.dataset(rows(14), load, batch_size=6, process_count=4)


def test_a_host_resumes_with_workers_where_it_had_none():
    host = dict(batch_size=4, epochs=3, process_index=1, process_count=2)
    whole = numbers(loader.iterate(rows(10), load, **host))
    assert numbers(loader.iterate(rows(10), load, start=2, workers=2, **host)) == whole[2:]


def test_bad_rows_keep_their_place_and_are_reported_once(tmp_path):
    report = tmp_path / "bad_samples.jsonl"
    records = rows(10, bad=(2, 7))
    for _ in range(2):
        seen = list(loader.iterate(records, load, batch_size=5, epochs=2, max_bad_fraction=0.2, report=report))
    clean = list(loader.iterate(rows(10), load, batch_size=5, epochs=2))
    for a, b in zip(seen, clean, strict=True):
        assert (a["row"] == b["row"]).all() and (a["mask"] == ~np.isin(a["row"], [2, 7])).all()
        assert (a["value"]["x"] == b["value"]["x"] * a["mask"][:, None, None]).all()
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    expected = [{"row": r, "path": f"v{r}.mp4", "reason": "truncated"} for r in (2, 7)]
    assert sorted(lines, key=lambda line: line["row"]) == expected


def test_too_many_bad_rows_stop_the_run():
    with pytest.raises(loader.BadRowsError, match=r"v\d.mp4: truncated"):
        list(loader.iterate(rows(10, bad=(2, 7)), load, batch_size=5, epochs=1, max_bad_fraction=0.1))
    with pytest.raises(loader.BadRowsError, match="row 2"):
        list(loader.iterate(rows(10, bad=(2,)), load, batch_size=5, epochs=1, on_bad="error"))


def test_a_batch_of_bad_rows_only_uses_the_blank():
    options = dict(batch_size=2, epochs=1, max_bad_fraction=1.0)
    bad = rows(2, bad=(0, 1))
    assert "value" not in next(loader.iterate(bad, load, **options))
    batch = next(loader.iterate(bad, load, blank=load(Row(9, "")), **options))
    assert not batch["mask"].any() and (batch["value"]["n"] == 9).all()


def broken(record):
    raise KeyError(record.row)


def test_a_bug_in_load_is_not_a_bad_row():
    with pytest.raises(KeyError):
        list(loader.iterate(rows(4), broken, batch_size=2, epochs=1))


def square(path):
    if path == "v2":
        raise VideoError(path, "empty")
    return int(path[1:]) ** 2


@pytest.mark.parametrize("workers", [0, 3])
def test_decode_many_keeps_order_and_collects_errors(workers):
    ticks = []
    paths = [f"v{i}" for i in range(6)]
    results, errors = loader.decode_many(paths, square, workers, progress=lambda *p: ticks.append(p))
    assert results == [0, 1, None, 9, 16, 25] and errors == [{"row": 2, "path": "v2", "reason": "empty"}]
    assert ticks == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_decode_ahead_yields_all_and_holds_few(workers):
    begun = []

    def count(path):
        begun.append(path)
        return square(path)

    seen = {}
    for i, (path, result, bad) in enumerate(loader.decode_ahead((f"v{i}" for i in range(20)), count, workers), 1):
        assert len(begun) <= i + workers + 1
        seen[path] = bad["reason"] if bad else result
    assert seen == {f"v{i}": "empty" if i == 2 else i * i for i in range(20)}


def test_work_ahead_waits_for_the_first_where_order_is_wanted():
    later = threading.Event()

    def work(i):
        later.wait(60) if i == 0 else later.set()
        return 10 * i

    got = loader.work_ahead(range(4), work, 2, held=3, in_order=True)
    assert list(got) == [(i, 10 * i) for i in range(4)]


def test_decode_ahead_stops_at_a_bug_and_when_nobody_wants_more():
    with pytest.raises(KeyError):
        list(loader.decode_ahead(rows(4), broken))
    begun = []
    for _ in loader.decode_ahead(range(100), begun.append, 2):
        break
    assert len(begun) <= 5


def test_importing_the_data_side_imports_neither_jax_nor_marc_jax():
    code = (
        "import sys\n"
        "from data_pipelines import decoders, loader, patches, sources, video\n"
        "bad = [m for m in ('jax', 'jaxlib', 'marc_jax', 'tensorflow', 'torch', 'grain') if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
