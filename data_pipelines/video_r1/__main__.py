"""Builds a TFDS data set of a question file in Video-R1's schema.

    python -m data_pipelines.video_r1 Video-R1-260k.json --root=VIDEOS --out=DATA [--media=bytes] [--skip_bad]
"""

import argparse
import sys

from data_pipelines.benchmarks.read import BadRows
from data_pipelines.rows import RecordError
from data_pipelines.video_r1.builder import MEDIA, build


def main(argv=None) -> int:
    """0, or 2 where something must be mended first."""
    parser = argparse.ArgumentParser(prog="data_pipelines.video_r1", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="JSON list or JSON lines")
    parser.add_argument("--root", required=True, help="the folder that paths are relative to")
    parser.add_argument("--out", required=True, help="the set comes into <out>/video_r1/1.0.0")
    parser.add_argument("--split", default="train")
    parser.add_argument("--media", choices=MEDIA, default="path", help="keep paths, or the encoded files")
    parser.add_argument("--skip_bad", action="store_true", help="leave out rows that cannot be used")
    args = parser.parse_args(argv)
    try:
        folder, left = build(
            args.file, root=args.root, out=args.out, split=args.split, media=args.media, skip_bad=args.skip_bad
        )
    except (BadRows, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for error in left:
        print(f"left out: {error}", file=sys.stderr)
    print(f"{folder}" + (f", {len(left)} rows left out" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
