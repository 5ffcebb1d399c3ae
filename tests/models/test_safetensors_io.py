"""Safetensors files that are not what they say: every one is a single line that names file and tensor."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_jax.models.safetensors_io import INDEX, File, WeightsError, open_folder, write_file, write_folder

ROWS = [("a", np.dtype(np.float32), (3, 4)), ("b", np.dtype(np.float16), (5,))]


def _arrays():
    return {name: np.arange(np.prod(shape)).reshape(shape).astype(dtype) for name, dtype, shape in ROWS}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, ROWS, iter(_arrays().items()))
    return path


def _rewrite(path, change, length=None):
    """The file with its header passed through `change`, and a header length that may lie."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + raw[8 + n :])


def _set(name, **fields):
    return lambda header: header[name].update(fields)


BAD = [
    (_set("b", dtype="I64"), "tensor b has dtype I64; known: BF16, F16, F32, F64"),
    (_set("b", dtype=["F16"]), r"tensor b has dtype \['F16'\]"),
    (_set("a", dtype="F64"), r"tensor a: 48 bytes do not hold F64\[3, 4\]"),
    (_set("a", shape=[3, 5]), r"tensor a: 48 bytes do not hold F32\[3, 5\]"),
    (_set("a", shape=[-3, -4]), "tensor a: corrupt header entry"),
    (_set("a", shape=[3.0, 4]), "tensor a: corrupt header entry"),
    (_set("a", shape=None), "tensor a: corrupt header entry"),
    (_set("a", data_offsets=["0", "48"]), "tensor a: corrupt header entry"),
    (_set("a", data_offsets=[48, 0]), "tensor a: corrupt header entry"),
    (_set("b", data_offsets=[38, 48]), "corrupt header: tensor b overlaps a"),
    (_set("b", data_offsets=[148, 158]), "truncated: tensor b ends at byte 158 of 58"),
    (lambda h: h.pop("b") and None, r"10 bytes after the last tensor \(a\) belong to none"),
    (lambda h: h.pop("a") and None, "corrupt header: tensor b leaves a gap of 48 bytes to the header"),
    (lambda h: [h], "not a safetensors file"),
    (lambda h: h.update(c=7), "tensor c: corrupt header entry"),
]


@pytest.mark.parametrize("change,reason", BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_header_that_lies_is_refused(path, change, reason):
    _rewrite(path, change)
    with pytest.raises(WeightsError, match=rf"x\.safetensors: {reason}") as error:
        File(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 7, 20, 1000, 2**40, 2**63])
def test_a_header_length_that_lies_is_refused(path, length):
    _rewrite(path, lambda h: None, length)
    with pytest.raises(WeightsError, match=r"x\.safetensors: "):
        File(path)


@given(st.data())
def test_any_damaged_byte_of_the_header_is_an_error_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_file(path, ROWS, iter(_arrays().items()))
    raw = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), head, head + 20, 9]))])
    try:
        file = File(path)
    except WeightsError as e:
        assert str(path) in str(e)
    else:
        for name, (dtype, shape, *_) in file.tensors.items():
            assert file.read(name).shape == shape and file.read(name).dtype == dtype


def test_views_survive_a_release(path):
    file = File(path)
    views = {name: file.read(name) for name in file.tensors}
    file.release()
    for name, array in _arrays().items():
        np.testing.assert_array_equal(views[name], array)
        np.testing.assert_array_equal(file.read(name), array)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    for name in ("m-1.safetensors", "m-2.safetensors"):
        write_file(tmp_path / name, ROWS[:1], iter(_arrays().items()))
    with pytest.raises(WeightsError, match=r"m-2\.safetensors: tensor a is also in m-1\.safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "text,reason",
    [
        ("{", "not a weight index"),
        ("[]", "not a weight index"),
        ('{"weight_map": {}}', "not a weight index"),
        ('{"weight_map": {"a": 1}}', "not a weight index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "shard '../x.safetensors' is not a file of this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shard '/etc/passwd' is not a file of this folder"),
    ],
)
def test_an_index_that_is_none_or_points_elsewhere_is_refused(tmp_path, text, reason):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsError, match=f"{INDEX}: {reason}"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_torch_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=rf"{name} is a torch pickle.*tools\.convert_weights --source={tmp_path} "):
        open_folder(tmp_path)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    write_folder(tmp_path, ROWS, iter(_arrays().items()))
    read = numpy.load_file(tmp_path / "model.safetensors")
    for name, array in _arrays().items():
        np.testing.assert_array_equal(read[name], array)
