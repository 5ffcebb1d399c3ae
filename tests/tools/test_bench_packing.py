"""tools.bench.packing: places and padding of real questions, counted."""

import sys

from tools.bench import packing


def test_real_questions_leave_less_padding_in_packed_rows(test_data, monkeypatch, capsys):
    file, words = test_data / "annotations" / "nextqa" / "val.csv", test_data / "tokenizer" / "qwen2.5"
    given = [f"nextqa={file}", f"--tokenizer={words}", "--rows=marc:2048,full:8192", "--config.data.answer_tokens=64"]
    monkeypatch.setattr(sys, "argv", ["packing", *given])
    packing.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(name, view, count) for name, view, count, *_ in rows] == [
        ("nextqa", "marc", "200"),
        ("nextqa", "full", "200"),
    ]
    for *_, own, _, packed, _, _ in rows:
        assert float(own.rstrip("%")) < 80 < 90 < float(packed.rstrip("%")) <= 100
