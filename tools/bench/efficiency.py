"""Where a question's time goes, stage by stage: our uncompressed run, MARC cold, MARC warm, transformers.

    python -m tools.bench.efficiency --size=3b --peer --out=efficiency.json --markdown=efficiency.md
    python -m tools.bench.efficiency --size=tiny --rows=4x1,4x2 --frames=8 --new=4         # plausibility, on a CPU

Random weights and a made-up video of 1280 x 720 (or --video=FILE), 64 frames. A row CxB caps a frame pair at C visual
tokens and runs B streams; what they go through is in tools/bench/efficiency_stages.py. Each row is a section of
Markdown; how to read it is in docs/efficiency.md. `--peer` runs transformers on the same frames in a process of its
own, before ours. OPENBLAS_NUM_THREADS=1 in the environment: resizing brings its own threads.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
import traceback

import jax

from marc_jax.models import qwen25_vl
from tools.bench import efficiency_report, efficiency_stages, reference
from tools.bench.efficiency_stages import Row
from tools.bench.scenes import write_scenes

ROWS = "128x1,768x1,128x8,128x32"
ANSWERS = "1,8,44,386"  # tokens; Video-R1's mean is 386, and 44 where it thinks only when unsure (VideoAuto-R1)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["tiny", *qwen25_vl.SIZES], default="3b")
    parser.add_argument("--rows", default=ROWS, help="comma-separated CAPxBATCH")
    parser.add_argument("--video", default="", help="default: a made-up one")
    parser.add_argument("--frames", type=int, default=64, help="most frames of the video, even")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded in a pass; longer answers are reckoned")
    parser.add_argument("--answers", default=ANSWERS, help="lengths of answers in the tables")
    parser.add_argument("--repeats", type=int, default=5, help="passes of a batch of 1; 2 of larger ones")
    parser.add_argument("--peer", action="store_true", help="transformers beside ours")
    parser.add_argument("--peer_seconds", type=float, default=60.0, help="stop it then, and use the rows it has")
    parser.add_argument("--row_seconds", type=float, default=40.0, help="of measuring a row: fewer passes then")
    parser.add_argument("--keyint", type=int, help="of the made-up video: most frames from one key frame to the next")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile_threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, help="everything, as JSON")
    parser.add_argument("--markdown", type=pathlib.Path, help="what is printed")
    args = parser.parse_args(argv)
    args.answers = [int(n) for n in args.answers.split(",")]
    args.rows = [Row(*map(int, row.split("x")), args.frames) for row in args.rows.split(",")]
    return args


def note(begun: float, said: str) -> None:
    print(f"[{time.perf_counter() - begun:.0f} s] {said}", file=sys.stderr, flush=True)


def peers(args) -> dict:
    """Transformers' rows, measured in a process of its own."""
    if not args.peer:
        return {}
    flags = [f"--size={args.size}", f"--video={args.video}", f"--frames={args.frames}"]
    flags += [f"--rows={','.join(row.key for row in args.rows)}"]
    return reference.measured("tools.bench.efficiency_transformers", flags, args.peer_seconds)


def device_peak() -> int | None:
    """Most bytes ever in use on the device, of this process; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measured(served, args, row: Row, memory: pathlib.Path) -> dict | None:
    """One row; None where it fails, which must not cost the others."""
    begun = time.perf_counter()
    try:
        streams = efficiency_stages.Streams(served, args.video, row, args.new, memory, args.compile_threads)
        note(begun, f"{row.key}: compiled; passes begin")
        out = streams.measure(args.repeats if row.batch == 1 else min(2, args.repeats), args.row_seconds)
    except Exception as e:
        traceback.print_exc()
        print(f"{row.key} FAILED: {type(e).__name__}: {str(e)[:300]}", flush=True)
        return None
    out["device_peak_bytes"] = device_peak()  # of all rows so far
    spent = time.perf_counter() - begun
    print(f"{row.key}: {spent:.0f} s, {out['compile_s']:.0f} of them compiling", file=sys.stderr, flush=True)
    return out


def main(argv=None) -> int:
    args, begun = arguments(argv), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if not args.video:
            args.video = str(folder / "video.mp4")
            write_scenes(folder / "video.mp4", 720, 1280, max(4, args.frames // 2), args.keyint)
            note(begun, "the video is written")
        beside = peers(args)
        note(begun, f"transformers measured {len(beside)} rows")
        device = jax.devices()[0]
        served = efficiency_stages.serve(args.size, args.attention)
        note(begun, "the models are there")
        title = (
            f"{device.device_kind}, jax {jax.__version__}, {len(os.sched_getaffinity(0))} CPU cores, Qwen2.5-VL"
            f" {args.size}, random {served.dtype.__name__} weights, {args.frames} frames, {time.strftime('%Y-%m-%d')}"
        )
        table, text = {}, [title, ""]
        print(title + "\n", flush=True)
        for row in args.rows:
            out = measured(served, args, row, folder / row.key)
            if out is None:
                continue
            table[row.key] = out | {"transformers": beside.get(row.key)}
            text.append(efficiency_report.section(row.key, out, beside.get(row.key), args.answers))
            print(text[-1], flush=True)
            save(args, title, table, text)
    print(f"{time.perf_counter() - begun:.0f} s in all", file=sys.stderr)
    return 0 if len(table) == len(args.rows) else 1


def save(args, title: str, table: dict, text: list[str]) -> None:
    """After every row, so that a run that is stopped leaves what it has."""
    if args.out:
        threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
        args.out.write_text(json.dumps({"title": title, "OPENBLAS_NUM_THREADS": threads, "rows": table}, indent=1))
    if args.markdown:
        args.markdown.write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
