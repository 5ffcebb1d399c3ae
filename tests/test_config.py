import os
import pathlib
import subprocess
import sys
import time

import pytest
from ml_collections import config_dict

from marc_jax import config

REPO = pathlib.Path(__file__).resolve().parent.parent


def make_defaults():
    return config_dict.ConfigDict(
        {
            "seed": 0,
            "name": "base",
            "bf16": True,
            "sizes": (1, 2),
            "kinds": ["a"],
            "limit": config_dict.placeholder(int),
            "optimizer": {"learning_rate": 1e-3, "steps": 10, "schedule": "cosine"},
            "data": {"path": None},
        }
    )


def load(*overrides, path=None):
    return config.load(make_defaults(), path, overrides)


def write(folder, body, name="experiment.py"):
    path = folder / name
    path.write_text(body)
    return str(path)


def config_file(folder, *assignments):
    lines = ["from ml_collections import config_dict", "", "def get_config(arg=''):", " c = config_dict.ConfigDict()"]
    return write(folder, "\n".join(lines + [f" {line}" for line in assignments] + [" return c"]))


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("seed=3", "seed", 3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("name=none", "name", "none"),
        ("name=5", "name", "5"),
        ("name=a=b", "name", "a=b"),
        ("bf16=false", "bf16", False),
        ("sizes=(3, 4, 5)", "sizes", (3, 4, 5)),
        ("sizes=3,4", "sizes", (3, 4)),
        ("sizes=7", "sizes", (7,)),
        ("kinds=x,y", "kinds", ["x", "y"]),
        ("limit=4", "limit", 4),
        ("limit=none", "limit", None),
        ("data.path=/videos", "data.path", "/videos"),
    ],
)
def test_overrides_keep_types(override, key, value):
    got = config.flat(load(f"--config.{override}"))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "optimizer.learning_rat=1",
            "unknown key config.optimizer.learning_rat; did you mean config.optimizer.learning_rate?",
        ),
        ("learning_rate=1", "unknown key config.learning_rate; did you mean config.optimizer.learning_rate?"),
        ("optimizer.steps.x=1", "unknown key config.optimizer.steps.x"),
        ("qqqqqqqq=1", "unknown key config.qqqqqqqq"),
        ("optimizer=1", "config.optimizer is a group of keys: learning_rate, schedule, steps"),
        ("seed=abc", "config.seed is of type int, cannot take 'abc'"),
        ("seed=1.5", "config.seed is of type int, cannot take '1.5'"),
        ("seed=true", "config.seed is of type int, cannot take 'true'"),
        ("bf16=maybe", "config.bf16 is of type bool, cannot take 'maybe'"),
        ("optimizer.learning_rate=none", "config.optimizer.learning_rate is of type float, cannot take 'none'"),
        ("limit=x", "config.limit is of type int, cannot take 'x'"),
    ],
)
def test_a_wrong_override_names_its_key(override, message):
    with pytest.raises(config.ConfigError) as e:
        load(f"--config.{override}")
    assert message in str(e.value) and "\n" not in str(e.value)


def test_file_over_defaults_and_override_over_file(tmp_path):
    path = config_file(tmp_path, "c.seed = 5", "c.optimizer = dict(steps=20, learning_rate=1)", "c.sizes = [9]")
    got = load("--config.optimizer.steps=30", "--config.optimizer.steps=40", path=path)
    assert (got.seed, got.optimizer.steps, got.optimizer.learning_rate, got.sizes) == (5, 40, 1.0, (9,))
    assert got.optimizer.schedule == "cosine"
    with pytest.raises(AttributeError):
        got.optimizer.lr = 1
    assert make_defaults().seed == 0


def test_a_file_takes_an_argument(tmp_path):
    path = config_file(tmp_path, "c.name = arg")
    assert load(path=f"{path}:large").name == "large"


@pytest.mark.parametrize(
    "line, message",
    [
        ("c.sed = 1", "unknown key config.sed; did you mean config.seed?"),
        ("c.optimizer = dict(lr=1.0)", "unknown key config.optimizer.lr"),
        ("c.optimizer = 3", "config.optimizer is a group of keys, got 3"),
        ("c.seed = 'x'", "config.seed is of type int, cannot take 'x'"),
        ("c.seed = True", "config.seed is of type int, cannot take True"),
        ("c.seed = None", "config.seed is of type int, cannot take None"),
        ("c.name = 3", "config.name is of type str, cannot take 3"),
        ("1 / 0", "line 5: ZeroDivisionError"),
        ("import nothing_there", "line 5: ModuleNotFoundError"),
        ("c.seed = = 1", "line 5: invalid syntax"),
        ("return 3", "get_config() returned int"),
    ],
)
def test_a_wrong_file_is_named_with_its_key_or_line(tmp_path, line, message):
    path = config_file(tmp_path, line)
    with pytest.raises(config.ConfigError) as e:
        load(path=path)
    assert path in str(e.value) and message in str(e.value) and "\n" not in str(e.value)


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(config.ConfigError, match="nothere.py does not exist"):
        load(path=str(tmp_path / "nothere.py"))
    with pytest.raises(config.ConfigError, match="cannot be read: Is a directory"):
        load(path=str(tmp_path))
    with pytest.raises(config.ConfigError, match=r"has no function get_config\(\)"):
        load(path=write(tmp_path, ""))


