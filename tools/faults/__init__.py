"""What goes wrong on purpose: each module injures one thing many times and counts what was lost.

    python -m tools.faults [--only=killed,full] [--effort=1.0] [--minutes=120] [--videos=FOLDER] [--write]

`--effort` scales the attempts, `--minutes` is the length of the soak, `--write` puts the table into
docs/reliability.md. The suite runs the same functions with few attempts (tests/tools/test_faults.py).
"""
