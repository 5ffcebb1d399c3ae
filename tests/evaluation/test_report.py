"""The report of a made-up run is complete, escapes what it prints, repeats itself and refuses nonsense."""

import html.parser
import json
import re

import numpy as np
import pytest

from marc_jax.evaluation import plots, report, scoring, summary

EVIL = "<script>alert('x')</script> & | `co`"


def predictions(accuracy, tokens, seed):
    rng = np.random.default_rng(seed)
    kinds = ["colour", "count", "order"]
    return [
        {"problem_id": i, "question_type": kinds[i % 3], "correct": bool(rng.uniform() < accuracy),
         "solution": "AB"[i % 2], "options": ["A", "B"], "format_ok": True, "truncated": False, "visual_tokens": tokens}
        for i in range(90)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    rows = {"teacher": predictions(0.95, 48, 0), "raw": predictions(0.5, 4, 1), "student": predictions(0.85, 4, 2)}
    tables = scoring.tables(rows)
    labels = {"teacher": "Teacher", "raw": EVIL, "student": "Student after SFT"}
    groups = {"teacher": "teacher", "raw": "baseline", "student": "student"}
    (root / "sft").mkdir()
    lines = [json.dumps({"step": s, "loss": 1 / s, "accuracy": None}) for s in range(1, 20)]
    (root / "sft" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "lo')
    sample = plots.figure(1, 1, plots.LIGHT)
    plots.save(sample, root / "report" / "samples" / "a.png")
    return {
        "title": "Quick start",
        "command": "make quickstart",
        "hardware": "2 cores",
        "date": "2026-01-02",
        "seed": 0,
        "apart": ["order"],
        "split": "Test split, no video of which was trained on",
        "decoding": "greedy",
        "arms": [{"key": k, "label": labels[k], "group": groups[k], **table} for k, table in tables.items()],
        "chance": scoring.chance(rows["teacher"]),
        "comparisons": [{"a": "student", "b": "raw", **scoring.compare(rows["student"], rows["raw"])}],
        "claims": [{"text": "It works", "target": ">= 10", "measured": 12.5, "met": True},
                   {"text": EVIL, "target": 1, "measured": None, "met": False}],
        "retriever": {"recall@1": 60.0, "recall@3": 96.5, "per_type": {"colour": {"recall@1": 61.0, "recall@3": 97.0}}},
        "segmentation": {"boundary_f1": 98.0},
        "timings": {"teacher": 301.0, "sft": 20.4},
        "memory_gb": 3.25,
        "curves": {"sft": str(root / "sft" / "metrics.jsonl"), "gone": "../gone/metrics.jsonl"},
        "samples": [{"path": "samples/a.png", "caption": EVIL}],
        "notes": ["One seed only."],
    }, root / "report"  # fmt: skip


@pytest.fixture(scope="module")
def written(results):
    return report.write(results[1], results[0])


class Page(html.parser.HTMLParser):
    """Collects tags, sources and text; checks that tags are balanced."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_is_whole_and_self_contained(written):
    text = written["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?://", text) and "@import" not in text and "url(" not in text
    for heading in ("Claims", "Accuracy", "Accuracy against visual tokens", "Accuracy by question type", "Training",
                    "What happened on single questions", "Events found by the retriever", "How it was measured",
                    "How to reproduce", "Event boundaries"):  # fmt: skip
        assert heading in page.text
    assert "make quickstart" in page.text and "One seed only." in page.text
    assert "90 questions per arm. Test split" in page.text and "Answers: greedy." in page.text


def test_the_headline_comes_first_and_says_tokens_and_retention(results, written):
    student = results[0]["arms"][2]
    sentence = summary.headline(results[0])
    assert sentence.startswith("The student reads 4 visual tokens where the teacher reads 48")
    assert f"keeps {student['headline_retention_pct']:.0f}\u00a0%" in sentence
    page = Page(written["html"].read_text(encoding="utf-8"))
    assert page.text.index(sentence) < page.text.index("Claims") < page.text.index("How it was measured")
    assert sentence in written["markdown"].read_text(encoding="utf-8")


def test_what_people_wrote_is_escaped(written):
    text = written["html"].read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    markdown = written["markdown"].read_text(encoding="utf-8")
    assert "<script" not in markdown and "\\|" in markdown


def test_every_number_of_an_arm_is_in_both_reports(results, written):
    for path in (written["html"], written["markdown"]):
        text = path.read_text(encoding="utf-8")
        for arm in results[0]["arms"]:
            block = arm["headline"]
            assert f"{block['accuracy']:.1f} ({block['ci95'][0]:.1f} – {block['ci95'][1]:.1f})" in text
            assert f"{arm['accuracy']:.1f}" in text
        assert "96.5" in text and "98.0" in text and "exact McNemar" in text and "5 min 21 s" in text


def test_markdown_tables_are_rectangular(written):
    block = []
    for line in [*written["markdown"].read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(block) > 2 and len(set(block)) == 1
            block = []


def test_a_file_that_is_not_there_is_named(written):
    assert "No file at ../gone/metrics.jsonl" in written["html"].read_text(encoding="utf-8")
    assert "No file at ../gone/metrics.jsonl" in written["markdown"].read_text(encoding="utf-8")


def test_results_are_written_back_with_relative_paths(results, written):
    saved = json.loads(written["results"].read_text(encoding="utf-8"))
    assert saved["curves"] == {"sft": "../sft/metrics.jsonl"}
    assert saved["arms"] == json.loads(json.dumps(results[0]["arms"]))
    assert str(results[1]) not in written["results"].read_text() + written["html"].read_text()


def test_the_plots_of_the_report_exist_in_light_and_dark(results, written):
    names = {path.name for path in (results[1] / "plots").iterdir()}
    for name in ("accuracy", "types", "tokens", "recall", "curve_sft"):
        assert {f"{name}.png", f"{name}_dark.png"} <= names
    assert not any(name.startswith(".") for name in names)


def test_the_command_line_repeats_the_report_byte_for_byte(written, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in written.values()}
    assert report.main([str(written["results"])]) == 0
    assert "keeps" in capsys.readouterr().out
    assert written["results"].read_bytes() == before["results.json"]
    drop = re.compile(rb"<li>No file[^<]*</li>")  # the first report named a missing file, the saved results do not
    assert drop.sub(b"", before["report.html"]) == written["html"].read_bytes()


def test_the_smallest_results_give_a_report(tmp_path):
    arm = {"key": "a", "label": "Only arm", "group": "student"}
    paths = report.write(tmp_path, {"title": "t", "arms": [arm]})
    Page(paths["html"].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"title": ""}, "'title' is missing"),
        ({"arms": []}, "'arms' is missing"),
        ({"arms": [{"key": "a", "label": "b", "group": "pupil"}]}, "group 'pupil'"),
        ({"arms": [{"key": "a", "label": "b", "group": "student"}] * 2}, "'a' is there twice"),
        ({"arms": [{"key": "a", "label": "b", "group": "student", "accuracy": 101.0}]}, "not a percentage"),
        ({"arms": [{"key": "a", "label": "b", "group": "student", "accuracy": 1, "ci95": [2, 3]}]}, "outside its int"),
        ({"comparisons": [{"a": "student", "b": "nobody"}]}, "unknown arm 'nobody'"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(results, tmp_path, change, message):
    with pytest.raises(report.ReportError, match=message):
        report.write(tmp_path / "out", {**results[0], **change})
    assert not (tmp_path / "out").exists()


def test_the_command_line_names_a_bad_file(tmp_path, capsys):
    bad = tmp_path / "results.json"
    bad.write_text("{")
    assert report.main([str(bad)]) == 2
    assert str(bad) in capsys.readouterr().err
    assert report.main([str(tmp_path / "none.json")]) == 2


def test_the_headline_student_is_the_best_of_the_most_frugal(results):
    arms = [
        {"key": "t", "label": "t", "group": "teacher", "accuracy": 90.0, "visual_tokens": 48},
        {"key": "a", "label": "a", "group": "student", "accuracy": 50.0, "visual_tokens": 4},
        {"key": "b", "label": "b", "group": "student", "accuracy": 60.0, "visual_tokens": 4},
        {"key": "c", "label": "c", "group": "student", "accuracy": 80.0, "visual_tokens": 12},
    ]
    assert summary.main_arm({"arms": arms})["key"] == "b"
    assert summary.main_arm({"arms": [*arms[:3], {**arms[3], "main": True}]})["key"] == "c"
    assert summary.main_arm({"arms": arms[:1]}) is None
    assert "answers 60" in summary.headline({"title": "t", "arms": arms})
    assert summary.headline({"arms": arms, "headline": "As written"}) == "As written"


def test_a_broken_line_inside_a_metrics_file_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(report.ReportError, match="line 2"):
        report.read_jsonl(path)


def test_a_line_ends_where_json_says_and_not_at_every_separator_of_unicode(tmp_path):
    path, rows = tmp_path / "full.jsonl", [{"completion": "a\u2028b\x85c\u2029\x1c"}, {"completion": ""}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"comp', encoding="utf-8")
    assert report.read_jsonl(path) == rows
