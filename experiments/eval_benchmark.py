"""A checkpoint on a published video benchmark, at every token and at one frame's worth of them.

    python -m marc_jax.eval --config=experiments/eval_benchmark.py:videomme --checkpoint=Qwen2.5-VL-3B-Instruct \\
        --config.data.test=eval_videomme.json --config.data.root=VIDEOS --config.encoder.path=weights/pe-l14 --out=OUT

The name behind the colon and data.test (the published annotations, or Video-R1's eval_<name>.json):

    vsibench      test.jsonl, or the Parquet file            videomme      test-00000-of-00001.parquet
    videommmu     the folder of <track>_video.json           mmvu          validation.json
    mvbench       the folder json/                           nextqa        val.csv
    tempcompass   the folder questions/                      qvhighlights  highlight_val_release.jsonl (retrieval)

The paper's numbers (arXiv 2510.07915, 3B): 64 frames 32.93 35.33 48.64 44.77 38.05 53.55, MARC at one frame 27.55 33.11
51.99 45.82 55.34 39.44 on VSI-Bench, VideoMMMU, MMVU, MVBench, TempCompass, Video-MME; the report has them beside ours.
Without an encoder nothing is retrieved: --arms=blind,full,whole. --skip_bad leaves out what cannot be used.
"""

from ml_collections import ConfigDict


def get_config(benchmark):
    c = ConfigDict()
    c.title = "one frame's worth of tokens"
    c.model = {"dtype": "bfloat16", "frozen_dtype": "bfloat16"}
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    c.max_new_tokens = 1024
    c.stages = ()
    c.data = ConfigDict({"fps": 2.0, "max_frames": 64, "frame_tokens": 128, "buckets": (4, 8, 16, 32), "workers": 8})
    c.data.update(question_tokens=1024, answer_tokens=16)

    c.views = ConfigDict()
    c.views.full = {"select": "all", "method": "keep"}
    c.views.marc = {"select": "retrieve", "method": "merge", "k": 3, "keep": 1}
    c.views.whole = {"select": "all", "method": "merge", "keep": 1}
    c.views.blind = {"select": "none", "method": "keep"}

    c.eval = ConfigDict({"main": "marc", "teacher": "full", "batch": 16, "rule": "benchmark", "apart": (), "arms": {}})
    c.eval.benchmark = benchmark
    for key, group, label in (
        ("full", "teacher", "64 frames, every token"),
        ("marc", "student", "retrieval, merged to one frame's tokens"),
        ("whole", "baseline", "whole video merged to one frame's tokens"),
        ("blind", "baseline", "no video"),
    ):
        c.eval.arms[key] = {"view": key, "group": group, "label": label}
    return c
