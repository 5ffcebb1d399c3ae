"""The converter: pickles, kills, memory, exit codes. (Forms of safetensors: tests/models/test_weights.py.)"""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from marc_jax import checkpoint
from marc_jax.models import qwen25_vl, weights
from marc_jax.models.safetensors_io import write_folder
from tools import convert_weights, export_weights, scratch

CFG = qwen25_vl.tiny(tie_word_embeddings=False)


def _random(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), qwen25_vl.describe(cfg))


def _model(folder, cfg=CFG, seed=0):
    """A published folder of random weights -> its parameters."""
    folder.mkdir()
    params = _random(cfg, seed)
    (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg)))
    rows = [(n, np.dtype(np.float32), s) for n, s in weights.published_shapes(cfg).items()]
    write_folder(folder, rows, weights.published(cfg, params, np.float32))
    return params


def _convert(source, out, *more):
    return convert_weights.main([f"--source={source}", f"--out={out}", *more])


def _restored(out, cfg=CFG, dtype=np.float32):
    return checkpoint.restore(out, {"params": qwen25_vl.abstract(cfg, dtype)}, partial=True)[0]["params"]


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _torch_state(params, dtype):
    torch = pytest.importorskip("torch", reason="torch reads and writes the pickles")
    tensors = weights.published(CFG, params, np.float32)
    return {name: torch.from_numpy(np.array(t)).to(getattr(torch, dtype)) for name, t in tensors}


def _pickled(folder, form, dtype="float32"):
    """A folder whose weights are torch pickles -> its parameters."""
    torch = pytest.importorskip("torch", reason="torch reads and writes the pickles")
    params = _model(folder)
    (folder / "model.safetensors").unlink()
    state = _torch_state(params, dtype)
    if form == "shards":
        names, where = list(state), {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / file)
            where |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        torch.save({"state_dict": state} if form == "model.pth" else state, folder / form)
    return params


@pytest.mark.parametrize("form", ["pytorch_model.bin", "shards", "model.pth"])
def test_torch_pickles_convert(tmp_path, form):
    params = _pickled(tmp_path / "model", form)
    (tmp_path / "model" / "training_args.bin").write_bytes(b"what a trainer leaves beside the weights")
    assert _convert(tmp_path / "model", tmp_path / "out", "--dtype=float32") == 0
    _same(_restored(tmp_path / "out"), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_torch_pickles_of_every_precision_convert(tmp_path, dtype):
    params = _pickled(tmp_path / "model", "pytorch_model.bin", dtype)
    assert _convert(tmp_path / "model", tmp_path / "out", "--dtype=float32") == 0
    rounded = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    _same(_restored(tmp_path / "out"), jax.tree.map(lambda x: x.astype(rounded).astype(np.float32), params))


class _Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _malicious(folder, torch):
    torch.save({"model.norm.weight": _Malicious(folder / "ran")}, folder / "pytorch_model.bin")


def _old_malicious(folder, torch):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Malicious(folder / "ran")))


def _truncated(folder, torch):
    raw = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])


def _no_tensor(folder, torch):
    torch.save({"model.norm.weight": "text"}, folder / "pytorch_model.bin")


def _wrong_dtype(folder, torch):
    torch.save({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}, folder / "pytorch_model.bin")


def _wrong_shape(folder, torch):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(state | {"model.norm.weight": torch.zeros(65)}, folder / "pytorch_model.bin")


BAD_PICKLES = [
    (_malicious, "refused, it is more than tensors"),
    (_old_malicious, "not a torch checkpoint"),
    (_truncated, "not a torch checkpoint"),
    (lambda f, _: (f / "pytorch_model.bin").write_bytes(b""), "not a torch checkpoint"),
    (lambda f, torch: torch.save([1, 2], f / "pytorch_model.bin"), "holds list, not a table of tensors"),
    (_no_tensor, "model.norm.weight is str, not a tensor"),
    (_wrong_dtype, "tensor model.norm.weight has dtype int32"),
    (_wrong_shape, "tensor model.norm.weight has shape (65,), expected (64,)"),
]


@pytest.mark.parametrize("damage,reason", BAD_PICKLES, ids=[damage.__name__ for damage, _ in BAD_PICKLES])
def test_a_bad_pickle_is_one_line_runs_nothing_and_leaves_nothing(tmp_path, capsys, damage, reason):
    torch = pytest.importorskip("torch", reason="torch reads and writes the pickles")
    _pickled(tmp_path / "model", "pytorch_model.bin")
    damage(tmp_path / "model", torch)
    assert _convert(tmp_path / "model", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert reason in err and str(tmp_path / "model") in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "ran").exists()