def test_check_lists_every_broken_rule():
    rules = [
        (lambda c: c.seed > 0, "seed must be positive, is {seed}"),
        (lambda c: c.bf16, "never shown"),
        (lambda c: c.optimizer.steps % 3 == 0, "{optimizer.steps} steps do not divide by 3"),
    ]
    with pytest.raises(config.ConfigError) as e:
        config.check(load(), rules)
    assert str(e.value) == "seed must be positive, is 0; 10 steps do not divide by 3"
    config.check(load("--config.seed=1", "--config.optimizer.steps=9"), rules)


def test_equal_configs_give_equal_json():
    assert config.to_json(load("--config.seed=2")) == config.to_json(load("--config.seed=2"))
    assert config.to_json(load()) != config.to_json(load("--config.seed=2"))


def test_overrides_are_taken_out_of_the_arguments():
    argv = [
        "prog",
        "--workdir=x",
        "--config.a.b=1",
        "--config",
        "f.py",
        "--config.c",
        "2",
        "--noconfig.d",
        "--config.e",
    ]
    rest, overrides = config.split_argv(argv)
    assert rest == ["prog", "--workdir=x", "--config", "f.py"]
    assert overrides == ["--config.a.b=1", "--config.c=2", "--config.d=false", "--config.e=true"]


PROGRAM = '''"""A small program."""
from absl import flags
from ml_collections import config_dict
from marc_jax import config

config.define_flags(workdir="runs/x")
flags.DEFINE_integer("count", 3, "How many.")

class Odd(Exception):
    exit_code = 2

def defaults():
    return config_dict.ConfigDict({"seed": 0, "optimizer": {"learning_rate": 1e-3}})

def main():
    c = config.from_flags(defaults())
    if c.seed == 1: raise KeyboardInterrupt
    if c.seed == 2: raise OSError(28, "No space left on device", "runs/x/file")
    if c.seed == 3: raise Odd("clip.mp4: no\\n video stream")
    if c.seed == 4: open("absent/file")
    if c.seed == 5: raise config.Stopped("stopped after step 9, which is saved", 0)
    if c.seed == 6: raise RuntimeError("a defect")
    if c.seed == 7: return 4
    print(c.seed, c.optimizer.learning_rate, flags.FLAGS.count, flags.FLAGS.workdir)

if __name__ == "__main__":
    config.run_main(main, defaults=defaults)
'''


FILES = '''"""A program that takes files."""
from absl import flags
from marc_jax import config

flags.DEFINE_integer("count", 3, "How many.")
config.run_main(lambda files: print(files, flags.FLAGS.count), arguments=True)
'''


def test_files_and_flags_may_come_in_any_order(tmp_path):
    (tmp_path / "files.py").write_text(FILES)
    command = [sys.executable, str(tmp_path / "files.py"), "a.mp4", "--count", "7", "b", "--", "--c.mp4"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['a.mp4', 'b', '--c.mp4'] 7\n"), done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)

    def run(*args):
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        command = [sys.executable, str(path), *args]
        return subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)

    return run


def test_flags_and_overrides_reach_the_program(program):
    done = program("--config.optimizer.learning_rate=0.5", "--count=7", "--config.seed", "9", "--workdir", "w")
    assert (done.returncode, done.stdout.split()) == (0, ["9", "0.5", "7", "w"])
    assert program("--config.seed=7").returncode == 4


@pytest.mark.parametrize(
    "argument, code, message",
    [
        ("--config.sed=1", 2, "error: unknown key config.sed; did you mean config.seed?"),
        ("--config.seed=x", 2, "error: config.seed is of type int, cannot take 'x'"),
        ("--config=absent.py", 2, "error: config file absent.py does not exist"),
        ("--coun=1", 2, "error: Unknown command line flag 'coun'. Did you mean: count ?"),
        ("--count=x", 2, "error: flag --count=x: invalid literal"),
        ("seed=1", 2, "error: unexpected argument 'seed=1'"),
        ("--config.seed=2", 1, "error: no space left on the disk while writing runs/x/file. Checkpoints already saved"),
        ("--config.seed=3", 2, "error: clip.mp4: no video stream"),
        ("--config.seed=4", 2, "error: absent/file: No such file or directory"),
    ],
)
def test_what_the_user_can_mend_is_one_line_on_stderr(program, argument, code, message):
    done = program(argument)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("seed, code, first", [(1, 130, "interrupted"), (5, 0, "stopped after step 9")])
def test_an_interrupted_run_says_how_to_resume(program, seed, code, first):
    done = program(f"--config.seed={seed}", "--count=2")
    assert done.returncode == code and done.stderr.strip().startswith(first)
    assert f"program.py --config.seed={seed} --count=2" in done.stderr and "Traceback" not in done.stderr


def test_a_defect_keeps_its_traceback(program):
    done = program("--config.seed=6")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a defect" in done.stderr


def test_help_is_quick_and_lists_flags_and_keys(program):
    began = time.monotonic()
    done = program("--help")
    assert time.monotonic() - began < 2.5
    assert done.returncode == 0 and done.stderr == ""
    for text in ("A small program.", "--count: How many. (default: 3)", "--config.optimizer.learning_rate=0.001"):
        assert text in done.stdout
