"""Tables, learning curves and Pareto plots of a sweep, over its seeds. `tools.sweep --pack` writes what this reads.

    python -m tools.sweep_report --pack=regimes.npz --workdir=runs/regimes             # again, from the runs
    python -m tools.sweep_report --packed=regimes.npz --config=experiments/regimes.py --out=OUT --into=docs/results.md
    python -m tools.sweep_report --packed=regimes.npz --config=experiments/baselines.py:regimes --out=OUT

OUT gets <name>.md (one table of all arms, one of config.eval.claims as paired differences, the seconds of each stage),
<name>_pareto.png and <name>_curves.png, <name> being the config's. --into also puts the tables between the lines
`<!-- sweep: <name> -->` and `<!-- end of sweep: <name> -->` of a document.

An accuracy is the mean over seeds; its interval resamples videos within all seeds, and each seed's own value stands
beside it: the interval says nothing of what another seed would bring, the spread does.
"""

import io
import json
import re
from pathlib import Path

import numpy as np
from absl import flags

from marc_jax import config as configs
from marc_jax import files, settings
from marc_jax.evaluation import equal_tokens, intervals, plots

FIELDS = {"correct": bool, "visual_tokens": np.int16, "completion_tokens": np.int16, "format_ok": bool}
CURVES = (  # panel, metric of metrics.jsonl, in percent
    ("SFT: tokens right, %", "mean_token_accuracy", 100),
    ("distillation: KL per token", "kl", 1),
    ("C-GRPO: sampled answers right, %", "accuracy", 100),
)
LOG = 3000  # characters of each log that are packed

flags.DEFINE_string("packed", "", "What --pack wrote.")
flags.DEFINE_string("out", "", "Folder for tables and plots.")
flags.DEFINE_string("into", "", "Document whose marked part is replaced.")


# ---------------------------------------------------------------- packing


def pack(workdir: Path, runs: list[str], out: Path) -> Path:
    """Answers (without their texts), metrics, ends of logs and what is known of the runs, as one compressed file."""
    arrays: dict[str, np.ndarray] = {}
    for run in runs:
        for folder in sorted((workdir / run).glob("eval*")):
            for path in sorted((folder / "predictions").glob("*.jsonl")):
                arrays |= _answers(path, f"{run}/{folder.name}")
            if (about := folder / "about.json").exists():
                arrays[f"{run}/{folder.name}/about"] = np.array(about.read_text(encoding="utf-8"))
        for path in sorted((workdir / run).glob("*/metrics.jsonl")):
            arrays[f"{run}/metrics/{path.parent.name}"] = np.array(path.read_text(encoding="utf-8"))
        for path in sorted((workdir / run / "logs").glob("*.log")):
            arrays[f"{run}/log/{path.stem}"] = np.array(path.read_text(encoding="utf-8", errors="replace")[-LOG:])
    if (told := workdir / "sweep.json").exists():
        arrays["sweep"] = np.array(told.read_text(encoding="utf-8"))
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    files.write_whole(out, data.getvalue())
    print(f"{out}: {len(data.getvalue()) / 1e6:.1f} MB")
    return out


def _answers(path: Path, where: str) -> dict[str, np.ndarray]:
    """Columns of one arm's predictions; the questions' own once for each folder, by their number."""
    rows = [row for line in path.read_text(encoding="utf-8").splitlines() if not (row := json.loads(line)).get("error")]
    rows.sort(key=lambda row: row["problem_id"])
    out = {f"{where}/{path.stem}/{name}": np.array([row[name] for row in rows], kind) for name, kind in FIELDS.items()}
    out[f"{where}/id"] = np.array([row["problem_id"] for row in rows], np.int32)
    out[f"{where}/type"] = np.array([row["question_type"] for row in rows])
    out[f"{where}/video"] = np.array([row["video"] for row in rows])
    return out


# ---------------------------------------------------------------- what was packed


