"""What a run reads before it trains: records of a split, checked row by row."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.synthetic import build, recompose
from data_pipelines.synthetic.scenes import Difficulty
from marc_jax import run, settings, synthetic
from marc_jax.config import ConfigError


def records(n=3):
    made = [record for i in range(n) for record in build.make_records(0, "test", i, Difficulty())]
    return json.loads(json.dumps(made))


def write(folder, rows):
    (folder / "test.json").write_text(json.dumps(rows))


def test_records_come_back_as_they_were_built(tmp_path):
    want = records()
    write(tmp_path, want)
    got = synthetic.read_records(tmp_path, "test")
    assert got == want
    assert recompose.pool_from_records(got)[1] == recompose.pool_from_records(want)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "../../secret.mp4"}, "field 'path': ../../secret.mp4 leads out of the data root"),
        ({"path": "/etc/passwd"}, "field 'path': /etc/passwd is not relative"),
        ({"path": "http://host/x.mp4"}, "field 'path': http://host/x.mp4 is a URL"),
        ({"solution": 3}, "field 'solution': is 3, not a text"),
        ({"needed_events": None}, "field 'needed_events': is not a list"),
    ],
)
def test_a_bad_row_is_named_with_its_field(tmp_path, change, words):
    rows = records()
    write(tmp_path, [rows[0], rows[1] | change, rows[2]])
    with pytest.raises(ConfigError) as e:
        synthetic.read_records(tmp_path, "test")
    assert str(e.value).startswith(f"{tmp_path / 'test.json'}, row 1, {words}") and "\n" not in str(e.value)


def test_a_field_that_all_rows_lack_is_one_line(tmp_path):
    write(tmp_path, [{k: v for k, v in row.items() if k != "events"} for row in records()])
    with pytest.raises(ConfigError, match=r"row 0, field 'events': is missing \(and 2 more such errors\)"):
        synthetic.read_records(tmp_path, "test")


def test_a_link_out_of_the_data_is_refused_and_an_absent_file_is_not(tmp_path):
    rows = records(1)
    write(tmp_path, rows)
    assert synthetic.read_records(tmp_path, "test")  # the reader of videos reports files that are not there
    path = tmp_path / rows[0]["path"]
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path.parent / "secret.mp4")
    with pytest.raises(ConfigError, match="leads out of the data root"):
        synthetic.read_records(tmp_path, "test")


@pytest.mark.parametrize("text", ["", "[]", "[{", "{}"])
def test_a_file_without_records_is_one_line(tmp_path, text):
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'test.json'}.*: "):
        synthetic.read_records(tmp_path, "test")


def test_data_that_cannot_be_is_one_line(tmp_path, repo, monkeypatch):
    monkeypatch.chdir(repo)

    def prepare(*overrides):
        given = ("data.train_videos=1", "data.test_videos=1", "data.workers=0", *overrides)
        run.prepare(settings.experiment("experiments/quickstart.py", [f"--config.{o}" for o in given]), tmp_path)

    with pytest.raises(ConfigError, match="config.data: types must be different names out of"):
        prepare("data.types=('smell',)")
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/dataset.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="config.data: .* holds another set .*; choose another folder or remove it"):
        prepare()


def test_patches_are_decoded_once_for_all_processes_where_they_are_kept(tmp_path, monkeypatch):
    calls = []

    def decode(run, folder, names, label):
        calls.append(names)
        return {name: np.full((2 + i, 16, 1176), i, np.uint8) for i, name in enumerate(names)}

    monkeypatch.setattr(synthetic, "decode_pixels", decode)
    here = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(keep_decoded=True)))
    first, rows = synthetic.decoded(here, tmp_path, ["a", "b"], "train")
    again, _ = synthetic.decoded(here, tmp_path, ["a", "b"], "train")
    assert rows == {"a": 2, "b": 3} and (first == again).all() and first[:5, 0, 0].tolist() == [0, 0, 1, 1, 1]
    synthetic.decoded(here, tmp_path, ["a", "b", "c"], "train")
    here.config.data.keep_decoded = False
    synthetic.decoded(here, tmp_path, ["a"], "test")
    assert calls == [["a", "b"], ["a", "b", "c"], ["a"]] and not [*tmp_path.glob("decoded_test*")]


@pytest.mark.parametrize(("total", "length"), [(1, 1), (5, 5), (9, 10), (300, 320), (42_000, 49_152)])
def test_banks_of_alike_sets_have_one_length(total, length):
    assert len(synthetic.bank_of([np.ones((total, 1), np.uint8)])) == length
