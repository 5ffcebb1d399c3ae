"""The picture of a question over videos as one HTML file: no scripts, nothing loaded from elsewhere.

Every video that was read is a track in its own time: its events, the darker the nearer to the question, those that
were read in colour with a frame of each.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from marc_jax.evaluation.pictures import EVENTS

STYLE = """
:root{color-scheme:light dark;--fg:#1c2733;--muted:#5d6875;--line:#e1e7ed;--bg:#fff;--soft:#f1f5f8;--heat:93 109 126}
@media(prefers-color-scheme:dark){:root{--fg:#e8edf2;--muted:#9ca8b5;--line:#2c3742;--bg:#161d25;--soft:#1d2630;
--heat:156 172 190}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:clamp(1.4rem,4vw,2.1rem);line-height:1.2;letter-spacing:-.02em;margin:0;text-wrap:balance}
.said{font-size:1.2rem;margin:.6rem 0 0;padding:.6rem .9rem;background:var(--soft);border-radius:.6rem}
.note{color:var(--muted);font-size:.88rem;margin:.5rem 0 0}
h2{font-size:1rem;margin:2.2rem 0 .5rem;overflow-wrap:anywhere}
h2 small{color:var(--muted);font-weight:400}
.track{position:relative;height:2.6rem;background:var(--soft);border-radius:.3rem;overflow:hidden}
.track i{position:absolute;top:0;bottom:0;border-right:1px solid var(--bg);font:700 .8rem/2.6rem system-ui,sans-serif;
text-align:center;overflow:hidden;color:#fff}
.scale{display:flex;justify-content:space-between;color:var(--muted);font-size:.78rem;
font-variant-numeric:tabular-nums;margin:.2rem 0 .8rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(12rem,1fr));gap:.9rem}
figure{margin:0;border-top:.3rem solid;border-radius:.3rem;background:var(--soft);overflow:hidden}
figure img,.none{display:block;width:100%;aspect-ratio:16/9;object-fit:contain;background:#000}
.none{background:var(--line);color:var(--muted);text-align:center;padding-top:22%;font-size:.85rem}
figcaption{padding:.5rem .7rem;font-size:.9rem;font-variant-numeric:tabular-nums}
figcaption b{display:block}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
td{padding:.15rem 1.4rem .15rem 0}td:last-child{text-align:right;padding-right:0}
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """An event that was read: its video, number in it from 1, seconds, similarity, a JPEG of it (None: the file is
    gone or cannot be read)."""

    video: str
    number: int
    begin: float
    end: float
    score: float
    jpeg: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Track:
    """A video: its length in seconds, and (begin, end, similarity) of every event."""

    seconds: float
    events: Sequence[tuple[float, float, float]]


def clock(seconds: float) -> str:
    """1:02:03.4, or 2:03.4 under an hour."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def page(
    question: str, answer: str, tracks: Mapping[str, Track], shown: Sequence[Shown], times: Mapping[str, float],
    note: str = "",
) -> str:  # fmt: skip
    """The whole page as text.

    Args:
      tracks: {video: its track}, in the order they are shown.
      shown: the events that were read.
      times: {part: seconds}.
      note: a line under the answer.
    """
    colours = {(e.video, e.number): EVENTS[i % len(EVENTS)] for i, e in enumerate(shown)}
    body = f"<h1>{escape(question)}</h1><p class=\"said\">{escape(answer) or '(nothing)'}</p>"
    body += f'<p class="note">{escape(note)}</p>' if note else ""
    scores = [score for track in tracks.values() for *_, score in track.events]
    span = (min(scores, default=0.0), max(scores, default=1.0))
    for name, track in tracks.items():
        count = f"{len(track.events)} event{'s' * (len(track.events) != 1)}"
        body += f"<h2>{escape(name)} <small>{clock(track.seconds)}, {count}</small></h2>"
        body += _track(name, track, colours, span)
        cards = "".join(_card(e, colours[e.video, e.number]) for e in shown if e.video == name)
        body += f'<div class="cards">{cards}</div>' if cards else ""
    if shown:
        body += '<p class="note">In colour: events that were read. Grey: the darker, the nearer to the question.</p>'
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{1000 * s:,.2f} ms</td></tr>" for name, s in times.items())
    body += f"<h2>Where the time went</h2><table>{rows}</table>" if rows else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(question)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _track(name: str, track: Track, colours: Mapping, span: tuple[float, float]) -> str:
    length = max([track.seconds, *(end for _, end, _ in track.events)]) or 1.0
    blocks = ""
    for number, (begin, end, score) in enumerate(track.events, 1):
        share = (score - span[0]) / max(span[1] - span[0], 1e-9)
        colour = colours.get((name, number))
        fill = colour or f"rgb(var(--heat)/{0.12 + 0.48 * share:.2f})"
        place = f"left:{100 * begin / length:.3f}%;width:{100 * (end - begin) / length:.3f}%"
        title = f"event {number}: {clock(begin)} to {clock(end)}, similarity {score:.3f}"
        blocks += f'<i style="{place};background:{fill}" title="{title}">{number if colour else ""}</i>'
    return f'<div class="track">{blocks}</div><div class="scale"><span>0:00</span><span>{clock(length)}</span></div>'


def _card(event: Shown, colour: str) -> str:
    image = '<div class="none">no picture</div>'
    if event.jpeg is not None:
        data = base64.b64encode(event.jpeg).decode("ascii")
        image = f'<img src="data:image/jpeg;base64,{data}" alt="a frame of event {event.number}">'
    words = f"<b>event {event.number}</b>{clock(event.begin)} to {clock(event.end)}<br>similarity {event.score:.3f}"
    return f'<figure style="border-color:{colour}">{image}<figcaption>{words}</figcaption></figure>'
