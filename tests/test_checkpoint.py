import asyncio
import errno
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from marc_jax import checkpoint, manifest, optim, state

REPO = pathlib.Path(__file__).resolve().parent.parent
TX = optim.make({"learning_rate": 0.1, "weight_decay": 0.1}, 10)


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "text/layers/attn/q/kernel": jax.random.normal(keys[0], (2, 8, 16)),
        "text/norm/scale": jax.random.normal(keys[1], (8,), jnp.bfloat16),
    }
    frozen = {"vision/patch_embed/kernel": jax.random.normal(keys[2], (16, 8))}
    return state.create(TX, params, frozen, key=jax.random.key(seed + 10))


def shapes(tree, mesh=None):
    """Abstract state; with a mesh every matrix is split along its last axis."""

    def shape(x):
        spec = (
            jax.sharding.PartitionSpec(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else jax.sharding.PartitionSpec()
        )
        sharding = None if mesh is None else jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return state.abstract(TX, jax.tree.map(shape, tree.params), jax.tree.map(shape, tree.frozen), mesh=mesh)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def meshes():
    return {n: jax.make_mesh((n,), ("fsdp",), devices=jax.devices()[:n]) for n in (1, 4, 8)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 10, 20, 30 of three different states. Copy before damaging."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for step in (10, 20, 30):
        checkpoint.save(folder, step, make_state(step), {"data": {"next": step * 2}})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def files(folder, step):
    return sorted(p for p in (folder / f"step_{step:08d}").rglob("*") if p.is_file())


def test_everything_comes_back_bit_for_bit_with_its_meta(saved):
    tree, meta = checkpoint.restore(saved, shapes(make_state()))
    assert_same_bits(tree, make_state(30))
    assert meta == {"data": {"next": 60}}
    tree, meta = checkpoint.restore(saved, make_state(), step=10)
    assert_same_bits(tree, make_state(10))
    assert checkpoint.steps(saved) == [10, 20, 30] and checkpoint.latest(saved) == 30
    assert checkpoint.read_meta(saved, 20) == {"data": {"next": 40}}


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_of_every_kind(tmp_path, kind):
    tree = {"key": jax.random.split(jax.random.key(3, impl=kind), 2), "plain": 4, "numpy": np.arange(3)}
    checkpoint.save(tmp_path, 1, tree)
    back, _ = checkpoint.restore(tmp_path, tree)
    assert back["key"].dtype == tree["key"].dtype and int(back["plain"]) == 4
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))


def test_another_mesh_gets_the_same_bits(tmp_path):
    tree, mesh = make_state(), meshes()
    checkpoint.save(tmp_path, 1, tree)
    for step, devices in enumerate((8, 4, 1, 8), start=1):
        abstract = shapes(tree, mesh[devices])
        got, _ = checkpoint.restore(tmp_path, abstract)
        assert_same_bits(got, tree)
        kernel = got.params["text/layers/attn/q/kernel"]
        assert kernel.sharding == abstract.params["text/layers/attn/q/kernel"].sharding
        assert len(kernel.addressable_shards) == devices
        checkpoint.save(tmp_path, step + 1, got)


def test_flat_and_nested_trees_are_the_same_checkpoint(saved):
    want = make_state(30)
    nested = optim.unflatten({p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in want.params.items()})
    tree, _ = checkpoint.restore(saved, {"params": nested}, partial=True)
    assert_same_bits(optim.flatten(tree["params"]), want.params)


def test_the_arrays_are_an_ordinary_orbax_checkpoint(saved):
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(saved.absolute() / "step_00000030/tree")
    np.testing.assert_array_equal(tree["params"]["text"]["norm"]["scale"], make_state(30).params["text/norm/scale"])


