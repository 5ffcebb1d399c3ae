"""How many frames a checkpoint needs: every token of at most so many frames, and MARC at one frame's worth of them.

    for n in 4 8 16 32 64 128; do
        python -m marc_jax.eval --config=experiments/eval_frames.py:videomme,$n --checkpoint=Qwen2.5-VL-3B-Instruct \\
            --config.data.test=eval_videomme.json --config.data.root=VIDEOS --config.encoder.path=weights/pe-l14 \\
            --out=OUT/$n; done
    python -m marc_jax.evaluation.compare OUT/64 OUT/16

The paper's Qwen2.5-VL-3B (mean of six benchmarks): 42.21 at 64 frames, 38.32 at 16. Other numbers of frames are other
features: each has a memory of its own. Not measured.
"""

from experiments import eval_benchmark


def get_config(what):
    """`what`: benchmark,frames."""
    benchmark, frames = what.split(",")
    patches = int(frames) // 2
    c = eval_benchmark.get_config(benchmark)
    c.title = f"{frames} frames"
    c.data.max_frames = int(frames)
    c.data.buckets = tuple(sorted({max(patches // part, 1) for part in (8, 4, 2, 1)}))
    return c
