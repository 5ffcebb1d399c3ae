"""Plots of the report as matplotlib figures (Agg, no global state); each takes the report's numbers and a theme.

Colours are Okabe and Ito's, readable by colour-blind people, and every mark carries its label: nothing hangs on colour.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from marc_jax import files

LIGHT = {
    "name": "light", "fg": "#1c2733", "muted": "#66717e", "grid": "#e3e8ee", "bg": "#ffffff",
    "teacher": "#0072b2", "student": "#d55e00", "baseline": "#9aa4af", "heat": ("#f3f7fb", "#0b4f82"),
}  # fmt: skip
DARK = {
    "name": "dark", "fg": "#e8edf2", "muted": "#9ca8b5", "grid": "#2c3742", "bg": "#161d25",
    "teacher": "#56b4e9", "student": "#f28e2b", "baseline": "#76828f", "heat": ("#1d2731", "#56b4e9"),
}  # fmt: skip
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# Panels of a stage's curves, the first four found are drawn: (label, names the metric may have, percent).
PANELS = (
    ("loss", ("loss", "ce", "nll"), False),
    ("KL to the teacher", ("distill_kl", "reverse_kl", "kl_teacher"), False),
    ("reward", ("reward", "rewards"), False),
    ("accuracy", ("accuracy", "acc", "reward_accuracy"), True),
    ("dead groups", ("dead_groups", "dead", "dead_share", "frac_reward_zero_std"), True),
    ("KL to the reference", ("kl", "kl_ref"), False),
    ("recall@1", ("recall@1", "recall_1", "recall1"), True),
    ("format", ("format", "format_rate", "reward_format"), True),
    ("entropy", ("entropy",), False),
    ("gradient norm", ("grad_norm", "gradient_norm"), False),
)


def figure(width: float, height: float, theme: Mapping):
    """An empty figure of width x height inches in the theme's background, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), facecolor=theme["bg"])
    FigureCanvasAgg(fig)
    return fig


def save(fig, path: str | os.PathLike, dpi: int = 160) -> Path:
    """Writes the figure as PNG: all of it or nothing, byte for byte the same for the same figure."""
    path, png = Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(png, format="png", dpi=dpi, facecolor=fig.get_facecolor(), metadata={"Software": None})
    files.write_whole(path, png.getvalue())
    return path


def style(ax, theme: Mapping, grid: str | None = None) -> None:
    """Takes away what carries no information; leaves light grid lines along `grid` ("x", "y", "both")."""
    ax.set_facecolor(theme["bg"])
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme["grid"])
    ax.tick_params(colors=theme["muted"], labelsize=9, length=0)
    ax.xaxis.label.set_color(theme["muted"])
    ax.yaxis.label.set_color(theme["muted"])
    if grid:
        ax.grid(axis=grid, color=theme["grid"], linewidth=0.8)
        ax.set_axisbelow(True)


