"""A short form of every drill of `python -m tools.faults`: nothing may be lost."""


import pytest

from tools.faults import __main__ as faults
from tools.faults import damage, disks, drill, kills, numbers, peers, soak


def check(found):
    for outcome in found if isinstance(found, list) else [found]:
        assert outcome.attempts and not outcome.lost, (outcome.fault, outcome.problems)


# The others are slow: tests/test_checkpoint.py has signals and disks without a whole run.
SHORT = {
    kills.killed: 2,
    kills.killed_in_commit: 1,
    disks.full: 1,
    disks.read_only: 2,
    damage.checkpoints: 10,
    damage.memories: 200,
    damage.annotations: 600,
    numbers.spoilt: 2,
    numbers.too_many: 1,
    numbers.resharded: 2,
    peers.equal: 1,
    peers.dead: 1,
}


def drills() -> list:
    slow = {function: () if function in SHORT else pytest.mark.slow for function, _ in faults.DRILLS.values()}
    return [pytest.param(f, SHORT.get(f, 1), id=name, marks=slow[f]) for name, (f, _) in faults.DRILLS.items()]


@pytest.mark.parametrize(("function", "count"), drills())
def test_nothing_is_lost(tmp_path, function, count):
    check(function(tmp_path, count))


def test_train_and_evaluate_and_index_grow_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "STEPS", 3)
    check(soak.soak(tmp_path, 2))


def test_the_table_keeps_what_was_not_measured_again(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{faults.BEGIN}{faults.END}after\n")
    monkeypatch.setattr(faults, "PAGE", page)
    for fault, lost in (("a", 0), ("b", 1), ("a", 2)):
        faults.write([faults.row(drill.Outcome(fault, "holds", 5, 5 - lost), "today")])
    table = page.read_text().removeprefix(f"before\n{faults.BEGIN}{faults.HEAD}").removesuffix(f"{faults.END}after\n")
    assert table == "| a | holds | 5 | 3 | 2 | today |\n| b | holds | 5 | 4 | 1 | today |\n"
