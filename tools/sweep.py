"""A run's stages, arms and seeds as processes side by side, in the order of what they need, on the GPUs that are there.

    python -m tools.sweep --config=experiments/regimes.py --workdir=runs/regimes --seeds=0,1,2 --jobs=8
    python -m tools.sweep --config=experiments/quickstart.py --workdir=runs/many --seeds=0,1,2 --config.sft.steps=500

Each stage is `marc_jax.train --config.only=STAGE` in <workdir>/seed_<n>, each group of arms `marc_jax.eval --answers`;
`--jobs` of them share a device and all of them one cache of compiled programs (<workdir>/programs). Stages begin in the
order of config.stages as soon as their init, teacher and retriever are finished. A failed one stops what needs it and
nothing else. The same command goes on where it stopped: finished stages and answered arms are not done again.

    <workdir>/seed_<n>/<stage>, logs/<stage>.log, eval/predictions/<arm>.jsonl
    --also=experiments/baselines.py    answers the arms of further configs of the same run, to eval_<name>
    --stop_after=SECONDS               then no stage begins or goes on (they save); what is finished is evaluated
    --pack=FILE.npz                    in the end packs answers and curves for `tools.sweep_report`

Exit code: 0, 1 where a process failed, 3 where --stop_after left something undone.
"""

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from marc_jax import checkpoint, files, settings
from marc_jax import config as configs

GROUP = 12  # arms that one process answers while stages still train
EVERY = 15.0  # seconds between lines of progress


@dataclasses.dataclass
class Job:
    """A process that waits, runs or has ended. `arms`: of an evaluation; those of a stage are empty.

    `state`: "waiting", "running", "done", "failed", "stopped" (by the clock) or "blocked" (by what it needs).
    """

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    steps: int = 0
    state: str = "waiting"
    device: str = ""
    process: subprocess.Popen | None = None
    begun: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class Answers:
    """The arms of one config for one seed that nobody has taken yet; `out` is where their predictions go."""

    seed: str
    config: object
    given: str
    run: Path
    out: Path
    left: list[str]


