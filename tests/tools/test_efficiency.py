"""tools.bench.efficiency: what it reckons from stage times, and a whole run of a tiny model."""

import json

import pytest

from tools.bench import efficiency, efficiency_report, efficiency_stages
from tools.bench.scenes import write_scenes


@pytest.fixture
def row():
    """Two thirds of an uncompressed run of 300 ms (with 10 tokens) are vision and prefill."""
    return {
        "new": 4,
        "stages": {
            "uncompressed": {"open + decode": 30.0, "patchify": 20.0, "vision": 150.0, "prefill": 50.0, "decode": 20.0},
            "cold": {"open + decode": 30.0, "events": 5.0, "patchify": 5.0, "vision": 50.0, "prefill": 10.0,
                     "decode": 20.0},
            "key frames": {"look": 5.0, "open + decode": 10.0, "events": 1.0, "vision": 50.0, "prefill": 10.0,
                           "decode": 20.0},
            "warm": {"memory": 2.0, "prefill": 10.0, "decode": 8.0},
        },
        "bounds": {"open_ms": 4.0, "pictures": 768, "codec": "h264 1280x720", "gap": 4.0, "longest_gap": 4.0,
                   "key_frames": 8, "decoded": 700, "decoded_of_chosen": 272},
        "peak_bytes": {"uncompressed": 100, "cold": 80, "key frames": 80, "warm": 70},
    }  # fmt: skip


def test_the_end_is_reckoned_from_stages_and_tokens(row):
    assert efficiency_report.per_token(row, "uncompressed") == 5
    assert efficiency_report.end_to_end(row, "uncompressed", 10) == 300
    assert efficiency_report.end_to_end(row, "warm", 10) == 32
    assert efficiency_report.generation(row, "cold", 2) == 20


def test_a_ceiling_is_the_speed_up_if_the_stage_cost_nothing(row):
    assert efficiency_report.if_free(row, ("vision",), 10) == 2
    assert efficiency_report.if_free(row, ("vision", "prefill"), 10) == 3
    assert efficiency_report.if_free(row, tuple(row["stages"]["uncompressed"]), 10) == float("inf")
    line = next(x for x in efficiency_report.stage_table(row, None, 10) if x.startswith("| vision"))
    assert [cell.strip() for cell in line.split("|")[2:7]] == ["150", "50.0%", "2.00", "50", "1.50"]


def test_the_papers_metrics_stand_beside_ours(row):
    table = efficiency_report.paper_table(row, [10])
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table[2:]}
    assert cells["peak GPU memory"] == ["72", "20.0", "20.0", "30.0"]
    assert cells["LLM generation"] == ["23.9", "40.0", "40.0", "70.0"]
    assert cells["end to end"] == ["11.1", "50.0", "58.0", "89.3"]


def test_the_peer_waits_for_the_same_frames(row):
    assert efficiency_report.peer_total(row, {"first": 400.0, "per_token": 20.0}, 11) == 30 + 20 + 400 + 200
    beside = efficiency_report.answer_table(row, {"first": 400.0, "per_token": 20.0}, [10])[-1]
    assert "yes" in beside and beside.split("|")[15].strip() == "630"


def test_what_bounds_reading_is_said(row):
    (said,) = efficiency_report.reading(row)
    assert "8 for the look and 272 for the chosen events: 40%" in said and "takes 50 and 15 ms, opening 4 ms" in said
    assert efficiency_report.most_lower(row, "key frames", 10) == pytest.approx(100 * (1 - (30 * 0.4 + 50) / 300))
    del row["stages"]["key frames"]
    assert efficiency_report.reading(row)[0].endswith("key frames are too sparse for a first look.")


def test_a_run_writes_what_it_measured_and_outlives_a_row_that_fails(tmp_path, monkeypatch, capsys):
    def failing(served, video, row, *rest):
        if row.batch == 3:
            raise MemoryError("too large")
        return streams(served, video, row, *rest)

    streams = efficiency_stages.Streams
    monkeypatch.setattr(efficiency_stages, "Streams", failing)
    write_scenes(tmp_path / "video.mp4", 112, 196, 16)
    flags = ["--size=tiny", "--rows=4x3,4x2", "--frames=16", "--new=3", "--repeats=1"]
    flags.append(f"--video={tmp_path / 'video.mp4'}")
    out, text = tmp_path / "out.json", tmp_path / "out.md"
    assert efficiency.main([*flags, f"--out={out}", f"--markdown={text}"]) == 1
    assert "4x3 FAILED: MemoryError: too large" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["4x2"] and "### 4x2" in text.read_text()
    row, tokens = rows["4x2"], {"uncompressed": 16, "cold": 2, "key frames": 2, "warm": 2}
    assert row["same_answer"] and row["patches"] == 8 and row["visual_tokens"] == tokens
    assert set(row["stages"]["uncompressed"]) == {"open + decode", "patchify", "vision", "prefill", "decode"}
    assert set(row["stages"]["warm"]) == {"memory", "embed", "retrieve", "compress", "prefill", "decode"}
    assert set(row["stages"]["cold"]) == set(efficiency_report.STAGES) - {"memory", "look"}
    assert set(row["stages"]["key frames"]) == set(efficiency_report.STAGES) - {"memory"}
    assert row["state_bytes"]["cold"]["visual"] * 8 == row["state_bytes"]["uncompressed"]["visual"]
    assert row["peak_bytes"]["uncompressed"] > row["weight_bytes"] > 0 and row["stored"] > 0
