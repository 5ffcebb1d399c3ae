import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from marc_jax import metrics

numbers = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-100, 100, width=32))


@given(numbers, st.data())
def test_masked_values_do_not_count_whatever_they_are(values, data):
    mask = data.draw(hnp.arrays(bool, values.shape))
    total, count = metrics.masked_sum(np.where(mask, values, np.nan), mask)
    assert count == mask.sum()
    np.testing.assert_allclose(total, values[mask].astype(np.float64).sum(), rtol=1e-4, atol=1e-3)


@given(numbers, numbers)
def test_merged_batches_have_the_mean_of_all_rows(a, b):
    both = metrics.merge({"x": metrics.masked_sum(a)}, {"x": metrics.masked_sum(b)})
    mean = np.concatenate([a, b]).astype(np.float64).mean()
    np.testing.assert_allclose(metrics.reduce(both)["x"], mean, rtol=1e-4, atol=1e-3)


def test_merging_many_rows_keeps_names_in_order_and_means_of_plain_numbers():
    rows = [{"loss": (jnp.float32(6), jnp.float32(3)), "b": 1.0}, {"loss": (0.0, 0.0), "b": jnp.float32(2), "a": 5}]
    both = metrics.merge(*rows)
    assert both == {"loss": (6.0, 3.0), "b": (3.0, 2.0), "a": (5.0, 1.0)} and list(both) == ["loss", "b", "a"]
    assert metrics.reduce(both) == {"loss": 2.0, "b": 1.5, "a": 5.0}
    assert metrics.merge() == {}


def test_reduce_takes_sums_scalars_and_empty_means():
    values = metrics.reduce({"a": (jnp.float32(6), jnp.float32(3)), "b": jnp.float32(1.5), "c": (0.0, 0.0), "d": 2})
    assert (values["a"], values["b"], values["d"]) == (2.0, 1.5, 2.0) and math.isnan(values["c"])


def test_non_finite_metrics_stop_with_step_names_and_batch():
    metrics.check_finite({"loss": jnp.float32(1), "empty": (0.0, 0.0)}, 3)
    bad = {"loss": jnp.float32(np.nan), "grad_norm": (jnp.float32(np.inf), jnp.float32(2)), "fine": 1.0}
    with pytest.raises(metrics.NonFiniteError, match=r"step 7: loss, grad_norm not finite; batch: a.mp4, b.mp4") as e:
        metrics.check_finite(bad, 7, ["a.mp4", "b.mp4"])
    assert e.value.step == 7 and e.value.exit_code == 1


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, resume=0, **options):
    with metrics.Writer(workdir, "teacher", resume, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 2})


def test_one_line_per_step_and_events_for_tensorboard(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert lines(tmp_path / "teacher") == [{"step": s, "loss": s / 2} for s in (1, 2, 3)]
    assert list((tmp_path / "teacher").glob("events.out.tfevents*"))


def test_resume_leaves_neither_gap_nor_double(tmp_path):
    write(tmp_path / "straight", range(1, 11), tensorboard=False)
    write(tmp_path / "killed", range(1, 8), tensorboard=False)
    with (tmp_path / "killed/teacher/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    write(tmp_path / "killed", range(6, 11), resume=5, tensorboard=False)
    texts = [(tmp_path / name / "teacher/metrics.jsonl").read_bytes() for name in ("straight", "killed")]
    assert texts[0] == texts[1]


def test_a_fresh_start_forgets_the_old_lines(tmp_path):
    write(tmp_path, [1, 2], tensorboard=False)
    write(tmp_path, [1], tensorboard=False)
    assert [line["step"] for line in lines(tmp_path / "teacher")] == [1]


def test_steps_go_forward_and_nan_is_null(tmp_path):
    with metrics.Writer(tmp_path, "s", tensorboard=False) as writer:
        writer.write(2, {"x": (0.0, 0.0)})
        with pytest.raises(ValueError, match="step 2 after those of step 2"):
            writer.write(2, {"x": 1.0})
    assert lines(tmp_path / "s") == [{"step": 2, "x": None}]
    assert metrics.read(tmp_path / "s/metrics.jsonl") == [{"step": 2, "x": None}]


def test_switched_off_means_no_file(tmp_path):
    write(tmp_path, [1], enabled=False)
    assert not list(tmp_path.iterdir())
    write(tmp_path, [1], tensorboard=False)
    assert [p.name for p in (tmp_path / "teacher").iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(stream, **options):
    with metrics.Progress("teacher", 20, 10, stream=stream, **options) as progress:
        for step in range(11, 21):
            progress.update(step, loss=jnp.float32(1 / step), note="warm")
    return stream.getvalue()


def test_plain_lines_when_not_a_terminal():
    text = run_progress(io.StringIO(), every=1000)
    assert [line.split()[1] for line in text.splitlines()] == ["11/20", "20/20"]
    assert "loss 0.05" in text and "left" in text and "\x1b" not in text
    assert len(run_progress(io.StringIO(), every=0).splitlines()) == 10


def test_a_bar_on_a_terminal_and_silence_when_switched_off():
    text = run_progress(Terminal())
    assert "teacher" in text and "20/20" in text and "loss 0.05" in text
    assert run_progress(Terminal(), enabled=False) == run_progress(io.StringIO(), enabled=False) == ""
