"""Packaging of marc_jax. Exact versions for each Python are in requirements/constraints-py3*.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

BASE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.3,<0.13",
    "grain>=0.2.18,<0.3",
    "array-record>=0.8.3,<0.9",
    "tensorflow-datasets>=4.9.10,<4.10",
    "ml-collections>=1.1,<2",
    "absl-py>=2.1",
    "etils[epath]>=1.12",
    "numpy>=2.0,<2.6",
    # Headless: the same cv2 without GUI libraries. 5.0 announces AV1 frames and returns none.
    "opencv-python-headless>=4.11,<5",
    "av>=16,<20",
    "pillow>=10",
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.7,<0.9",
    "tensorboardX>=2.6.4,<3",
    "rich>=13",
    "matplotlib>=3.9",
    "rouge-score>=0.1.2",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    # What google-research/scenic imports. Scenic itself is on no index (the PyPI name `scenic` is another
    # project): pip install --no-deps "scenic @ git+https://github.com/google-research/scenic@4a38d47"
    "scenic": ["tensorflow-cpu>=2.21,<2.22", "clu>=0.0.12", "tensorboard", "immutabledict"],
    # Beam holds numpy, protobuf, pillow and pyarrow back: give it an environment of its own, with
    # requirements/constraints-beam.txt in place of the other constraint files.
    "beam": ["apache-beam>=2.77"],
    "wandb": ["wandb>=0.19"],
    # Texts beyond ASCII for PE-Core's tokenizer.
    "clip": ["ftfy>=6.2,<7"],
    # Reference implementations for the conversion tests; never imported by a run.
    "parity": ["torch>=2.10", "torchvision", "transformers>=5.5,<6", "qwen-vl-utils==0.0.14"],
    # PySceneDetect stands beside our segmenter in tools/bench/events.py. It brings opencv-python, whose cv2 overwrites
    # the headless one: give it an environment of its own, without the constraint files. FAISS stands beside ours in
    # tools/bench/retrieval.py, Qwix beside our 8-bit weights in tests/models/test_packed.py.
    "bench": ["scenedetect>=0.7", "faiss-cpu>=1.9", "qwix>=0.1.8"],
    "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9"],
}

setup(
    name="marc_jax",
    version="0.1.0",
    description="Video language models that read one frame's worth of visual tokens, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["marc_jax", "marc_jax.*", "data_pipelines", "data_pipelines.*"]),
    package_data={"": ["*.json", "*.txt", "*.html"]},
    python_requires=">=3.11,<3.13",
    install_requires=BASE,
    extras_require=EXTRAS,
)