class Sweep:
    """All jobs of a sweep, and who runs where. `settle` and `start` are called in turns until nothing is left."""

    def __init__(self, stages: list[Job], answers: list[Answers], devices: list[str], per_device: int, cache: Path):
        self.jobs = {job.name: job for job in stages}
        self.answers, self.devices, self.per_device, self.cache = answers, devices, per_device, cache
        self.stopped = False

    def named(self, state: str, arms: bool | None = None) -> list[Job]:
        jobs = [job for job in self.jobs.values() if job.state == state]
        return jobs if arms is None else [job for job in jobs if bool(job.arms) == arms]

    @property
    def over(self) -> bool:
        left = any(self._ready(asked) for asked in self.answers)
        return not (self.named("running") or left or (self.named("waiting") and not self.stopped))

    def settle(self) -> list[Job]:
        """Takes note of processes that have ended, and of stages that now never can begin; returns those."""
        ended = []
        for job in self.named("running"):
            code = job.process.poll()
            if code is None:
                continue
            job.seconds = time.monotonic() - job.begun
            whole = not job.steps or finished(job.log.parent.parent, job.name.split("/")[1], job.steps)
            job.state = "done" if code == 0 and whole else "stopped" if self.stopped and not job.arms else "failed"
            ended.append(job)
        blocked = True
        while blocked:
            lost = {name for name, job in self.jobs.items() if job.state in ("failed", "blocked")}
            blocked = [job for job in self.named("waiting") if lost & set(job.needs)]
            for job in blocked:
                job.state = "blocked"
            ended += blocked
        return ended

    def start(self) -> list[Job]:
        """Starts what can begin where there is room: while stages train, arms on a third of the places at most."""
        begun = []
        while device := self._free():
            running = len(self.named("running", True))
            room = max(len(self.devices) * self.per_device // 3, 1)
            ready = [] if self.stopped else [j for j in self.named("waiting") if self._can_begin(j)]
            training = not self.stopped and bool(ready or self.named("running", False))
            job = self._arms(training) if not training or running < room else None
            job = job or next(iter(ready), None)
            if job is None:
                break
            self._begin(job, device)
            begun.append(job)
        return begun

    def stop(self) -> None:
        """No stage begins or goes on from here; those that run save and end."""
        self.stopped = True
        for job in self.named("running", False):
            job.process.terminate()

    def end(self) -> None:
        """Ends every process and waits for them."""
        for job in self.named("running"):
            job.process.terminate()
        for job in self.named("running"):
            job.process.wait()

    def _free(self) -> str | None:
        load = {device: sum(job.device == device for job in self.named("running")) for device in self.devices}
        device = min(load, key=load.get)
        return device if load[device] < self.per_device else None

    def _can_begin(self, job: Job) -> bool:
        return all(self.jobs[name].state == "done" for name in job.needs)

    def _done(self, asked: Answers, stage: str) -> bool:
        return self.jobs[f"seed_{asked.seed}/{stage}"].state == "done"

    def _ready(self, asked: Answers) -> list[str]:
        """Arms that can be answered: the teacher's first and alone, it lays down the memory of the held-out videos."""
        arms, teacher = asked.config.eval.arms, asked.config.eval.teacher
        base = [arms[teacher].stage, *(n for n in asked.config.stages if asked.config[n].kind == "retriever")]
        if not all(self._done(asked, stage) for stage in base):
            return []
        first = next(a for a in self.answers if a.seed == asked.seed)
        if not (first.out / "predictions" / f"{teacher}.jsonl").exists():
            return [teacher] if asked is first and teacher in asked.left else []
        return [arm for arm in asked.left if self._done(asked, arms[arm].stage)]

    def _arms(self, training: bool) -> Job | None:
        """The next process of arms: a whole group while stages train, in the end as many as give each place a share."""
        pools = [(asked, ready) for asked in self.answers if (ready := self._ready(asked))]
        places = len(self.devices) * self.per_device
        share = GROUP if training else max(-(-sum(len(ready) for _, ready in pools) // places), 2)
        for asked, ready in pools:
            teacher = asked.config.eval.teacher
            waits = training and len(ready) < min(GROUP, len(asked.left)) and ready != [teacher]
            if waits:
                continue
            chosen = ready[:share]
            asked.left = [arm for arm in asked.left if arm not in chosen]
            return _answering(asked, tuple(chosen), len(self.jobs))
        return None

    def _begin(self, job: Job, device: str) -> None:
        self.jobs[job.name] = job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        shown = {"CUDA_VISIBLE_DEVICES": device} if device != "cpu" else {}
        env = {
            **os.environ, **shown, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache.resolve()), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }  # fmt: skip
        with job.log.open("a", encoding="utf-8") as log:
            job.process = subprocess.Popen(job.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        job.state, job.device, job.begun = "running", device, time.monotonic()


def finished(run: Path, stage: str, steps: int) -> bool:
    """Whether a stage has saved its last step."""
    return steps in checkpoint.steps(run / stage / "checkpoints")


def stage_jobs(config, given: str, workdir: Path, seed: str, overrides: list[str]) -> list[Job]:
    """One job for each stage of one seed, in the order of config.stages; those that are finished are done."""
    run, jobs = workdir / f"seed_{seed}", []
    retriever = [name for name in config.stages if config[name].kind == "retriever"]
    for name in config.stages:
        c = config[name]
        asks = c.get("view") and config.views[c.view].select == "retrieve"
        wanted = {c.init, c.get("teacher", ""), *(retriever if asks else ())} & set(config.stages)
        command = [sys.executable, "-m", "marc_jax.train", f"--config={given}", f"--workdir={run}", *overrides]
        command += [f"--config.seed={seed}", f"--config.only=('{name}',)"]
        job = Job(f"seed_{seed}/{name}", command, run / "logs" / f"{name}.log", steps=c.steps)
        job.needs = tuple(f"seed_{seed}/{other}" for other in config.stages if other in wanted - {name})
        job.state = "done" if finished(run, name, c.steps) else "waiting"
        jobs.append(job)
    return jobs


def answers_of(config, given: str, workdir: Path, seed: str, name: str) -> Answers:
    """What of config.eval.arms has no predictions yet; the teacher's first."""
    run = workdir / f"seed_{seed}"
    out = run / f"eval{name and '_'}{name}"
    arms = sorted(config.eval.arms, key=lambda arm: arm != config.eval.teacher)
    left = [arm for arm in arms if not (out / "predictions" / f"{arm}.jsonl").exists()]
    return Answers(seed, config, given, run, out, left)


def _answering(asked: Answers, arms: tuple[str, ...], number: int) -> Job:
    command = [sys.executable, "-m", "marc_jax.eval", f"--config={asked.given}", f"--checkpoint={asked.run}"]
    command += [*configs.overrides(), f"--config.seed={asked.seed}", f"--out={asked.out}", f"--arms={','.join(arms)}"]
    more = f" and {len(arms) - 1} more" if len(arms) > 1 else ""
    name = f"seed_{asked.seed}/{asked.out.name} {arms[0]}{more}"
    return Job(name, [*command, "--answers"], asked.run / "logs" / f"{asked.out.name}_{number}.log", arms=arms)


def devices() -> list[str]:
    """GPUs by number as strings, or ["cpu"]."""
    if flags.FLAGS.devices:
        return flags.FLAGS.devices
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return ["cpu"]
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return shown.split(",")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ["cpu"]
    return re.findall(r"^GPU (\d+)", listed, re.MULTILINE) or ["cpu"]


def progress(sweep: Sweep, seconds: float) -> str:
    """One line: the time, how many stages and arms are done, and how far those are that run."""
    stages = [job for job in sweep.jobs.values() if job.steps]
    done = sum(job.state == "done" for job in stages)
    now = [f"{job.name} {_step(job)}/{job.steps}" if job.steps else job.name for job in sweep.named("running")]
    left = sum(len(asked.left) for asked in sweep.answers)
    head = f"{_clock(seconds)}  {done} of {len(stages)} stages, {left} arms to answer"
    return f"{head}; now {', '.join(now) or 'nothing'}"


def _step(job: Job) -> int:
    """The last step that the job's stage has logged."""
    path = job.log.parent.parent / job.name.split("/")[1] / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            return int(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def told(job: Job, seconds: float) -> str:
    """What became of a job, with the last line of its log where it failed."""
    line = f"{_clock(seconds)}  {job.name}: {job.state}"
    if job.state == "blocked":
        return f"{line}, it needs {', '.join(job.needs)}"
    line += f" after {job.seconds:.0f} s"
    if job.state == "failed":
        text = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        line += f": {text[-1] if text else 'no output'} ({job.log})"
    return line


def main() -> int:
    if not flags.FLAGS.config:
        raise configs.ConfigError("--config=FILE.py is required, e.g. --config=experiments/regimes.py")
    workdir, given, seeds = Path(flags.FLAGS.workdir), flags.FLAGS.config, flags.FLAGS.seeds
    if wrong := [seed for seed in seeds if not seed.isdecimal()] or [s for s in seeds if seeds.count(s) > 1]:
        raise configs.ConfigError(f"--seeds: {wrong[0]!r} is no number, or there twice")
    if flags.FLAGS.jobs < 1:
        raise configs.ConfigError(f"--jobs={flags.FLAGS.jobs}: at least one process on each device")
    config = settings.experiment(given)
    also = {Path(path.split(".py")[0]).name: (path, settings.experiment(path)) for path in flags.FLAGS.also}
    stages = [stage_jobs(config, given, workdir, seed, configs.overrides()) for seed in seeds]
    answers = []
    for name, (path, c) in {"": (given, config), **also}.items():
        answers += [answers_of(c, path, workdir, seed, name) for seed in seeds if c.eval.arms]
    by_importance = [job for jobs in zip(*stages, strict=True) for job in jobs]
    sweep = Sweep(by_importance, answers, devices(), flags.FLAGS.jobs, workdir / "programs")
    sweep.cache.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        follow(sweep, flags.FLAGS.stop_after)
    finally:
        remember(sweep, workdir / "sweep.json", time.monotonic() - started)
        sweep.end()
    if flags.FLAGS.pack:
        from tools import sweep_report

        sweep_report.pack(workdir, [f"seed_{seed}" for seed in seeds], Path(flags.FLAGS.pack))
    return outcome(sweep)


def follow(sweep: Sweep, stop_after: float) -> None:
    """Until nothing can run any more, one line for each process that ends and one of progress now and then."""
    started = shown = time.monotonic()
    print(f"{len(sweep.named('waiting'))} stages to train on {', '.join(sweep.devices)}", flush=True)
    while not sweep.over:
        sweep.start()
        time.sleep(0.2)
        now = time.monotonic()
        for job in sweep.settle():
            print(told(job, now - started), flush=True)
        if stop_after and now - started > stop_after and not sweep.stopped:
            print(f"{_clock(now - started)}  --stop_after: stages that run save and end", flush=True)
            sweep.stop()
        if now - shown > EVERY:
            print(progress(sweep, now - started), flush=True)
            shown = now
    print(progress(sweep, time.monotonic() - started), flush=True)


def remember(sweep: Sweep, path: Path, seconds: float) -> None:
    """What each stage took, when and by which command; what an earlier call did stays."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ran = [job for job in sweep.jobs.values() if job.seconds]
    told = {
        "command": " ".join(["python -m tools.sweep", *sys.argv[1:]]), "date": datetime.date.today().isoformat(),
        "seconds": round(before.get("seconds", 0) + seconds, 1),
        "jobs": before.get("jobs", {}) | {j.name: {"state": j.state, "seconds": round(j.seconds, 1)} for j in ran},
    }  # fmt: skip
    files.write_whole(path, json.dumps(told, indent=1) + "\n")


def outcome(sweep: Sweep) -> int:
    """Names what failed and what is undone; the exit code."""
    failed = sweep.named("failed") + sweep.named("blocked")
    undone = sweep.named("stopped") + sweep.named("waiting")
    for what, jobs in (("failed", failed), ("unfinished", undone)):
        if jobs:
            print(f"{what}: {', '.join(job.name for job in jobs)}", file=sys.stderr)
    return 1 if failed else 3 if undone else 0


if __name__ == "__main__":
    configs.define_flags(workdir="runs/sweep")
    flags.DEFINE_list("seeds", ["0"], "Seeds; each is a run of its own in <workdir>/seed_<n>.")
    flags.DEFINE_integer("jobs", 1, "Processes at a time on each device.")
    flags.DEFINE_list("devices", [], "GPUs by number; default those of CUDA_VISIBLE_DEVICES, else all, else the CPU.")
    flags.DEFINE_list("also", [], "Further configs of the same run, whose arms are answered too.")
    flags.DEFINE_float("stop_after", 0.0, "Seconds after which no stage begins or goes on; 0: never.")
    flags.DEFINE_string("pack", "", "File that answers and curves are packed into in the end.")
    configs.run_main(main)
