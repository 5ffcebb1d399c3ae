"""A short form of every drill of `python -m tools.faults`: nothing may be lost."""


import pytest

from tools.faults import __main__ as faults
from tools.faults import damage, disks, drill, kills, numbers, peers, soak


@pytest.fixture(autouse=True)
def plain_programs(monkeypatch):
    """Processes of the drills choose their own number of devices."""
    monkeypatch.delenv("XLA_FLAGS")


def check(found):
    for outcome in found if isinstance(found, list) else [found]:
        assert outcome.attempts and not outcome.lost, (outcome.fault, outcome.problems)


SHORT = [
    (kills.killed, 2),
    (kills.killed_in_commit, 1),
    (kills.signalled, 1),
    (kills.interrupted_twice, 1),
    (disks.full, 1),
    (disks.limited, 1),
    (disks.read_only, 2),
    (disks.cleared, 1),
    (damage.checkpoints, 20),
    (damage.memories, 200),
    (damage.annotations, 600),
    (numbers.spoilt, 2),
    (numbers.too_many, 1),
    (numbers.resharded, 3),
    (peers.equal, 1),
]


@pytest.mark.parametrize(("function", "count"), SHORT, ids=lambda x: getattr(x, "__name__", ""))
def test_nothing_is_lost(tmp_path, function, count):
    check(function(tmp_path, count))


def test_a_process_that_dies_ends_the_other(tmp_path):
    check(peers.dead(tmp_path, 1))


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


def test_every_drill_has_its_short_form():
    short = {function for function, _ in SHORT} | {peers.dead, peers.one_signalled}
    assert {function for function, _ in faults.DRILLS.values()} == short
