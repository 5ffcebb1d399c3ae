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

import cpu_torchvision  # noqa: E402
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


@pytest.fixture(scope="session")
def qwen_vl_utils():
    """qwen-vl-utils' vision_process, reading videos through PyAV; the test is skipped where it is not installed."""
    torch = pytest.importorskip("torch", reason="torch is the [parity] extra")
    if not cpu_torchvision.load():
        pytest.skip("torchvision is the [parity] extra")
    module = pytest.importorskip("qwen_vl_utils.vision_process", reason="qwen-vl-utils is the [parity] extra")

    def read(element):
        import av

        with av.open(element["video"]) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        first, last, total = module.calculate_video_frame_range(element, len(frames), fps)
        count = module.smart_nframes(element, total_frames=total, video_fps=fps)
        index = torch.linspace(first, last, count).round().long().tolist()
        video = torch.stack([torch.from_numpy(frames[i]).permute(2, 0, 1) for i in index])
        metadata = {"fps": fps, "frames_indices": index, "total_num_frames": total, "video_backend": "pyav"}
        return video, metadata, count / total * fps

    module.VIDEO_READER_BACKENDS["pyav"] = read
    module.get_video_reader_backend = lambda: "pyav"
    return module


@pytest.fixture
def plain_cudnn(monkeypatch):
    """The "cudnn" backend where there is none: the calls of its kernel, as shapes (q, k), computed by XLA."""
    import jax

    plain, calls = jax.nn.dot_product_attention, []

    def call(q, k, v, *, implementation, **how):
        assert implementation == "cudnn"
        calls.append((q.shape, k.shape))
        return plain(q, k, v, **how, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return calls


@pytest.fixture
def lowered_cudnn(monkeypatch):
    """Lets programs with the cuDNN kernels be traced and lowered where there is no GPU."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda _: False)
