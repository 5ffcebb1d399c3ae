"""What a benchmark prints of a row that failed."""

from tools.bench import train


def test_of_a_long_error_the_cause_is_shown(capsys):
    def fail():
        raise RuntimeError("INTERNAL: custom_partitioner" + " x" * 900 + "\nValueError: cause\n\nSuspected Python Code"
                           " Location:\n" + " y" * 900)  # fmt: skip

    assert train.attempt("row", fail) is None
    said = capsys.readouterr().out
    assert "FAILED: RuntimeError: INTERNAL: custom_partitioner" in said and said.endswith("ValueError: cause\n")
    assert len(said) < 900


def test_a_short_error_is_whole():
    assert train.brief("out of memory") == "out of memory"