class Packed:
    """Answers and curves of all seeds. Arms of a seed that lacks them are those of the others."""

    def __init__(self, path: str | Path, folder: str):
        with np.load(path) as found:
            self.arrays = dict(found)
        self.folder = folder
        self.runs = sorted({name.split("/")[0] for name in self.arrays if name.endswith(f"/{folder}/id")})

    def seeds(self, *arms: str) -> list[str]:
        """The runs in which all of these arms have been answered."""
        return [r for r in self.runs if all(f"{r}/{self.folder}/{arm}/correct" in self.arrays for arm in arms)]

    def column(self, run: str, arm: str, name: str, chosen: np.ndarray) -> np.ndarray:
        return self.arrays[f"{run}/{self.folder}/{arm}/{name}"][chosen]

    def questions(self, run: str, types=(), without=()) -> np.ndarray:
        """bool [questions] of one run: those of these types (all), without those."""
        kinds = self.arrays[f"{run}/{self.folder}/type"]
        return (np.isin(kinds, types) if types else np.ones(len(kinds), bool)) & ~np.isin(kinds, without)

    def videos(self, run: str, chosen: np.ndarray) -> np.ndarray:
        return np.char.add(f"{run}/", self.arrays[f"{run}/{self.folder}/video"][chosen])

    def rows(self, run: str, arm: str, chosen: np.ndarray) -> list[dict]:
        """One arm's answers as `evaluation.equal_tokens` takes them."""
        ids = self.arrays[f"{run}/{self.folder}/id"][chosen].tolist()
        right, read = (self.column(run, arm, name, chosen) for name in ("correct", "visual_tokens"))
        return [
            {"problem_id": i, "score": float(score), "visual_tokens": int(n)}
            for i, score, n in zip(ids, right, read, strict=True)
        ]

    def curves(self, stage: str) -> list[list[dict]]:
        """Rows of a stage's metrics, one list for each seed that has it."""
        texts = [str(self.arrays[k]) for k in sorted(self.arrays) if k.endswith(f"/metrics/{stage}")]
        return [[json.loads(line) for line in text.splitlines()] for text in texts]

    def told(self, name: str) -> dict:
        return json.loads(str(self.arrays[name])) if name in self.arrays else {}


def accuracy(packed: Packed, arm: str, minus: str = "", **which) -> dict | None:
    """{"mean", "ci95", "seeds", "n"} in percent of an arm's answers, or of the paired difference to another arm's.

    None where no seed has them, or no such question was asked.
    """
    parts, videos = [], []
    for run in packed.seeds(arm, *filter(None, [minus])):
        chosen = packed.questions(run, **which)
        right = packed.column(run, arm, "correct", chosen).astype(float)
        parts.append(right - packed.column(run, minus, "correct", chosen) if minus else right)
        videos.append(packed.videos(run, chosen))
    return summary(parts, videos) if sum(map(len, parts)) else None


def summary(parts: list[np.ndarray], videos: list[np.ndarray]) -> dict:
    """{"mean", "ci95", "seeds", "n"} in percent of each seed's scores [questions] and the videos they are about."""
    low, high = intervals.bootstrap_ratio(np.concatenate(parts), clusters=np.concatenate(videos))
    seeds = [100 * float(part.mean()) for part in parts]
    return {"mean": float(np.mean(seeds)), "ci95": [100 * low, 100 * high], "seeds": seeds, "n": sum(map(len, parts))}


def tokens(packed: Packed, arm: str) -> float:
    every = [packed.column(r, arm, "visual_tokens", packed.questions(r)).mean() for r in packed.seeds(arm)]
    return float(np.mean(every))


# ---------------------------------------------------------------- tables


