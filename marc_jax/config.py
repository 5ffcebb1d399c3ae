"""One config system: a Python file with `get_config()`, overrides on the command line, one clear line when wrong.

    from marc_jax import config

    config.define_flags()                      # --config=FILE.py --config.a.b=value --workdir=DIR

    def main():
        cfg = config.from_flags(defaults())    # locked ConfigDict
        ...

    if __name__ == "__main__":
        config.run_main(main)

Nothing here imports jax: `--help` and a mistyped key answer before anything heavy is loaded.
"""

import ast
import copy
import difflib
import errno
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from absl import flags
from ml_collections import config_dict, config_flags

_OUTSIDE = (errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST)
_overrides: list[str] = []


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback. `exit_code` is the process's."""

    exit_code = 2


class Stopped(Exception):
    """The run ended early because it was asked to, with its work saved; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int = 0):
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""


def define_flags(*, config: str | None = None, workdir: str | None = None) -> None:
    """Defines --config and --workdir (absl flags) with the given defaults; call at import time of an entry module."""
    flags.DEFINE_string("config", config, "Config file: Python with get_config(). Override with --config.KEY=VALUE.")
    flags.DEFINE_string("workdir", workdir, "Directory of the run: checkpoints, metrics, report.")


def overrides() -> list[str]:
    """The --config.KEY=VALUE arguments of this process, in order."""
    return list(_overrides)


def from_flags(defaults: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """The run's config: `defaults`, then the file of --config, then the --config.KEY=VALUE overrides; locked."""
    return load(defaults, flags.FLAGS.config, _overrides)


def load(
    defaults: config_dict.ConfigDict, path: str | None = None, overrides: Iterable[str] = ()
) -> config_dict.ConfigDict:
    """Merges `defaults`, a config file and overrides into one locked config.

    Args:
      defaults: every key that exists, with a value of its type; not modified.
      path: Python file whose `get_config()` returns a ConfigDict or dict with some of these keys; "FILE.py:ARG" calls
        `get_config("ARG")`.
      overrides: "--config.optimizer.learning_rate=3e-4" and the like, later ones win.

    Raises:
      ConfigError: file missing or broken, unknown key, wrong type; the message names the file or the key.
    """
    config = copy.deepcopy(defaults).unlock()
    if path:
        merge(config, read_file(path), path)
    _override(config, list(overrides))
    return config.lock()


def read_file(path: str) -> config_dict.ConfigDict:
    """Runs a config file. Raises ConfigError with the file, line and reason."""
    name, *argument = path.split(":", 1) if ".py:" in path else [path]
    try:
        source = pathlib.Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {name} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {name} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    module = {"__name__": "config", "__file__": name}
    try:
        exec(compile(source, name, "exec"), module)
        if "get_config" not in module:
            raise ConfigError(f"config file {name} has no function get_config()")
        config = module["get_config"](*argument)
    except ConfigError:
        raise
    except SyntaxError as e:
        raise ConfigError(f"config file {name}, line {e.lineno}: {e.msg}") from None
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == name]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"config file {name}{where}: {type(e).__name__}: {_one_line(e)}") from None
    if not isinstance(config, config_dict.ConfigDict | dict):
        raise ConfigError(f"config file {name}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return config_dict.ConfigDict(config)


def merge(config: config_dict.ConfigDict, other: config_dict.ConfigDict, source: str, prefix: str = "") -> None:
    """Writes `other`'s values into `config`, key by key. Raises ConfigError naming `source` and the key."""
    for key in other:
        value, path = other[key], prefix + key
        if key not in config:
            raise ConfigError(f"{source}: {_unknown(path, config, prefix)}")
        old = config[key]
        if isinstance(old, config_dict.ConfigDict):
            if not isinstance(value, config_dict.ConfigDict):
                raise ConfigError(f"{source}: config.{path} is a group of keys, got {value!r}")
            merge(old, value, source, f"{path}.")
        else:
            _set(config, key, value, f"{source}: config.{path}")


def flat(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"optimizer.learning_rate": 3e-4, ...}, in order."""
    values = {}
    for key in config:
        if isinstance(config[key], config_dict.ConfigDict):
            values.update(flat(config[key], f"{prefix}{key}."))
        else:
            values[prefix + key] = config[key]
    return values


def to_json(config: config_dict.ConfigDict) -> str:
    """The whole config as indented JSON with sorted keys; equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=str) + "\n"


