"""The commands that launch a run on a pod slice: as they are printed, and run with a gcloud that only notes them."""

import os
import shlex
import subprocess

import pytest

from tools import launch_tpu_pod as launch

BASE = {
    "name": "marc", "type": "v5litepod-16", "zone": "us-west4-a", "project": "p", "bucket": "b",
    "config": "experiments/marc_qwen25vl_3b.py", "run": "r3b",
}  # fmt: skip
WHERE = ["--zone=us-west4-a", "--project=p"]


def flags(*more, **change):
    return [*(f"--{k}={v}" for k, v in (BASE | change).items()), *more]


def printed(capsys, *more, **change):
    assert launch.main(flags("--dry_run", *more, **change)) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def shell(command):
    """The shell text of an ssh command, which must be one that bash can read."""
    text = next(part for part in command if part.startswith("--command=")).removeprefix("--command=")
    subprocess.run(["bash", "-n", "-c", text], check=True)
    return text


def test_everything_from_nothing_to_logs(capsys):
    made = printed(capsys, "--spot", "--", "--config.init_from=/mnt/marc/Qwen 3B")
    assert made[0] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "marc", "--accelerator-type=v5litepod-16",
                       "--version=v2-alpha-tpuv5-lite", "--spot", *WHERE]  # fmt: skip
    assert made[1] == ["git", "archive", "--format=tar.gz", "--output=marc_jax.tar.gz", "HEAD"]
    assert made[2][4:] == ["scp", "marc_jax.tar.gz", "marc:", "--worker=all", *WHERE]
    assert all(command[4:7] == ["ssh", "marc", "--worker=all"] for command in made[3:7])
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 b /mnt/marc" in shell(made[4])
    assert "uv pip install -q -e '.[tpu]'" in shell(made[5])
    text = shell(made[6])
    assert ".venv/bin/python -m marc_jax.train --config=experiments/marc_qwen25vl_3b.py" in text
    assert "--workdir=/mnt/marc/runs/r3b" in text
    assert "--coordinator=auto '--config.init_from=/mnt/marc/Qwen 3B'" in text
    assert made[7][4:7] == ["ssh", "marc", "--worker=0"] and len(made) == 8
    for command in made[3:]:
        shell(command)


def test_a_run_is_started_once_and_stopped_by_its_number(tmp_path):
    """The remote shell text itself, with a home of its own and a program that sleeps in place of python."""
    s = launch.Slice(**(BASE | {"run": "r"}))
    program = tmp_path / launch.TREE / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho started \"$@\"\nexec sleep 60\n")
    program.chmod(0o755)
    run = lambda made: subprocess.run(  # noqa: E731
        ["bash", "-c", shell(made[0])], cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, check=True, timeout=20
    )
    run(launch.train(s))
    number = int((tmp_path / "r.pid").read_text())
    try:
        run(launch.train(s))
        assert int((tmp_path / "r.pid").read_text()) == number
    finally:
        run(launch.stop(s))


def test_resume_follows_the_state_of_the_slice():
    s = launch.Slice(**(BASE | {"run": "r"}))
    verbs = lambda made: [command[4] if command[0] == "gcloud" else command[0] for command in made]  # noqa: E731
    again = ["create", "git", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert verbs(launch.resume(s, "PREEMPTED")) == ["delete", *again]
    assert verbs(launch.resume(s, "")) == again
    assert verbs(launch.resume(s, "READY")) == ["ssh"]
    with pytest.raises(launch.LaunchError, match="is CREATING: wait"):
        launch.resume(s, "CREATING")


@pytest.mark.parametrize(
    ("kind", "chips", "hosts"),
    [("v5litepod-8", 8, 1), ("v5litepod-256", 256, 64), ("v6e-16", 16, 4), ("v5p-64", 32, 8), ("v4-8", 4, 1)],
)
def test_sizes_count_chips_or_cores(capsys, kind, chips, hosts):
    s = launch.Slice(**(BASE | {"type": kind, "run": "r"}))
    assert (s.chips, s.hosts) == (chips, hosts)
    assert ("--coordinator=auto" in s.train("python3")) == (hosts > 1)


def test_the_commands_are_run_and_the_first_failure_ends_it(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "gcloud"
    fake.write_text(f"#!/bin/sh\necho \"$4 $5\" >> {tmp_path}/calls\ncase $4 in describe) echo PREEMPTED;; "
                    "create) exit 3;; esac\n")  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch.main(flags("--only=resume")) == 2
    assert (tmp_path / "calls").read_text().splitlines() == ["describe marc", "delete marc", "create marc"]
    assert "the command above ended with code 3" in capsys.readouterr().err


def test_a_jobset_of_a_pod_per_host(capsys):
    yaml = pytest.importorskip("yaml")
    more = ("--manifest=-", "--image=img", "--topology=4x4", "--spot", "--", "--config.data.root=/mnt/marc/it's")
    assert launch.main(flags(*more)) == 0
    text, _, other = capsys.readouterr().out.partition("\n# ")
    tree = yaml.safe_load(text)
    job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert tree["metadata"]["name"] == "r3b" and job["parallelism"] == job["completions"] == 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    box = pod["containers"][0]
    assert box["resources"]["limits"] == {"google.com/tpu": 4}
    assert shlex.split(box["command"][2])[-1] == "--config.data.root=/mnt/marc/it's"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert shlex.split(other)[:3] == ["xpk", "workload", "create"]


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"type": "v3-8"}, (), "--type=v3-8: choose one of v4-N"),
        ({"type": "v6e"}, (), "--type=v6e: "),
        ({"name": "Marc"}, (), "--name=Marc: "),
        ({"bucket": "gs://b"}, (), "--bucket=gs://b: the name alone"),
        ({}, ("--only=start",), "--only=start: choose of create"),
        ({}, ("--manifest=-", "--image=i", "--topology=2x4"), "--topology=2x4 is not the 16 chips"),
        ({}, ("--manifest=-",), "--manifest needs --image"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, change, more, words):
    assert launch.main(flags("--dry_run", *more, **change)) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
