"""MARC on Qwen2.5-VL-7B and files of one's own: `experiments/marc_qwen25vl_3b.py` at the next size.

    python -m marc_jax.train --config=experiments/marc_qwen25vl_7b.py --workdir=runs/7b \\
        --config.init_from=Qwen2.5-VL-7B-Instruct --config.encoder.path=weights/pe-l14 \\
        --config.data.train=Video-R1-260k.json --config.sft.file=Video-R1-COT-165k.json \\
        --config.data.root=VIDEOS --config.data.test=eval_videomme.json

Run from the root of the source tree (or with it on PYTHONPATH): this file takes the other's settings.

Computed, not measured: 7.66 B trained parameters with Adam's moments and gradients in float32 take 114 GiB, the frozen
tower and the teacher in bfloat16 17 GiB: 131 GiB in all, before activations. So not one H200 (139 GiB): two, or 16 TPU
chips of 16 GiB (8.2 GiB each, before activations), split by fsdp.
"""

from experiments import marc_qwen25vl_3b


def get_config():
    return marc_qwen25vl_3b.get_config("7b")