def spread(wanted: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Positions at least `gap` apart, in the wanted order, as near to the wanted ones as least squares allows.

    Pool adjacent violators: with the gaps taken out, labels that would collide share the mean of what they wanted.
    `low` and `high` bound the result when all labels fit between them.
    """
    order = np.argsort(np.asarray(wanted, float), kind="stable")
    blocks: list[list[float]] = []  # [sum, count] of positions with the gaps taken out
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    flat = [total / count for total, count in blocks for _ in range(int(count))]
    top = high - (len(order) - 1) * gap
    placed = [max(low, min(value, max(low, top))) + rank * gap for rank, value in enumerate(flat)]
    result = [0.0] * len(order)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def headline(arm: Mapping) -> Mapping:
    """The numbers of an arm that count: its `headline` block when it has one, else the arm itself."""
    block = arm.get("headline")
    return block if block and block.get("accuracy") is not None else arm


def _tokens(arm: Mapping) -> str:
    count = arm.get("visual_tokens")
    return "" if count is None else f"{count:,.0f} token{'' if round(count) == 1 else 's'}"


def accuracy_bars(arms: Sequence[Mapping], chance: float | None, theme: Mapping):
    """Horizontal bars with 95 % intervals, a line for the teacher and one for chance."""
    fig = figure(7.2, 1.0 + 0.46 * len(arms), theme)
    ax = fig.add_axes((0.35, 0.42 / fig.get_figheight(), 0.45, 1 - 0.92 / fig.get_figheight()))
    style(ax, theme, "x")
    teacher = next((headline(arm)["accuracy"] for arm in arms if arm.get("group") == "teacher"), None)
    for y, arm in enumerate(arms):
        block = headline(arm)
        if block.get("accuracy") is None:
            continue
        low, high = block.get("ci95") or (block["accuracy"],) * 2
        ax.barh(y, block["accuracy"], 0.6, color=theme[arm.get("group", "baseline")])
        ax.plot([low, high], [y, y], color=theme["fg"], linewidth=1.6, solid_capstyle="butt")
        ax.text(104, y, f"{block['accuracy']:.1f}", va="center", color=theme["fg"], fontsize=10.5, weight="bold")
        ax.text(117, y, f"{low:.1f} – {high:.1f}", va="center", color=theme["muted"], fontsize=8.5)
    for value, text, dash in ((teacher, "teacher", (4, 3)), (chance, "chance", (1, 2))):
        if value is not None:
            ax.axvline(value, color=theme["fg"], linewidth=1, dashes=dash, zorder=3)
            ax.text(value, -0.75, text, ha="center", va="bottom", color=theme["muted"], fontsize=9)
    ax.set_yticks(range(len(arms)), [""] * len(arms))
    for y, arm in enumerate(arms):
        ax.text(-2, y - 0.02, arm["label"], ha="right", va="bottom", color=theme["fg"], fontsize=10, parse_math=False)
        ax.text(-2, y + 0.06, _tokens(arm), ha="right", va="top", color=theme["muted"], fontsize=8)
    ax.set(xlim=(0, 100.5), ylim=(len(arms) - 0.5, -0.7), xticks=range(0, 101, 20))
    ax.set_xlabel("accuracy, %  (line: 95 % interval)", fontsize=9)
    return fig


def type_heat(arms: Sequence[Mapping], chance: Mapping | None, apart: Sequence[str], theme: Mapping):
    """Arms by question types, every cell with its number; chance in the last row. None when there are no types."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    types = sorted({name for arm in arms for name in arm.get("per_type", {})}, key=lambda name: (name in apart, name))
    if not types:
        return None
    levels = (chance or {}).get("per_type", {})
    known = [arm for arm in arms if arm.get("per_type")]
    rows = [(arm["label"], {n: c.get("accuracy") for n, c in arm["per_type"].items()}) for arm in known]
    if levels:
        rows.append(("chance (blind guess)", {name: level.get("uniform") for name, level in levels.items()}))
    fig = figure(7.2, 0.75 + 0.4 * len(rows), theme)
    ax = fig.add_axes((0.36, 0.05 / fig.get_figheight(), 0.62, 1 - 0.6 / fig.get_figheight()))
    style(ax, theme)
    colours = LinearSegmentedColormap.from_list("heat", theme["heat"])
    for y, (_, cells) in enumerate(rows):
        for x, name in enumerate(types):
            value = cells.get(name)
            shade = colours(0.0 if value is None else value / 100)
            shift = 0.12 if name in apart else 0.0
            ax.add_patch(_cell(x + shift, y, shade))
            bright = np.dot(to_rgb(shade), (0.299, 0.587, 0.114))
            text = "–" if value is None else f"{value:.0f}"
            ink = "#111820" if bright > 0.55 else "#ffffff"
            ax.text(x + shift + 0.47, y + 0.47, text, ha="center", va="center", fontsize=10, color=ink)
    for x, name in enumerate(types):
        shift = 0.12 if name in apart else 0.0
        text = ax.text(x + shift + 0.47, -0.15, _wrap(name, 14) + ("*" if name in apart else ""), parse_math=False)
        text.set(ha="center", va="bottom", fontsize=9, color=theme["fg"])
    for y, (label, _) in enumerate(rows):
        ink = theme["muted"] if levels and y == len(rows) - 1 else theme["fg"]
        ax.text(-0.1, y + 0.47, label, ha="right", va="center", fontsize=10, color=ink, parse_math=False)
    ax.set(xlim=(0, len(types) + 0.15), ylim=(len(rows), -0.05), xticks=[], yticks=[])
    ax.spines["bottom"].set_visible(False)
    return fig


def _cell(x: float, y: float, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.94, 0.94, color=colour, linewidth=0)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(str(text).replace("_", " "), width)[:2]) or str(text)