def arm_table(packed: Packed, config) -> list[str]:
    """All arms, stage by stage and by tokens: accuracy, the share of the teacher's, what is left apart."""
    apart, teacher = tuple(config.eval.apart), config.eval.teacher
    first = accuracy(packed, teacher, without=apart)
    lines = ["| who answers, looking how | visual tokens | accuracy, % | each seed | % of the teacher | "
             f"{', '.join(apart)}, % |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    place = {name: i for i, name in enumerate(config.stages)}
    there = [arm for arm in config.eval.arms if packed.seeds(arm)]
    for arm in sorted(there, key=lambda arm: (arm != teacher, place[config.eval.arms[arm].stage], tokens(packed, arm))):
        found = accuracy(packed, arm, without=apart)
        other = accuracy(packed, arm, types=apart)
        kept = f"{100 * found['mean'] / first['mean']:.1f}" if first and first['mean'] else ""
        cells = [config.eval.arms[arm].label or arm, f"{tokens(packed, arm):.1f}", _interval(found), _each(found), kept]
        cells.append(f"{other['mean']:.0f}" if other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def claim_table(packed: Packed, config) -> list[str]:
    """config.eval.claims that are differences, paired question by question within each seed."""
    lines = ["| | difference, points | each seed |", "|---|--:|--:|"]
    for c in config.eval.claims.values():
        found = c.minus and accuracy(packed, c.arm, c.minus, without=tuple(config.eval.apart))
        if found:
            lines.append(f"| {c.text} | {_interval(found, '+')} | {_each(found, '+')} |")
    return lines if len(lines) > 2 else []


def equal_table(packed: Packed, config) -> list[str]:
    """Arms with an adaptive budget against fixed ones mixed to the same mean number of tokens, paired."""
    lines = ["| adaptive budget | visual tokens | against fixed budgets, points | each seed |", "|---|--:|--:|--:|"]
    for arm, fixed in equal_tokens.rivals(config.eval.arms, config.views).items():
        parts, videos = [], []
        for run in packed.seeds(arm, *fixed):
            chosen = packed.questions(run, without=tuple(config.eval.apart))
            own = packed.rows(run, arm, chosen)
            if (mixed := equal_tokens.rival(own, {name: packed.rows(run, name, chosen) for name in fixed})) is None:
                continue
            parts.append(np.array([a["score"] - b["score"] for a, b in zip(own, mixed[0], strict=True)]))
            videos.append(packed.videos(run, chosen))
        if parts:
            found = summary(parts, videos)
            label = config.eval.arms[arm].label or arm
            lines.append(f"| {label} | {tokens(packed, arm):.1f} | {_interval(found, '+')} | {_each(found, '+')} |")
    return lines if len(lines) > 2 else []


def stage_table(packed: Packed, config) -> list[str]:
    """What a stage's processes took, while others ran beside them."""
    told = packed.told("sweep").get("jobs", {})
    lines = ["| stage | steps | seconds, each seed |", "|---|--:|--:|"]
    for name in config.stages:
        spent = [job["seconds"] for key, job in told.items() if key.endswith(f"/{name}") and job["state"] == "done"]
        if spent:
            lines.append(f"| {name} | {config[name].steps:,} | {', '.join(f'{s:.0f}' for s in spent)} |")
    return lines if len(lines) > 2 else []


def _interval(found: dict, sign: str = "") -> str:
    return f"{found['mean']:{sign}.1f} ({found['ci95'][0]:{sign}.1f} to {found['ci95'][1]:{sign}.1f})"


def _each(found: dict, sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.1f}" for value in found["seeds"])


def text(packed: Packed, config, name: str) -> str:
    """The tables and what they come from, as Markdown."""
    about = packed.told(f"{packed.runs[0]}/{packed.folder}/about") or packed.told(f"{packed.runs[0]}/eval/about")
    every = accuracy(packed, config.eval.teacher)
    sweep, count = packed.told("sweep"), len(packed.runs)
    seeds = f"{count} seed{'s'[: count != 1]}, each with weights and videos of its own"
    lines = [
        f"{every['n']:,} held-out questions in all, {seeds}; {about.get('hardware', 'hardware unknown')}; "
        f"{sweep.get('date', 'date unknown')}; {sweep.get('seconds', 0) / 60:.1f} minutes. Intervals: 95 %, videos "
        "resampled within the seeds.", "",
    ]  # fmt: skip
    if sweep.get("command"):
        lines += [f"    {sweep['command']}", ""]
    lines += [*arm_table(packed, config), ""]
    more = claim_table(packed, config), equal_table(packed, config)
    for table in (*more, stage_table(packed, config) if packed.folder == "eval" else []):
        lines += [*table, ""] if table else []
    return "\n".join(lines)


def put_between(path: Path, name: str, new: str) -> None:
    """Replaces what stands between the document's two marks. Raises ConfigError where it has none."""
    begin, end = f"<!-- sweep: {name} -->", f"<!-- end of sweep: {name} -->"
    old = path.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise configs.ConfigError(f"{path} has no lines {begin!r} and {end!r}")
    head, rest = old.split(begin)
    files.write_whole(path, f"{head}{begin}\n{new.rstrip()}\n{end}{rest.split(end)[1]}")


# ---------------------------------------------------------------- plots


def draw_pareto(packed: Packed, config, path: Path) -> None:
    """Accuracy against tokens of every arm.

    Named are those that none beats with fewer tokens, and every student whose name has room beside its point.
    """
    theme, fig = plots.LIGHT, plots.figure(8.4, 5.4, plots.LIGHT)
    ax = fig.add_axes((0.075, 0.1, 0.9, 0.87))
    plots.style(ax, theme, "both")
    points = []
    for key in (key for key in config.eval.arms if packed.seeds(key)):
        found = accuracy(packed, key, without=tuple(config.eval.apart))
        points.append((max(tokens(packed, key), 1.0), found["mean"], key, found["ci95"]))
    best, stairs, named = -1.0, [], []
    for x, y, key, ci95 in sorted(points, key=lambda point: (point[0], -point[1])):
        group = config.eval.arms[key].group
        ax.plot([x, x], ci95, color=theme[group], linewidth=1.2, alpha=0.6)
        ax.plot(x, y, "o", color=theme[group], markersize=5, markeredgecolor=theme["bg"])
        room = all(abs(y - other) >= 2.2 or not 0.55 < x / at < 1.8 for at, other in named)
        if y > best or (group == "student" and room):
            named.append((x, y))
            ax.annotate(key, (x, y), (5, -3), textcoords="offset points", fontsize=7, color=theme["fg"])
        if y > best:
            best, stairs = y, [*stairs, (x, y)]
    ax.step(*zip(*stairs, strict=True), where="post", color=theme["muted"], linewidth=1.0, alpha=0.6, zorder=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("visual tokens (none: at 1)", fontsize=9)
    ax.set_ylabel("accuracy, %", fontsize=9)
    plots.save(fig, path)


def draw_curves(packed: Packed, config, path: Path) -> bool:
    """Each kind of training in a panel: the mean over seeds of every stage, and the band from lowest to highest."""
    theme, kinds = plots.LIGHT, {"sft": [], "distill": [], "cgrpo": [], "retriever": [], "encoder": []}
    for stage in config.stages:
        if packed.curves(stage) and config[stage].get("view", "full") != "full":
            kinds[config[stage].kind].append(stage)
    kinds = list(kinds.values())[:3]
    if not any(kinds):
        return False
    fig = plots.figure(7.2, 9.0, theme)
    axes = fig.subplots(3, 1)
    fig.subplots_adjust(0.085, 0.05, 0.74, 0.97, hspace=0.35)
    for ax, names, (title, key, scale) in zip(axes, kinds, CURVES, strict=True):
        plots.style(ax, theme, "y")
        ax.set_title(title, loc="left", fontsize=10, color=theme["fg"])
        for i, name in enumerate(names):
            found = [[(row["step"], scale * row[key]) for row in rows if key in row] for rows in packed.curves(name)]
            least = min(map(len, found), default=0)
            if not least:
                continue
            steps = np.array([step for step, _ in found[0][:least]])
            lines = np.array([plots.running_mean(np.array([v for _, v in rows[:least]]), 5) for rows in found])
            colour, dash = plots.LINES[i % len(plots.LINES)], ("-", "--", ":")[i // len(plots.LINES) % 3]
            ax.fill_between(steps, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)
            ax.plot(steps, lines.mean(0), dash, color=colour, linewidth=1.5, label=name)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, labelcolor=theme["fg"])
    plots.save(fig, path)
    return True


def main() -> None:
    if flags.FLAGS.pack:
        workdir = Path(flags.FLAGS.workdir)
        pack(workdir, sorted(path.name for path in workdir.glob("seed_*")), Path(flags.FLAGS.pack))
        return
    if not (flags.FLAGS.packed and flags.FLAGS.config and flags.FLAGS.out):
        raise configs.ConfigError("--packed=FILE.npz, --config=FILE.py and --out=FOLDER are required")
    config, out = settings.experiment(flags.FLAGS.config), Path(flags.FLAGS.out)
    name = Path(re.split(r"\.py(?::|$)", flags.FLAGS.config)[0]).name
    packed = Packed(flags.FLAGS.packed, f"eval_{name}")
    packed = packed if packed.runs else Packed(flags.FLAGS.packed, "eval")
    if not packed.seeds(config.eval.teacher):
        raise configs.ConfigError(f"{flags.FLAGS.packed} holds no answers of the arm {config.eval.teacher!r}")
    out.mkdir(parents=True, exist_ok=True)
    made = text(packed, config, name)
    files.write_whole(out / f"{name}.md", made)
    draw_pareto(packed, config, out / f"{name}_pareto.png")
    draw_curves(packed, config, out / f"{name}_curves.png")
    if flags.FLAGS.into:
        put_between(Path(flags.FLAGS.into), name, made)
    print(made)


if __name__ == "__main__":
    configs.define_flags(workdir="runs/sweep")
    flags.DEFINE_string("pack", "", "Packs --workdir's runs into this file.")
    configs.run_main(main)
