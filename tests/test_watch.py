"""What is told of a stage while it trains: speed by phase, evaluation now and then, samples, a profile."""

import types

import jax.numpy as jnp
import pytest

from marc_jax import metrics, samples, watch

STATE = types.SimpleNamespace(
    step=jnp.int32(0), params={"text/layers/mlp/kernel": jnp.zeros((3, 4))},
    frozen={"text/embed/embedding": jnp.zeros((5, 4)), "text/head/kernel": jnp.zeros((4, 5)), "vision/x": jnp.zeros(9)},
)  # fmt: skip


def step(state, batch):
    return state, {"loss": jnp.float32(1.0), "num_tokens": jnp.float32(10.0), "work/updated": 10.0, "work/forward": 5.0}


def test_speed_is_told_beside_the_metrics(tmp_path):
    seen = watch.Watch(tmp_path, every=2)
    seen._peak = 1e3
    run = seen.around(lambda state, batch: seen.timed("update", step, state, batch), STATE)
    rows = [run(STATE, None)[1] for _ in range(3)]
    assert all("work/updated" not in row and row["loss"] == 1.0 for row in rows)
    # Steps 1 and 2 are measured: the first, and every second.
    assert [("speed/update_seconds" in row) for row in rows] == [True, True, False]
    total = metrics.reduce(metrics.merge(*rows))
    took = sum(row["speed/tokens_per_second"][1] for row in rows)
    assert total["speed/tokens_per_second"] == pytest.approx(30 / took, rel=1e-5)
    # 32 weights, 12 of them train: (4 * 32 + 2 * 12) FLOP per updated token, 2 * 32 per other one.
    assert total["speed/mfu"] == pytest.approx(3 * (152 * 10 + 64 * 5) / 1e3 / took, rel=1e-5)


def test_evaluation_and_samples_come_when_they_are_due(tmp_path):
    asked = []

    def evaluate(state, number):
        asked.append(number)
        return {"eval/full/accuracy": (1.0, 2.0)}, [{"completion": "a|b\n<c>", "accuracy": 0.5}]

    with watch.Watch(tmp_path, every=1, samples=2, rows=1, evaluate=lambda: evaluate, evaluate_every=3) as seen:

        def learn(state, batch):
            if seen.due:
                seen.completions([{"completion": "one"}, {"completion": "two"}])
            return step(state, batch)

        run = seen.around(learn, STATE)
        rows = [run(STATE, None)[1] for _ in range(4)]
    assert asked == [3] and rows[2]["eval/full/accuracy"] == (1.0, 2.0) and "eval/full/accuracy" not in rows[3]
    kept = metrics.read(tmp_path / "samples" / "samples.jsonl")
    assert [(row["step"], row["completion"]) for row in kept] == [(2, "one"), (3, "a|b\n<c>"), (4, "one")]
    assert "a|b\n&lt;c&gt;" in (tmp_path / "samples" / "samples.html").read_text()
    assert list((tmp_path / "samples").glob("events.out.tfevents*"))
    assert samples.markdown([kept[1]]).splitlines()[-1] == "| 3 | a\\|b <c> | 0.5 |"
    # A run that goes on from step 2 forgets what came after it.
    samples.Table(tmp_path / "samples", 2)
    assert [row["step"] for row in metrics.read(tmp_path / "samples" / "samples.jsonl")] == [2]


def test_a_profile_is_kept_of_the_steps_asked_for_and_of_a_stage_too_short(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(watch.jax.profiler, "start_trace", lambda folder: told.append(folder))
    monkeypatch.setattr(watch.jax.profiler, "stop_trace", lambda: told.append("stop"))
    for steps, folder in ((5, tmp_path / "long"), (2, tmp_path / "short")):
        with watch.Watch(folder, profile=(2, 2)) as seen:
            run = seen.around(step, STATE)
            for _ in range(steps):
                run(STATE, None)
        seen.close()
        assert told == [str(folder / "profile"), "stop"]
        told.clear()


def test_what_nobody_watches_is_left_alone():
    assert watch.Watch().around(step, STATE) is step
    assert metrics.shown({"loss": 1.0, "speed/step_seconds": 2.0, "speed/update_seconds": 1.5, "entropy": 3.0}) == {
        "loss": 1.0, "s/step": "2 (update 1.5)",
    }  # fmt: skip


def test_speed_has_a_file_of_its_own(tmp_path):
    with metrics.Writer(tmp_path, "s", tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0, "speed/mfu": 0.5})
    assert metrics.read(tmp_path / "s" / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert metrics.read(tmp_path / "s" / "speed.jsonl") == [{"step": 1, "speed/mfu": 0.5}]