def test_old_steps_go_only_after_the_new_one_is_there(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"x": jnp.arange(step)}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    checkpoint.save(tmp_path, 5, {"x": jnp.arange(5)}, keep=None)
    assert checkpoint.steps(tmp_path) == [3, 4, 5]
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000004", "step_00000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 7, {"x": jnp.full(3, value)}, {"value": value})
    tree, meta = checkpoint.restore(tmp_path, {"x": jnp.zeros(3)})
    assert meta == {"value": 2.0} and np.all(tree["x"] == 2.0)


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    tree = make_state(5)
    want = jax.tree.map(lambda x: x + 0 if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    update = jax.jit(lambda params: jax.tree.map(lambda x: x * 0 - 1, params), donate_argnums=0)
    pending = checkpoint.save(tmp_path, 1, tree, wait=False)
    for _ in range(3):
        update(dict(tree.params)) if not tree.params["text/norm/scale"].is_deleted() else None
    pending.wait()
    got, _ = checkpoint.restore(tmp_path, shapes(want))
    assert_same_bits(got, want)


# Damage.


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete", "zero"])
def test_every_damaged_file_is_found_and_named_and_the_step_before_is_used(copy, harm, caplog):
    for path in files(copy, 30):
        original = path.read_bytes()
        if not original and harm != "delete":
            continue
        damage(path, harm, random.Random(0))
        name = str(path.relative_to(copy / "step_00000030"))
        assert name in checkpoint.check(copy, 30), name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(original)
        assert checkpoint.check(copy, 30) is None
    damage(files(copy, 30)[-1], harm, random.Random(1))
    tree, meta = checkpoint.restore(copy, shapes(make_state()))
    assert_same_bits(tree, make_state(20))
    assert meta == {"data": {"next": 40}} and checkpoint.latest(copy) == 20
    with pytest.raises(checkpoint.CheckpointError, match="step 30: .*(SHA-256 differs|bytes, not|missing)"):
        checkpoint.restore(copy, shapes(make_state()), step=30)


def damage(path, harm, rng):
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif harm == "zero":
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes(x ^ 0xFF for x in data[at : at + 64])
    elif harm == "cut":
        data = data[: len(data) // 2]
    elif harm == "empty":
        data = b""
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(bytes(data))


def test_two_hundred_random_injuries_none_is_silent(copy):
    rng = random.Random(0)
    victims = [p for p in files(copy, 30) if p.stat().st_size]
    for _ in range(200):
        path = rng.choice(victims)
        original = path.read_bytes()
        harm = rng.choice(["flip", "zero", "cut", "delete", "swap"])
        if harm == "swap":
            other = rng.choice([p for p in victims if p.read_bytes() != original])
            swapped = other.read_bytes()
            path.write_bytes(swapped), other.write_bytes(original)
            assert checkpoint.check(copy, 30) is not None
            other.write_bytes(swapped)
        else:
            damage(path, harm, rng)
            assert checkpoint.check(copy, 30) is not None
        path.write_bytes(original)
    assert checkpoint.check(copy, 30) is None


def test_a_step_under_another_number_or_from_another_format_is_refused(copy):
    (copy / "step_00000030").rename(copy / "step_00000040")
    assert checkpoint.check(copy, 40) == "manifest.json is that of step 30"
    assert checkpoint.latest(copy) == 20


def test_sizes_alone_find_cuts_but_not_flips(copy):
    path = max(files(copy, 30), key=lambda p: p.stat().st_size)
    damage(path, "flip", random.Random(0))
    assert checkpoint.check(copy, 30, "size") is None and checkpoint.check(copy, 30, "full") is not None
    damage(path, "cut", random.Random(0))
    assert "bytes, not" in checkpoint.check(copy, 30, "size") and checkpoint.check(copy, 30, "off") is None
    with pytest.raises(ValueError, match="verify='fast'"):
        checkpoint.check(copy, 30, "fast")


def test_damage_that_nothing_checked_still_falls_back(copy):
    for path in files(copy, 30):
        if "manifest.ocdbt" in path.name:
            damage(path, "cut", random.Random(0))
    tree, _ = checkpoint.restore(copy, shapes(make_state()), verify="off")
    assert_same_bits(tree, make_state(20))


def test_nothing_half_written_is_ever_picked(copy):
    shutil.copytree(copy / "step_00000030", copy / ".step_00000040.partial")
    shutil.copytree(copy / "step_00000030", copy / ".step_00000005.old")
    (copy / "step_00000050").mkdir()
    (copy / "step_50").mkdir()
    (copy / "notes.txt").write_text("mine")
    assert checkpoint.latest(copy) == 30
    _, meta = checkpoint.restore(copy, shapes(make_state()))
    assert meta["data"]["next"] == 60
    checkpoint.save(copy, 40, make_state(4))
    assert not (copy / ".step_00000040.partial").exists() and checkpoint.latest(copy) == 40


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None and checkpoint.steps(tmp_path) == []
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in .*absent"):
        checkpoint.restore(tmp_path / "absent", {})
    with pytest.raises(checkpoint.CheckpointError, match="step 3: does not exist"):
        checkpoint.restore(tmp_path, {}, step=3)
    with pytest.raises(checkpoint.CheckpointError, match="mount the bucket"):
        checkpoint.save("gs://bucket/run", 1, {})


# Another model.


def test_a_tree_that_does_not_fit_names_the_paths_and_the_config_keys(tmp_path):
    config = {"model": {"width": 8, "layers": 2}, "seed": 0}
    checkpoint.save(
        tmp_path, 1, {"a": {"x": jnp.ones((2, 3)), "y": jnp.ones(4), "old": jnp.ones(1)}}, {"config": config}
    )
    here = {"a": {"x": jnp.ones((2, 5)), "y": jnp.ones(4, jnp.bfloat16), "new": jnp.ones(1)}}
    with pytest.raises(checkpoint.CheckpointError) as e:
        checkpoint.restore(tmp_path, here, config={"model": {"width": 16, "layers": 2}, "seed": 0})
    for text in (
        "a/x is float32[2, 3] in the checkpoint, float32[2, 5] in this run",
        "a/y is float32[4] in the checkpoint, bfloat16[4] in this run",
        "a/new is not in the checkpoint",
        "a/old is only in the checkpoint",
        "config.model.width was 8, is 16",
    ):
        assert text in str(e.value)
    assert "layers" not in str(e.value) and e.value.exit_code == 2


def test_many_differences_are_counted_not_listed(tmp_path):
    checkpoint.save(tmp_path, 1, {f"p{i}": jnp.ones(1) for i in range(30)})
    with pytest.raises(checkpoint.CheckpointError, match="and 25 more"):
        checkpoint.restore(tmp_path, {f"p{i}": jnp.ones(2) for i in range(30)})


# Disks.


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_named_and_earlier_steps_stay(copy, monkeypatch, wait):
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(checkpoint.CheckpointError) as e:
        pending = checkpoint.save(copy, 40, make_state(), wait=wait)
        pending.wait()
    assert "step 40, was not saved: no space left on the disk; step 30 is intact" in str(e.value)
    assert e.value.exit_code == 1 and sorted(os.listdir(copy))[0] == "step_00000010"
    monkeypatch.undo()
    checkpoint.save(copy, 40, make_state(40))
    assert checkpoint.latest(copy) == 40


def test_a_really_full_disk(tmp_path):
    """A 3 MB file system in memory, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("not allowed to mount a small file system")
    try:
        tree = {"x": jax.random.normal(jax.random.key(0), (500_000,))}
        checkpoint.save(small, 1, tree)
        with pytest.raises(checkpoint.CheckpointError, match="no space left on the disk; step 1 is intact"):
            checkpoint.save(small, 2, tree)
        assert os.listdir(small) == ["step_00000001"]
        assert_same_bits(checkpoint.restore(small, tree)[0], tree)
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_comes_late_of_a_save_that_failed_is_no_stack_trace():
    code = (
        "from marc_jax import checkpoint\n"
        "class Late:\n"
        "    def __init__(self, text):\n        self.text = text\n"
        "    def __del__(self):\n        raise RuntimeError(self.text)\n"
        "Late('Event loop is closed'), Late('something else')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "something else" in done.stderr and "closed" not in done.stderr


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        checkpoint.CheckpointError, match="was not saved: (Not a directory|File exists); no earlier step"
    ):
        checkpoint.save(tmp_path / "file" / "run", 1, {"x": jnp.ones(1)})


# Processes.

WORKER = """
    import sys, time
    import jax, jax.numpy as jnp
    from marc_jax import checkpoint, interrupt

    folder, last = sys.argv[1], int(sys.argv[2])
    shape = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    start = checkpoint.latest(folder) or 0
    tree = checkpoint.restore(folder, shape, start)[0] if start else {"x": jnp.zeros(1000)}
    advance = jax.jit(lambda t, s: {"x": t["x"] * 1.01 + jnp.sin(s + jnp.arange(1000.0))})
    from marc_jax import config

    def main():
        global tree
        with interrupt.Interrupt() as stop:
            for step in range(start + 1, last + 1):
                tree = advance(tree, step)
                checkpoint.save(folder, step, tree, {"step": step})
                print(step, flush=True)
                if stop.requested():
                    stop.stop(step)

    config.run_main(main, argv=sys.argv[:1])
"""


def launch(tmp_path, folder, last):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(last)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_step_border_with_the_step_saved(tmp_path, number, code):
    process = launch(tmp_path, tmp_path / "run", 10_000)
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    last = int((out.split() or ["1"])[-1])
    assert process.returncode == code
    assert f"stopped after step {last}, which is saved" in err and "Traceback" not in err
    assert checkpoint.latest(tmp_path / "run") == last


def test_the_second_signal_ends_it_at_once(tmp_path):
    code = (
        "import os, signal, time\nfrom marc_jax.interrupt import Interrupt\n"
        "with Interrupt() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop.requested()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM and "at once" in done.stderr


def test_the_second_signal_needs_no_main_thread():
    code = (
        "import ctypes\nfrom marc_jax.interrupt import Interrupt\n"
        "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "with Interrupt():\n"
        "    lock(mutex)\n    print('ready', flush=True)\n    lock(mutex)\n"  # waits forever, outside of Python
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    for expected in ("stopping after this step", "stopped at once"):
        process.send_signal(signal.SIGINT)
        assert any(expected in line for line in process.stderr)
    assert process.wait(20) == 130
    process.communicate()


def test_the_manifest_says_what_is_inside(saved):
    text = (saved / "step_00000010/manifest.json").read_text()
    facts = json.loads(text.rpartition("\n")[0])
    assert facts["step"] == 10 and facts["leaves"]["params/text/norm/scale"] == [[8], "bfloat16"]
    assert "meta.json" in facts["files"] and all(len(sha) == 64 for _, sha in facts["files"].values())


def test_a_checkpoint_of_the_first_version_is_read_by_this_one():
    import make_golden_checkpoint as made

    want = made.golden()
    got, meta = checkpoint.restore(made.FOLDER, want, 7)
    assert meta == made.META and got.params.keys() == want.params.keys()
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-6)


def test_writes_that_fail_beside_the_first_one_leave_no_stack_traces(caplog):
    """A full disk fails many writes; asyncio logs each whose error nobody fetched. Other programs' tasks stay heard."""

    def abandoned(filename):
        scope = {}
        exec(compile("async def write():\n    raise OSError('No space left on device')", filename, "exec"), scope)

        async def main():
            task = asyncio.ensure_future(scope["write"]())
            await asyncio.sleep(0)
            del task
            gc.collect()

        asyncio.run(main())

    abandoned("/somewhere/orbax/checkpoint/serialization.py")
    assert not caplog.records
    abandoned("/somewhere/else.py")
    assert [record.name for record in caplog.records] == ["asyncio"]
