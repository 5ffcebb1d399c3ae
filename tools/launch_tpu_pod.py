"""Train on a TPU pod slice of Google Cloud: make it, set it up, run on all its workers, follow, resume, remove.

    python -m tools.launch_tpu_pod --name=marc --type=v5litepod-16 --zone=us-west4-a --project=my-project \\
        --bucket=my-bucket --config=experiments/marc_qwen25vl_3b.py --run=3b --dry_run \\
        -- --config.init_from=/mnt/marc/Qwen2.5-VL-3B-Instruct --config.data.root=/mnt/marc/videos

Steps: create, setup, train, logs; on request (--only=...) bucket, status, resume, stop, delete. Each is one or a few
`gcloud` commands, printed before they run; with --dry_run they are only printed. `resume` is what follows a preemption:
it removes a slice that is gone, makes a new one and starts the same command, which goes on from the newest checkpoint
in the bucket. What goes to the workers is the commit that is checked out here.

--manifest=FILE writes a GKE JobSet instead, for `kubectl apply -f`, and prints the same run as an xpk command.
Everything after `--` goes to `marc_jax.train`. Weights, data and runs lie in the bucket, mounted at /mnt/marc.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import shlex
import subprocess
import sys

MOUNT = "/mnt/marc"
TREE = "marc_jax"  # the source tree in a worker's home
ARCHIVE = "marc_jax.tar.gz"
STEPS = ("create", "setup", "train", "logs")
# family -> (runtime image, GKE accelerator, whether its sizes count TensorCores, two to a chip).
FAMILIES = {
    "v4": ("tpu-ubuntu2204-base", "tpu-v4-podslice", True),
    "v5litepod": ("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", False),
    "v5p": ("v2-alpha-tpuv5", "tpu-v5p-slice", True),
    "v6e": ("v2-alpha-tpuv6e", "tpu-v6e-slice", False),
}
PER_HOST = 4  # chips of a host in a slice of several
ONE_HOST = 8  # chips up to which a v5e or v6e slice is one host
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class LaunchError(Exception):
    """A setting that cannot be, or a command that failed."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A pod slice and the run on it. `overrides` go to marc_jax.train; `spot`: cheaper, and taken away at any time."""

    name: str
    type: str
    zone: str
    project: str
    bucket: str
    config: str
    run: str
    overrides: tuple[str, ...] = ()
    spot: bool = False

    def __post_init__(self):
        for flag, value in (("name", self.name), ("run", self.run)):
            if not NAME.fullmatch(value):
                raise LaunchError(f"--{flag}={value}: a letter, then letters, digits and '-', lower case, 40 at most")
        if self.family not in FAMILIES or not self.size.isdigit() or not self.chips:
            known = ", ".join(f"{family}-N" for family in FAMILIES)
            raise LaunchError(f"--type={self.type}: choose one of {known}")
        if "/" in self.bucket:
            raise LaunchError(f"--bucket={self.bucket}: the name alone, without gs:// or a folder")

    @property
    def family(self) -> str:
        return self.type.partition("-")[0]

    @property
    def size(self) -> str:
        return self.type.partition("-")[2]

    @property
    def chips(self) -> int:
        return int(self.size) // (2 if FAMILIES[self.family][2] else 1)

    @property
    def hosts(self) -> int:
        alone = PER_HOST if FAMILIES[self.family][2] else ONE_HOST
        return 1 if self.chips <= alone else self.chips // PER_HOST

    def train(self, python: str) -> str:
        """The command that every host runs; the same again resumes the run."""
        parts = ["-m", "marc_jax.train", f"--config={self.config}", f"--workdir={MOUNT}/runs/{self.run}"]
        parts += ["--coordinator=auto"] if self.hosts > 1 else []
        return f"{python} {shlex.join([*parts, *self.overrides])}"


def gcloud(s: Slice, verb: str, *more: str) -> list[str]:
    where = (f"--zone={s.zone}", f"--project={s.project}")
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *more, *where]


def on(s: Slice, command: str, worker: str = "all") -> list[str]:
    """A shell command on one worker or all of them."""
    return gcloud(s, "ssh", s.name, f"--worker={worker}", f"--command={command}")


