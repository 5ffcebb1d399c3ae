"""report.html: one file without scripts or outside requests, for phones and wide screens, in light and dark."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from marc_jax.evaluation import plots, summary

EMBED_LIMIT = 16 << 20  # bytes of sample pictures inside the page; later ones are linked

STYLE = """
:root{color-scheme:light dark;--fg:#1c2733;--muted:#5d6875;--line:#e1e7ed;--bg:#fff;--soft:#f5f8fa;
--teacher:#0072b2;--student:#d55e00;--baseline:#9aa4af;--heat:0 114 178;--good:#0072b2;--bad:#c2410c}
@media(prefers-color-scheme:dark){:root{--fg:#e8edf2;--muted:#9ca8b5;--line:#2c3742;--bg:#161d25;--soft:#1d2630;
--teacher:#56b4e9;--student:#f28e2b;--baseline:#76828f;--heat:86 180 233;--good:#56b4e9;--bad:#ff9d6c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:1.25rem 1rem 4rem}
h1,h2,h3{line-height:1.2;margin:0}
.title{color:var(--muted);font-size:.95rem;margin:0 0 1rem}
.title b{color:var(--fg)}
h1{font-size:clamp(1.5rem,4.2vw,2.4rem);letter-spacing:-.02em;max-width:30ch;text-wrap:balance}
h2{font-size:1.3rem;margin:2.8rem 0 .9rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .5rem}
p{margin:.4rem 0;max-width:70ch}
.note{color:var(--muted);font-size:.88rem}
.keys{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.6rem 0 0}
.keys div{background:var(--soft);border-radius:.6rem;padding:.8rem .9rem}
.keys b{display:block;font-size:1.55rem;line-height:1.15;font-variant-numeric:tabular-nums}
.keys span{color:var(--muted);font-size:.84rem;line-height:1.3;display:block;margin-top:.2rem}
.wide{overflow-x:auto;margin:0 -1rem;padding:0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th{text-align:right;font-weight:600;color:var(--muted);font-size:.78rem;text-wrap:balance;
vertical-align:bottom;padding:.3rem .55rem}
td{text-align:right;padding:.42rem .55rem;border-top:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,.text td,.text th{text-align:left;padding-left:0}
.text td,.text th{padding-right:1.2rem}
.heat td:first-child{min-width:10rem}
td:first-child{white-space:normal;min-width:12rem}
.two td:nth-child(2),.two th:nth-child(2){text-align:left}
td small{display:block;color:var(--muted)}
tr.main td{background:var(--soft)} tr.main td:first-child{font-weight:700}
.bars td:nth-child(2){width:34%;min-width:11rem;padding-right:.9rem}
.bar{position:relative;height:1.35rem;background:var(--soft);border-radius:.2rem}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:.2rem}
.bar u{position:absolute;top:.6rem;height:.15rem;background:var(--fg)}
.bar s{position:absolute;top:-.28rem;bottom:-.28rem;width:0;border-left:1.5px dashed var(--fg);opacity:.75}
.bar s.chance{border-left-style:dotted}
.scale{position:relative;display:block;height:1.1rem;font-weight:400}
.scale em{position:absolute;transform:translateX(-50%);font-style:normal}
.heat td{text-align:center;border:2px solid var(--bg);min-width:3.2rem} .heat th{text-align:center}
.heat td:first-child,.heat th:first-child{text-align:left;border-left:0}
.yes{color:var(--good);font-weight:700}.no{color:var(--bad);font-weight:700}
figure{margin:1rem 0 0} figcaption{color:var(--muted);font-size:.88rem;margin:.4rem 0 0}
.plot img{display:block;width:100%;min-width:33rem;height:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:.5rem 2rem}
.pair>*{min-width:0}
.small{max-width:38rem}.pair img,.small img{min-width:0}
.sample img{display:block;width:100%;min-width:44rem;height:auto;border-radius:.5rem;border:1px solid var(--line)}
pre{background:var(--soft);border-radius:.5rem;padding:.8rem 1rem;overflow-x:auto;font-size:.88rem}
ul{padding-left:1.1rem;margin:.4rem 0}li{margin:.25rem 0;max-width:75ch}
.times td:first-child{min-width:5rem}.times td{border:0;padding:.2rem .55rem}.times td:nth-child(2){width:65%}
.times .bar{background:none;height:.9rem}.times .bar i{background:var(--baseline)}
@media(max-width:36rem){body{font-size:15px}td:first-child,.heat td:first-child{min-width:8.6rem}
.bars td:nth-child(2){min-width:9.5rem}}
@media print{.wide{overflow:visible}h2{break-after:avoid}figure{break-inside:avoid}}
"""


def page(results: Mapping, figures: Mapping[str, str], missing: list[str], out: Path) -> str:
    """The whole page as text.

    Args:
      results: validated, paths relative to `out`.
      figures: name -> path of the light plot relative to out; its dark twin ends in _dark.png.
      missing: paths that results.json names and where there is no file.
      out: the report's folder.
    """
    parts = [_head(results), _claims(results), _arms(results)]
    if "tokens" in figures:
        parts.append(_section(summary.figure_title("tokens"), _plot("tokens", figures, out)))
    parts += [_types(results), _samples(results, out), _retriever(results, figures, out), _tables(results)]
    curves = [(name, _plot(name, figures, out)) for name in figures if name.startswith("curve_")]
    if curves:
        cells = (f"<div><h3>{escape(summary.figure_title(n).split(': ')[1])}</h3>{plot}</div>" for n, plot in curves)
        parts.append(_section("Training", f'<div class="pair">{"".join(cells)}</div>'))
    parts += [_method(results, missing), _reproduce(results)]
    title = escape(str(results["title"]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _head(results: Mapping) -> str:
    known = [escape(str(results[key])) for key in ("hardware", "date") if results.get(key)]
    title = " · ".join([f"<b>{escape(str(results['title']))}</b>", *known])
    keys = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in _keys(results))
    return (
        f'<header><p class="title">{title}</p><h1>{escape(summary.headline(results))}</h1>'
        f'<div class="keys">{keys}</div></header>\n'
    )


def _keys(results: Mapping) -> list[tuple[str, str]]:
    """The few numbers under the headline."""
    arm = summary.main_arm(results)
    teacher = next((a for a in results["arms"] if a["group"] == "teacher"), None)
    keys = []
    if arm is not None:
        keys.append((summary.number(plots.headline(arm).get("accuracy")) + "\u00a0%", f"accuracy: {arm['label']}"))
    if teacher is not None:
        value = plots.headline(teacher).get("accuracy")
        keys.append((summary.number(value) + "\u00a0%", f"accuracy: {teacher['label']}"))
    if arm is not None and arm.get("tokens_kept_pct") is not None:
        keys.append((summary.number(arm["tokens_kept_pct"]) + "\u00a0%", "of the visual tokens are kept"))
    recall = [(int(k.split("@")[1]), v) for k, v in (results.get("retriever") or {}).items() if k.startswith("recall@")]
    if recall:
        k, value = max(recall)
        text = f"of the questions: all events needed are among the {k} retrieved"
        keys.append((summary.number(value) + "\u00a0%", text))
    timings = results.get("timings") or {}
    if timings:
        memory = results.get("memory_gb")
        inside = "" if memory is None else f", in {summary.number(memory)} GB of memory"
        keys.append((summary.seconds(sum(timings.values())).replace(" ", "\u00a0"), f"for everything{inside}"))
    return keys


def _claims(results: Mapping) -> str:
    rows = ""
    for claim in results.get("claims") or []:
        met = '<b class="yes">✓ met</b>' if claim.get("met") else '<b class="no">✗ not met</b>'
        cells = (summary.number(claim.get("target")), summary.number(claim.get("measured")))
        rows += f"<tr><td>{met} &nbsp;{escape(str(claim.get('text', '')))}</td>"
        rows += "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
    head = "<tr><th>claim</th><th>target</th><th>measured</th></tr>"
    return _section("Claims", f'<div class="wide"><table class="text">{head}{rows}</table></div>') if rows else ""


def _arms(results: Mapping) -> str:
    """The main table: a bar with its interval in every row, lines for the teacher and for chance."""
    levels = results.get("chance") or {}
    chance = (levels.get("headline") or levels.get("accuracy") or {}).get("uniform")
    teacher = next((plots.headline(a).get("accuracy") for a in results["arms"] if a["group"] == "teacher"), None)
    marks = [(name, value) for name, value in (("chance", chance), ("teacher", teacher)) if value is not None]
    scale = "".join(f'<em style="left:{value:.2f}%">{name}</em>' for name, value in marks)
    head = "".join(f"<th>{escape(name)}</th>" for name in summary.ARM_COLUMNS[2:])
    kept = summary.main_arm(results)
    rows = ""
    for arm in results["arms"]:
        tokens, share, *cells = summary.arm_cells(arm)
        small = f"{tokens} {'token' if tokens == '1' else 'tokens'}"
        small += "" if share in ("–", "100", "100.0") else f", {share} %"
        note = f"<small>{escape(str(arm['note']))}</small>" if arm.get("note") else ""
        name = f"<td>{escape(str(arm['label']))}<small>{small}</small>{note}</td>"
        mark = ' class="main"' if arm is kept else ""
        rows += f"<tr{mark}>{name}<td>{_bar(arm, marks)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
    apart = ", ".join(results.get("apart") or [])
    words = "Thin line: 95 % interval."
    if apart:
        words += f" Bars, accuracy and retention leave {apart} questions out."
    table = f'<table class="bars"><tr><th>arm</th><th><span class="scale">{scale}</span></th>{head}</tr>{rows}</table>'
    return _section("Accuracy", f'<div class="wide">{table}</div><p class="note">{escape(words)}</p>')


def _bar(arm: Mapping, marks: list[tuple[str, float]]) -> str:
    block = plots.headline(arm)
    if block.get("accuracy") is None:
        return ""
    low, high = block.get("ci95") or (block["accuracy"],) * 2
    lines = "".join(f'<s class="{name}" style="left:{value:.2f}%"></s>' for name, value in marks)
    return (
        f'<div class="bar"><i style="width:{block["accuracy"]:.2f}%;background:var(--{arm["group"]})"></i>'
        f'<u style="left:{low:.2f}%;width:{high - low:.2f}%"></u>{lines}</div>'
    )


def _types(results: Mapping) -> str:
    types, rows = summary.type_rows(results)
    if not types:
        return ""
    apart = results.get("apart") or []
    head = "<th>arm</th>" + "".join(f"<th>{escape(name)}{'*' if name in apart else ''}</th>" for name in types)
    body = ""
    for label, values in rows:
        body += f"<tr><td>{escape(str(label))}</td>"
        for value in values:
            shade = 0.62 * (value or 0) / 100
            body += f'<td style="background:rgb(var(--heat)/{shade:.3f})">{summary.number(value, 0)}</td>'
        body += "</tr>"
    note = '<p class="note">* reported apart: not part of the headline numbers.</p>' if set(apart) & set(types) else ""
    table = f'<div class="wide"><table class="heat"><tr>{head}</tr>{body}</table></div>{note}'
    return _section(summary.figure_title("types"), table)


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _plot(name: str, figures: Mapping[str, str], out: Path) -> str:
    """A plot with its dark twin, both inside the page."""
    light = out / figures[name]
    dark = light.with_name(light.stem + "_dark.png")
    source = f'<source srcset="{_image(dark)}" media="(prefers-color-scheme:dark)">' if dark.is_file() else ""
    text = escape(summary.figure_title(name))
    return f'<figure class="plot wide"><picture>{source}<img src="{_image(light)}" alt="{text}"></picture></figure>'


def _samples(results: Mapping, out: Path) -> str:
    room, figures = EMBED_LIMIT, ""
    for sample in results["samples"]:
        path = out / sample["path"]
        size = path.stat().st_size
        inside = path.suffix.lower() == ".png" and size <= room
        room -= size if inside else 0
        source = _image(path) if inside else escape(quote(sample["path"]))
        caption = escape(str(sample.get("caption") or ""))
        note = f"<figcaption>{caption}</figcaption>" if caption else ""
        image = f'<div class="wide"><img src="{source}" loading="lazy" alt="{caption}"></div>'
        figures += f'<figure class="sample">{image}{note}</figure>'
    return _section("What happened on single questions", figures)


def _retriever(results: Mapping, figures: Mapping[str, str], out: Path) -> str:
    if "recall" not in figures:
        return ""
    return _section(summary.figure_title("recall"), f'<div class="small">{_plot("recall", figures, out)}</div>')


def _tables(results: Mapping) -> str:
    """The smaller tables, but claims and retriever, which the page shows in its own way."""
    sections = ""
    for title, head, rows in summary.tables(results):
        if title == "Claims" or title.startswith("Retriever"):
            continue
        lines = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{escape(name)}</th>" for name in head)
        sections += _section(title, f'<div class="wide"><table class="two"><tr>{heads}</tr>{lines}</table></div>')
    return sections


def _method(results: Mapping, missing: list[str]) -> str:
    words = [*summary.method(results), *(f"No file at {path}" for path in missing)]
    body = "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in words) + "</ul>"
    timings = results.get("timings") or {}
    longest = max(timings.values(), default=0)
    if longest > 0:
        rows = ""
        for stage, value in timings.items():
            bar = f'<div class="bar"><i style="width:{100 * value / longest:.1f}%"></i></div>'
            rows += f"<tr><td>{escape(str(stage))}</td><td>{bar}</td><td>{summary.seconds(value)}</td></tr>"
        body += f'<h3>Where the time went</h3><table class="times">{rows}</table>'
    return _section("How it was measured", body)


def _reproduce(results: Mapping) -> str:
    command = results.get("command")
    return _section("How to reproduce", f"<pre>{escape(str(command))}</pre>") if command else ""
