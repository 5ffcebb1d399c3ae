"""Eight simulated CPU devices for every test, and the folder of real files."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: without optimisation a training step compiles in an eighth of the time.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment runs every test on fully optimised programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = {"xla_force_host_platform_device_count": "8"}
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib").startswith("0.10."):
    flags["xla_cpu_use_fusion_emitters"] = "false"  # later versions do not know it, and an unknown flag aborts
for name, value in flags.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(os.environ.get("TMPDIR", "/tmp"), "hypothesis"))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parent.parent

# Compilation makes first examples slow: no deadline. The same examples on every run: no flakes.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    """The root of the source tree."""
    return REPO


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The folder of real videos, annotations and tokenizers; the test is skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("MARC_JAX_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real test files at {folder} (set MARC_JAX_TEST_DATA)")
    return folder