def bucket(s: Slice) -> list[list[str]]:
    """A bucket with real folders: a checkpoint is committed by renaming one."""
    region = s.zone.rpartition("-")[0]
    how = (f"--project={s.project}", f"--location={region}", "--uniform-bucket-level-access")
    return [["gcloud", "storage", "buckets", "create", f"gs://{s.bucket}", *how, "--enable-hierarchical-namespace"]]


def create(s: Slice) -> list[list[str]]:
    spot = ["--spot"] if s.spot else []
    return [gcloud(s, "create", s.name, f"--accelerator-type={s.type}", f"--version={FAMILIES[s.family][0]}", *spot)]


def setup(s: Slice) -> list[list[str]]:
    """The checked-out commit and the bucket, on every worker; may be run again."""
    key, source = "/usr/share/keyrings/cloud.google.asc", "https://packages.cloud.google.com/apt"
    fuse = (
        f"command -v gcsfuse || (curl -fsS {source}/doc/apt-key.gpg | sudo tee {key} > /dev/null && "
        f'echo "deb [signed-by={key}] {source} gcsfuse-$(lsb_release -c -s) main" | '
        "sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get update -q && sudo apt-get install -yq gcsfuse)"
    )
    # Without real folders in the bucket a rename moves files one by one, and by default not at all.
    mount = (
        f"sudo mkdir -p {MOUNT} && sudo chown $USER {MOUNT} && (mountpoint -q {MOUNT} || "
        f"gcsfuse --implicit-dirs --rename-dir-limit=100000 {shlex.quote(s.bucket)} {MOUNT})"
    )
    install = (
        f"mkdir -p {TREE} && tar -xzf {ARCHIVE} -C {TREE} && python3 -m pip install -q --user uv && cd {TREE} && "
        "python3 -m uv venv -q --allow-existing --python=3.11 .venv && python3 -m uv pip install -q -e '.[tpu]'"
    )
    return [
        ["git", "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"],
        gcloud(s, "scp", ARCHIVE, f"{s.name}:", "--worker=all"),
        *(on(s, command) for command in (fuse, mount, install)),
    ]


def train(s: Slice) -> list[list[str]]:
    """Starts the run on every worker, where it outlives the connection; one that runs already is left alone."""
    start = f"nohup {s.train('.venv/bin/python')} >> ~/{s.run}.log 2>&1 < /dev/null & echo $! > ~/{s.run}.pid"
    return [on(s, f"kill -0 $(cat ~/{s.run}.pid) 2> /dev/null || {{ cd {TREE} && {{ {start}; }}; }}")]


def logs(s: Slice) -> list[list[str]]:
    return [on(s, f"tail -n 50 -F ~/{s.run}.log", worker="0")]


def status(s: Slice) -> list[list[str]]:
    return [gcloud(s, "describe", s.name, "--format=value(state)")]


def stop(s: Slice) -> list[list[str]]:
    """SIGTERM: the run saves at the next step border and ends."""
    return [on(s, f"kill -TERM $(cat ~/{s.run}.pid)")]


def delete(s: Slice) -> list[list[str]]:
    return [gcloud(s, "delete", s.name, "--quiet")]


def resume(s: Slice, state: str = "PREEMPTED") -> list[list[str]]:
    """What brings the run back, by the state of the slice ("" where there is none)."""
    if state == "READY":
        return train(s)
    if state not in ("", "PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED"):
        raise LaunchError(f"slice {s.name} is {state}: wait until it is READY, or gone")
    return [*(delete(s) if state else []), *create(s), *setup(s), *train(s)]


COMMANDS = {
    "create": create, "setup": setup, "train": train, "logs": logs, "bucket": bucket, "status": status,
    "resume": resume, "stop": stop, "delete": delete,
}  # fmt: skip


def xpk(s: Slice, image: str) -> list[str]:
    """The same run by xpk, on the GKE cluster `name`; the bucket must be mounted there (`xpk storage attach`)."""
    return [
        "xpk", "workload", "create", f"--cluster={s.name}", f"--workload={s.run}", f"--tpu-type={s.type}",
        f"--zone={s.zone}", f"--project={s.project}", f"--docker-image={image}", "--max-restarts=100",
        f"--command={s.train('python3')}",
    ]  # fmt: skip


