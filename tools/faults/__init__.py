"""What goes wrong on purpose: each module injures one thing many times and counts what was lost.

    python -m tools.faults [--only=kills,disks] [--effort=1.0] [--videos=FOLDER] [--write]

`--effort` scales the number of attempts; `--write` puts the table into docs/reliability.md. The suite runs the same
functions with few attempts.
"""