def pareto(arms: Sequence[Mapping], chance: float | None, theme: Mapping):
    """Accuracy against visual tokens; the stairs join the arms that none beats with fewer tokens. None without any."""
    known = [arm for arm in arms if arm.get("visual_tokens") is not None and headline(arm).get("accuracy") is not None]
    if not known:
        return None
    fig = figure(7.2, 4.6, theme)
    ax = fig.add_axes((0.085, 0.115, 0.89, 0.85))
    style(ax, theme, "both")
    counts = sorted({round(arm["visual_tokens"], 1) for arm in known})
    place = {count: math.log2(max(count, 1)) for count in counts}
    if 0 in place:
        place[0] = min([place[c] for c in counts if c > 0], default=1.0) - 1.6
    points = [(place[round(a["visual_tokens"], 1)], headline(a)["accuracy"], a) for a in known]
    left, right = min(place.values(), default=0), max(place.values(), default=1)
    span = max(right - left, 1.0)
    stairs, best = [], -math.inf
    for x, y, arm in sorted(points, key=lambda p: (p[0], -p[1])):
        if y > best and not arm.get("cited"):  # the front is of what was measured here
            stairs.append((x, y))
            best = y
    if stairs:
        xs, ys = zip(*stairs, strict=True)
        ax.step([*xs, right], [*ys, ys[-1]], where="post", color=theme["muted"], linewidth=1.2, alpha=0.6, zorder=2)
    if chance is not None:
        ax.axhline(chance, color=theme["fg"], linewidth=1, dashes=(1, 2))
        ax.text(right + 0.03 * span, chance + 0.8, "chance", color=theme["muted"], fontsize=9, ha="right", va="bottom")
    values = [y for _, y, _ in points] + ([chance] if chance is not None else [])
    low, high = max(0.0, min(values, default=0) - 8), min(104.0, max(values, default=100) + 8)
    for x, y, arm in points:
        colour = theme[arm.get("group", "baseline")]
        ax.plot([x, x], headline(arm).get("ci95") or [y, y], color=colour, linewidth=1.5, alpha=0.7, zorder=3)
        inside = {"markerfacecolor": theme["bg"]} if arm.get("cited") else {"markeredgecolor": theme["bg"]}
        ax.plot(x, y, "o", color=colour, markersize=7, zorder=4, **inside)
    ax.set(xlim=(left - 0.06 * span, right + (0.05 if right > left else 0.6) * span), ylim=(low, high))
    _label_points(ax, points, theme)
    ax.set_xticks([place[c] for c in counts], [f"{c:g}" for c in counts])
    ax.set_xlabel("visual tokens given to the language model (logarithmic)", fontsize=9)
    ax.set_ylabel("accuracy, %", fontsize=9)
    return fig