def manifest(s: Slice, image: str, topology: str) -> str:
    """A GKE JobSet: a pod per host, all restarted after a preemption; the bucket by Cloud Storage FUSE.

    Raises:
      LaunchError: no image, or a topology of another number of chips.
    """
    sides = topology.split("x")
    if not image or not all(side.isdigit() for side in sides):
        raise LaunchError("--manifest needs --image (the source tree, installed with [tpu]) and --topology, e.g. 4x4")
    if math.prod(int(side) for side in sides) != s.chips:
        raise LaunchError(f"--topology={topology} is not the {s.chips} chips of --type={s.type}")
    spot = '\n              cloud.google.com/gke-spot: "true"' if s.spot else ""
    return MANIFEST.format(
        run=s.run, hosts=s.hosts, accelerator=FAMILIES[s.family][1], topology=topology, spot=spot, image=image,
        command=s.train("python3").replace("'", "''"), chips=s.chips // s.hosts, mount=MOUNT, bucket=s.bucket,
    )  # fmt: skip


MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {run}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        completionMode: Indexed
        backoffLimit: 0
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}{spot}
            containers:
            - name: train
              image: {image}
              command: ["bash", "-c", 'exec {command}']
              resources:
                limits:
                  google.com/tpu: {chips}
              volumeMounts:
              - name: marc
                mountPath: {mount}
            volumes:
            - name: marc
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: {bucket}
                  mountOptions: "implicit-dirs,rename-dir-limit=100000"
"""


def perform(command: list[str], *, told: bool = False) -> str:
    """Prints a command, runs it, and returns its output where that is asked for (`told`), else shows it.

    Raises LaunchError: it failed; a slice that does not exist has the state "".
    """
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, check=False, capture_output=told, text=True)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed: https://cloud.google.com/sdk/docs/install") from None
    if done.returncode and not (told and "NOT_FOUND" in done.stderr):
        reason = f": {' '.join(done.stderr.split())[:300]}" if told else ""
        raise LaunchError(f"the command above ended with code {done.returncode}{reason}")
    return done.stdout.strip() if told else ""


def parse(argv: list[str]) -> tuple[argparse.Namespace, Slice]:
    border = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, text in (
        ("name", "of the slice (for xpk: of the cluster)"), ("type", "v5litepod-16, v6e-16, v5p-64, v4-32, ..."),
        ("zone", "e.g. us-west4-a"), ("project", "of Google Cloud"), ("bucket", "its name; see --only=bucket"),
        ("config", "experiment file, in the source tree"), ("run", "its folder is runs/RUN in the bucket"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {', '.join(COMMANDS)}")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    parser.add_argument("--manifest", default="", help="write a GKE JobSet to this file (-: print it) and end")
    parser.add_argument("--image", default="", help="container image, for --manifest")
    parser.add_argument("--topology", default="", help="of the slice's chips, e.g. 4x4, for --manifest")
    flags = parser.parse_args(argv[:border])
    given = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Slice) if field.name in flags}
    return flags, Slice(**given, overrides=tuple(argv[border + 1 :]))


def launch(flags: argparse.Namespace, s: Slice) -> None:
    if flags.manifest:
        text = manifest(s, flags.image, flags.topology)
        if flags.manifest == "-":
            print(text)
        else:
            pathlib.Path(flags.manifest).write_text(text, encoding="utf-8")
        print(f"# {shlex.join(xpk(s, flags.image))}")
        return
    steps = flags.only.split(",")
    if unknown := [name for name in steps if name not in COMMANDS]:
        raise LaunchError(f"--only={unknown[0]}: choose of {', '.join(COMMANDS)}")
    for name in steps:
        if flags.dry_run:
            print("\n".join(shlex.join(command) for command in COMMANDS[name](s)))
            continue
        commands = resume(s, perform(*status(s), told=True)) if name == "resume" else COMMANDS[name](s)
        for command in commands:
            perform(command)


def main(argv: list[str] | None = None) -> int:
    try:
        launch(*parse(sys.argv[1:] if argv is None else argv))
    except LaunchError as e:
        print(f"launch_tpu_pod: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