def test_without_torch_a_pickle_says_what_to_install(tmp_path, capsys, monkeypatch):
    _model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _convert(tmp_path / "model", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "pytorch_model.bin: a torch pickle, and torch is not installed" in err and err.count("\n") == 1


def test_safetensors_convert_without_loading_torch(tmp_path):
    _model(tmp_path / "model")
    code = "import sys; from tools import convert_weights as c; print(c.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = _python("-c", code, f"--source={tmp_path / 'model'}", f"--out={tmp_path / 'out'}")
    assert done.stdout.splitlines()[-1] == "0 False"


def _python(*arguments, **options):
    repo = pathlib.Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": str(repo), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    options = {"cwd": repo, "env": environment, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, *arguments], **options)


def test_the_command_says_what_it_takes_and_how_far_it_is(tmp_path):
    text = _python("-m", "tools.convert_weights", "--help")
    assert text.returncode == 0 and "--source" in text.stdout and "Exit codes: 0 converted; 2" in text.stdout
    assert _python("-m", "tools.convert_weights", "--source=x").returncode == 2  # --out is missing
    _model(tmp_path / "model")
    arguments = (f"--source={tmp_path / 'model'}", f"--out={tmp_path / 'out'}")
    done = _python("-m", "tools.convert_weights", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    paths = weights.flatten(qwen25_vl.describe(CFG))
    assert {line.split("%  ")[1] for line in lines[:-1]} == set(paths)
    assert lines[-1].endswith(f"parameters -> {tmp_path / 'out'}")
    again = _python("-m", "tools.convert_weights", *arguments)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1] == f"convert_weights: {tmp_path / 'out'}: exists and is not empty"


# Slow enough, once it is half way, to be stopped there.
SLOW = """
import pathlib, sys, time
from tools import convert_weights
def progress(path, done, total):
    if done > total / 2:
        print("half", flush=True)
        time.sleep(0.5)
convert_weights.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "float32", progress)
"""


def _stopped_half_way(source, out, sent):
    repo = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", SLOW, str(source), str(out)]
    with subprocess.Popen(command, cwd=repo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"half\n", child.stderr.read()
        child.send_signal(sent)
        child.communicate(timeout=120)
        return child.returncode


def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_the_next_one_tidies_up(tmp_path, capsys):
    params = _model(tmp_path / "model")
    out = tmp_path / "out"
    assert _stopped_half_way(tmp_path / "model", out, signal.SIGKILL) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", ".out.partial", "model"]
    assert checkpoint.steps(out) == checkpoint.steps(tmp_path / ".out.partial") == []
    assert _convert(tmp_path / "model", out, "--dtype=float32") == 0
    assert f"removing {tmp_path / '.out.partial'}, left by a run that was killed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    _same(_restored(out), params)


@pytest.mark.parametrize("sent,code", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_conversion_asked_to_stop_takes_its_scratch_away(tmp_path, sent, code):
    _model(tmp_path / "model")
    assert _stopped_half_way(tmp_path / "model", tmp_path / "out", sent) == code
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_conversions_into_one_folder_do_not_mix(tmp_path, capsys):
    _model(tmp_path / "model")
    with scratch.whole(tmp_path / "out") as folder:
        assert _convert(tmp_path / "model", tmp_path / "out") == 2
        assert "out is being written by process" in capsys.readouterr().err
        (folder / "mine").write_text("")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_source_that_cannot_be_written_out_leaves_nothing(tmp_path, capsys, monkeypatch):
    _model(tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.manifest, "write", full)
    assert _convert(tmp_path / "model", tmp_path / "out") == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# One copy of the model is 340 MiB: the peak above what imports take must stay well below it.
LARGE = dict(
    vocab_size=16384, hidden_size=1024, num_layers=10, num_heads=8, num_kv_heads=2, intermediate_size=4096,
    vision_depth=4, vision_hidden_size=512, vision_num_heads=8, tie_word_embeddings=False,
)  # fmt: skip
PEAK = """
import pathlib, sys, threading, time
import jax
from marc_jax import checkpoint, pretrained, sharding
from marc_jax.models import qwen25_vl
from tools import convert_weights

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

jax.devices()
what, source, out = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
peak = base = resident()

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
if what == "convert":
    convert_weights.convert(source, out, "bfloat16")
else:
    cfg = pretrained.config(source)
    target = qwen25_vl.abstract(cfg, jax.numpy.bfloat16, sharding.make_mesh(1, 8, 1))
    params = pretrained.load(source, cfg, target)
    jax.block_until_ready(params)
print((peak - base) // 2**20)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(folder of a bfloat16 model, its size in MiB)."""
    cfg = qwen25_vl.tiny(**LARGE)
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(weights.hf_config(cfg, "bfloat16")))
    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = weights.published_shapes(cfg)
    noise = np.random.default_rng(0).standard_normal(2**25, np.float32).astype(bf16)
    numbers = ((name, noise[: np.prod(shape)].reshape(shape)) for name, shape in shapes.items())
    write_folder(folder, [(name, bf16, shape) for name, shape in shapes.items()], numbers, 10**8)
    return folder, sum(int(np.prod(shape)) for shape in shapes.values()) * 2 // 2**20


def _peak(what, source, out):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to read resident memory")
    done = _python("-c", PEAK, what, str(source), str(out))
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_peak_memory_of_conversion_is_well_under_one_copy(large, tmp_path):
    source, size = large
    assert size > 300
    peak = _peak("convert", source, tmp_path / "out")
    print(f"model {size} MiB, conversion {peak} MiB above imports")
    assert peak < 0.75 * size
    loaded = _peak("load", tmp_path / "out", "-")
    print(f"from Orbax onto 8 devices {loaded} MiB")
    assert loaded < 2.5 * size  # the result is one of these copies; how many parts are read at once varies


def test_peak_memory_of_loading_is_the_result_and_little_more(large):
    source, size = large
    peak = _peak("load", source, "-")
    print(f"model {size} MiB, onto 8 devices {peak} MiB")
    assert peak < 1.5 * size


def test_the_tokenizer_travels_with_the_model(tmp_path):
    _model(tmp_path / "model", seed=1)
    for name in ("generation_config.json", "chat_template.json"):
        (tmp_path / "model" / name).write_text('{"eos_token_id": [2, 0]}')
    assert _convert(tmp_path / "model", tmp_path / "orbax") == 0
    assert export_weights.main([f"--checkpoint={tmp_path / 'orbax'}", f"--out={tmp_path / 'back'}"]) == 0
    for name in ("generation_config.json", "chat_template.json"):
        assert (tmp_path / "back" / name).read_text() == (tmp_path / "model" / name).read_text()