def check(config: config_dict.ConfigDict, rules: Iterable[tuple[Callable, str]]) -> None:
    """Raises one ConfigError that lists every rule `config` breaks.

    Args:
      config: the whole config.
      rules: (predicate, message); predicate(config) is true where all is well. "{a.b}" in a message is replaced by
        the value of that key.
    """
    broken = [_fill(message, config) for predicate, message in rules if not predicate(config)]
    if broken:
        raise ConfigError("; ".join(broken))


def run_main(
    main: Callable[..., object],
    *,
    defaults: Callable[[], config_dict.ConfigDict] | None = None,
    argv: Sequence[str] | None = None,
    arguments: bool = False,
) -> None:
    """Parses the flags, calls `main()` and ends the process. `defaults`: for --help, which then lists every key.

    `arguments`: what is no flag goes to `main` as a list; otherwise it is an error.

    Exit codes: 0; what `main` returns where it is an int; 2 for anything the user can mend (bad flag, key, value,
    file, video: one line "error: ..." and no traceback); 1 for a full disk; 130 after Ctrl-C. Anything else is a
    defect of the program and keeps its traceback.
    """
    try:
        code = _call(main, defaults, list(sys.argv if argv is None else argv), arguments)
    except Stopped as e:
        print(f"{e}. To resume, run the same command again:\n  {_command()}", file=sys.stderr)
        code = e.exit_code
    except Exception as e:
        known = _known_error(e)
        if known is None:
            raise
        message, code = known
        print(f"error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted. Checkpoints already saved are complete; to resume, run the same command again:",
              f"  {_command()}", sep="\n", file=sys.stderr)  # fmt: skip
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _call(main: Callable[..., object], defaults: Callable | None, argv: list[str], arguments: bool) -> int:
    rest, _overrides[:] = split_argv(argv)
    if {"--help", "-h", "-help"} & set(rest[1:]):
        print(_help(defaults))
        return 0
    flags.FLAGS.set_gnu_getopt(arguments)  # flags may follow files
    try:
        positional = flags.FLAGS(rest)
    except flags.Error as e:
        raise UserError(_one_line(e)) from None
    if len(positional) > 1 and not arguments:
        raise UserError(f"unexpected argument {positional[1]!r}; settings are --config.KEY=VALUE")
    result = main(positional[1:]) if arguments else main()
    return result if isinstance(result, int) else 0


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other arguments, the config overrides as "--config.KEY=VALUE")."""
    rest, overrides, arguments = [], [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith(("--config.", "-config.", "--noconfig.")):
            rest.append(argument)
            continue
        argument = "--" + argument.lstrip("-")
        if argument.startswith("--noconfig."):
            argument = f"--{argument.removeprefix('--no')}=false"
        elif "=" not in argument:
            follows = bool(arguments) and not arguments[0].startswith("--")
            argument = f"{argument}={arguments.pop(0) if follows else 'true'}"
        overrides.append(argument)
    return rest, overrides


def _help(defaults: Callable | None) -> str:
    modules = flags.FLAGS.flags_by_module_dict()
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    for module in (__name__, "__main__", sys.argv[0]):
        for flag in modules.get(module, []):
            default = "" if flag.value is None else f" (default: {flag.value})"
            lines.append(f"  --{flag.name}: {flag.help}{default}")
    if defaults is not None:
        lines += ["", "Keys, with their defaults:"]
        lines += [f"  --config.{path}={value}" for path, value in flat(defaults()).items()]
    return "\n".join(lines)


def _override(config: config_dict.ConfigDict, overrides: list[str]) -> None:
    for override in overrides:
        path, _, text = override.removeprefix("--config.").partition("=")
        node, prefix = config, ""
        *groups, key = path.split(".")
        for group in groups:
            if group not in node or not isinstance(node[group], config_dict.ConfigDict):
                raise ConfigError(_unknown(path, config, ""))
            node, prefix = node[group], f"{prefix}{group}."
        if key not in node:
            raise ConfigError(_unknown(path, config, ""))
        if isinstance(node[key], config_dict.ConfigDict):
            raise ConfigError(f"config.{path} is a group of keys: {', '.join(node[key])}")
        _set(node, key, _parse(node, key, text, path), f"config.{path}")


def _parse(node: config_dict.ConfigDict, key: str, text: str, path: str) -> object:
    """The text of an override as a value of the key's type, by the parsers of ml_collections' config flags."""
    kind = node.get_type(key)
    if text.lower() == "none" and node[key] is None:
        return None
    if kind in (tuple, list):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = [part.strip() for part in text.split(",") if part.strip()]
        return kind(value) if isinstance(value, tuple | list) else kind([value])
    if kind in (type(None), object):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    values = flags.FlagValues()
    holder = config_dict.ConfigDict({key: kind() if node[key] is None else node[key]})
    try:
        config_flags.DEFINE_config_dict("config", holder, flag_values=values, sys_argv=["", f"--config.{key}={text}"])
        values(["", f"--config.{key}={text}"])
    except (flags.Error, TypeError, ValueError):
        raise ConfigError(f"config.{path} is of type {kind.__name__}, cannot take {text!r}") from None
    return values.config[key]


def _set(node: config_dict.ConfigDict, key: str, value: object, where: str) -> None:
    kind, old = node.get_type(key), node[key]
    error = ConfigError(f"{where} is of type {kind.__name__}, cannot take {value!r}")
    if (value is None and old is not None) or (isinstance(value, bool) and kind in (int, float)):
        raise error
    try:
        node[key] = kind(value) if kind in (tuple, list) and isinstance(value, tuple | list) else value
    except (TypeError, ValueError):
        raise error from None


def _unknown(path: str, config: config_dict.ConfigDict, prefix: str) -> str:
    known = list(flat(config, prefix))
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    # A right name in the wrong group is the commonest mistake after a mistyped one.
    close = [name for name in known if name.split(".")[-1] == path.split(".")[-1]][:1] or close
    return f"unknown key config.{path}" + (f"; did you mean config.{close[0]}?" if close else "")


def _fill(message: str, config: config_dict.ConfigDict) -> str:
    for path, value in flat(config).items():
        message = message.replace("{" + path + "}", str(value))
    return message


def _known_error(error: Exception) -> tuple[str, int] | None:
    """(line, exit code) of an error that is the user's to mend; None for a defect of the program."""
    if isinstance(error, UserError) or isinstance(getattr(error, "exit_code", None), int):
        return _one_line(error), error.exit_code
    video = sys.modules.get("data_pipelines.video")
    if video is not None and isinstance(error, video.VideoError):
        return _one_line(error), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"no space left on the disk{where}. Checkpoints already saved are complete; free some space and resume "
            f"with the same command: {_command()}",
            1,
        )
    outside = isinstance(error, OSError) and error.errno in _OUTSIDE
    if (outside or isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError)) and error.filename:
        # A path the user gave; a file of the program itself that is missing is a defect and keeps its traceback.
        if pathlib.Path(__file__).parent not in pathlib.Path(os.path.abspath(error.filename)).parents:
            return f"{error.filename}: {error.strerror}", 2
    return None


def _command() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return " ".join(program + sys.argv[1:])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