def _label_points(ax, points: Sequence[tuple], theme: Mapping) -> None:
    """Writes each arm's name in the nearest free place to its point, with a hair line when that is not beside it."""
    from matplotlib.patheffects import withStroke

    frame = ax.get_window_extent()
    spots = [ax.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    line = 9.5 / 72 * ax.figure.dpi * 1.25
    moves = sorted(((side, step) for side in (1, -1) for step in range(-14, 15)), key=lambda m: (abs(m[1]), -m[0]))
    for i in sorted(range(len(points)), key=lambda i: -spots[i][1]):
        px, py = spots[i]
        text = ax.text(0, 0, points[i][2]["label"], fontsize=9, va="center", parse_math=False, zorder=5)
        text.set_color(theme["fg"])
        width = text.get_window_extent(ax.figure.canvas.get_renderer()).width
        for side, step in moves:
            x0 = px + (10 if side > 0 else -10 - width)
            y0 = py + step * line * 0.5
            box = (x0 - 2, y0 - line / 2, x0 + width + 2, y0 + line / 2)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for k, other in enumerate(taken) if k != i):
                break
        else:
            x0, y0, box = px + 10, py, (px, py, px, py)
        taken.append(box)
        text.set_path_effects([withStroke(linewidth=3, foreground=theme["bg"])])
        text.set_position(ax.transData.inverted().transform((x0, y0)))
        if abs(y0 - py) > line * 0.4:
            ends = [(px, py), (x0 - 2 if x0 > px else x0 + width + 2, y0)]
            ax.plot(*zip(*ax.transData.inverted().transform(ends), strict=True), color=theme["muted"], linewidth=0.6)


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def stage_curves(rows: Sequence[Mapping], theme: Mapping):
    """Up to four panels of one stage's metrics over steps: raw values pale, running mean strong and its end written."""
    panels = choose_panels(rows)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    fig = figure(5.4, 0.2 + 1.6 * lines, theme)
    axes = fig.subplots(lines, columns, squeeze=False)
    fig.subplots_adjust(0.095, 0.17 / lines, 0.9, 1 - 0.16 / lines, wspace=0.5, hspace=0.55)
    for i, ax in enumerate(axes.flat):
        if i >= len(panels):
            ax.set_visible(False)
            continue
        label, key, percent = panels[i]
        style(ax, theme, "y")
        steps, values = series(rows, key)
        values = values * (100 if percent and np.nanmax(values, initial=0.0) <= 1.0001 else 1)
        smooth = running_mean(values, max(5, len(values) // 25))
        colour = theme["teacher"]
        ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        ax.plot(steps, smooth, color=colour, linewidth=2)
        if len(smooth):
            ax.plot(steps[-1], smooth[-1], "o", color=colour, markersize=4)
            ax.annotate(f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), (6, 0), textcoords="offset points",
                        va="center", fontsize=9, weight="bold", color=theme["fg"], annotation_clip=False)  # fmt: skip
        ax.set_title(label + (", %" if percent else ""), loc="left", fontsize=10, color=theme["fg"], parse_math=False)
        ax.margins(x=0.02, y=0.15)
        ax.locator_params(nbins=5)
    return fig


def choose_panels(rows: Sequence[Mapping]) -> list[tuple[str, str, bool]]:
    """(label, metric name, percent) of at most four metrics worth a panel; unknown names only when nothing is known."""
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    names = sorted(numbers - {"step", "time"})
    last = {}
    for name in names:
        last.setdefault(name.removesuffix("/mean").removesuffix("_mean").rsplit("/", 1)[-1].lower(), name)
    found = []
    for label, spellings, percent in PANELS:
        name = next((last[s] for s in spellings if s in last), None)
        if name is not None:
            found.append((label, name, percent))
    if len(found) > 4 and any(label == "reward" for label, _, _ in found):
        found = [panel for panel in found if panel[0] != "loss"]  # a policy-gradient loss says nothing to the eye
    if not found:
        found = [(name, name, False) for name in names]
    return found[:4]


def series(rows: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, sorted by step; a step logged twice (a resumed run) keeps its last value."""
    found = {}
    for i, row in enumerate(rows):
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
            found[row.get("step", i)] = float(row[key])
    steps = sorted(found)
    return np.asarray(steps, float), np.asarray([found[s] for s in steps], float)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of 2 * (width // 2) + 1 values, cut at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    return (total[high] - total[low]) / np.maximum(high - low, 1)


def recall_bars(retriever: Mapping, theme: Mapping):
    """recall@k over k: one line for all questions, one per type, labelled at its end."""
    names = sorted((k for k in retriever if k.startswith("recall@")), key=lambda k: int(k.split("@")[1]))
    lines = {"all questions": retriever, **retriever.get("per_type", {})}
    if not names:
        return None
    fig = figure(5.4, 3.2, theme)
    ax = fig.add_axes((0.105, 0.15, 0.55, 0.81))
    style(ax, theme, "y")
    ks = [int(name.split("@")[1]) for name in names]
    ends = []
    for i, (label, cells) in enumerate(lines.items()):
        values = [cells.get(name) for name in names]
        if any(value is None for value in values):
            continue
        main = label == "all questions"
        colour = theme["fg"] if main else LINES[(i - 1) % len(LINES)]
        width, size = (3, 6) if main else (1.5, 4)
        ax.plot(ks, values, "o-", color=colour, linewidth=width, markersize=size, zorder=3 + main)
        ends.append((values[-1], label, colour, main))
    low = max(0.0, min((v for cells in lines.values() for k, v in cells.items() if k in names), default=0) - 6)
    spots = spread([end[0] for end in ends], (103 - low) * 0.075, low, 103)
    for (value, label, colour, main), spot in zip(ends, spots, strict=True):
        ax.annotate(f"{label}  {value:.1f}", (ks[-1], value), (ks[-1] + 0.06 * max(len(ks) - 1, 1), spot),
                    annotation_clip=False, va="center", fontsize=9.5, color=theme["fg"], parse_math=False,
                    weight="bold" if main else "normal",
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "relpos": (0, 0.5),
                                "shrinkA": 1, "shrinkB": 5})  # fmt: skip
    ax.set(xticks=ks, ylim=(low, 103), xlim=(ks[0] - 0.1, ks[-1] + 0.04))
    ax.set_xlabel("events retrieved (k)", fontsize=9)
    ax.set_ylabel("all needed events found, %", fontsize=9)
    return fig
