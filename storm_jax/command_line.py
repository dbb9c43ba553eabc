"""Command lines with absl flags: mistakes of the user are one line, not a traceback.

`--config=FILE.py:ARGUMENT` and its overrides `--config.FIELD=VALUE` are checked before absl and
ml_collections parse them, since these report a wrong field as a Python error.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from storm_jax.config import STREAM_POLICIES, ConfigError, StreamSettings

flags.disclaim_key_flags()  # flags defined here are those of the script, and in its --help
COMPRESSION = {
    "num_frames": "Frames sampled from a video",
    "temporal_pool": "Number of frames whose tokens are averaged",
    "spatial_pool": "Edge of the token cells that are averaged",
    "temporal_sample": "Keep every n-th group of frames",
}
PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")
_CACHE_BYTES = 2**32  # the programs that were used last are kept


def define_compression_flags(default: str) -> None:
    """Defines a flag for each of `COMPRESSION`; `default` describes what holds without it."""
    for name, meaning in COMPRESSION.items():
        flags.DEFINE_integer(name, None, f"{meaning}; defaults to {default}.", lower_bound=1)


def compression_flags() -> dict[str, int]:
    """The values, by name, of those that are set."""
    values = {name: flags.FLAGS[name].value for name in COMPRESSION}
    return {name: value for name, value in values.items() if value is not None}


def define_stream_flags(of: str) -> None:
    """Defines how a video is watched as it arrives; `of` names what is watched."""
    default = StreamSettings()
    flags.DEFINE_float(
        "fps", default.fps, f"Frames per second of {of} to use; 0 uses all.", lower_bound=0
    )
    flags.DEFINE_integer(
        "budget_tokens",
        default.budget_tokens,
        f"Visual tokens of {of} in a prompt at most.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "policy",
        default.policy,
        STREAM_POLICIES,
        f"What makes room when the budget of {of} is used up: keep the newest groups of frames, drop every second old "
        "one, or average neighbours of the old ones.",
    )
    flags.DEFINE_integer(
        "recent", default.recent, "Newest groups that stride and merge leave alone.", lower_bound=0
    )


def stream_flags() -> StreamSettings | None:
    """The values of the flags; None if none is set."""
    found: dict[str, Any] = {
        field.name: flags.FLAGS[field.name] for field in dataclasses.fields(StreamSettings)
    }
    if not any(flag.present for flag in found.values()):
        return None
    return StreamSettings(**{name: flag.value for name, flag in found.items()})


def define_weights_flag() -> flags.FlagHolder:
    """Defines how the weights are stored on the devices."""
    return flags.DEFINE_enum(
        "weights",
        "",
        ["", "int8"],
        "int8 stores most kernels in half the memory; as trained by default.",
    )


def define_process_flags() -> None:
    """Defines how several processes find each other where JAX does not detect it."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; a free port.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)


def process_flags() -> dict[str, Any]:
    """The values, by name, as `storm_jax.distributed.processes` takes them.

    Raises:
      app.UsageError: if only some are set, or do not fit together.
    """
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in PROCESS_FLAGS}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if 0 < len(missing) < len(values):
        raise app.UsageError(f"{' and '.join(missing)} must be set too")
    if not missing and values["process_id"] >= values["num_processes"]:
        raise app.UsageError("--process_id must be less than --num_processes")
    if not missing and not values["coordinator_address"].rpartition(":")[2].isdigit():
        raise app.UsageError("--coordinator_address must be HOST:PORT")
    return values


def run(main: Callable[[Sequence[str]], Any], expected: tuple[type[Exception], ...] = ()) -> None:
    """Parses the flags and calls `main` with the remaining arguments, then exits.

    Flag errors, `ConfigError`, `OSError` and the `expected` exceptions end the program with one line
    and status 1. Every other exception keeps its traceback. Only warnings are logged.
    """
    app.run(_reporting(main, (ConfigError, OSError, *expected)), flags_parser=_parse)


def _reporting(
    main: Callable[[Sequence[str]], Any], expected: tuple[type[Exception], ...]
) -> Callable[[Sequence[str]], Any]:
    def report(argv: Sequence[str]) -> Any:
        logging.set_verbosity(logging.WARNING)
        keep_compiled_programs()
        try:
            return main(argv)
        except app.UsageError as error:  # absl would print the whole help first
            return sys.exit(f"{_program()}: {error} (--help lists the flags)")
        except expected as error:
            return sys.exit(f"{_program()}: {error}")
        except KeyboardInterrupt:
            return sys.exit(f"{_program()}: stopped")

    return report


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where or
    JAX_ENABLE_COMPILATION_CACHE=0 disables it."""
    jax = sys.modules.get("jax")
    if jax is None or jax.config.jax_compilation_cache_dir:
        return
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "storm_jax/programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def _program() -> str:
    """The program's name as typed: train.py, or storm_jax.data for `python -m storm_jax.data`."""
    path = pathlib.Path(sys.argv[0])
    return f"storm_jax.{path.parent.name}" if path.name == "__main__.py" else path.name


def _parse(argv: list[str]) -> list[str]:
    """absl's `flags_parser`, with readable errors for the configuration and its overrides."""
    try:
        if "config" in flags.FLAGS:
            check_config_arguments(argv[1:])
        return flags.FLAGS(argv)
    except (flags.Error, ConfigError) as error:
        sys.exit(f"{_program()}: {error} (--help lists the flags, storm_jax/config.py the fields)")


def check_config_arguments(arguments: Sequence[str]) -> None:
    """Checks that `--config` loads and that every `--config.FIELD` exists in it.

    Raises:
      ConfigError: naming the argument, what is wrong and the fields there are. Errors inside the
        configuration file itself are raised as they are.
    """
    spec = _last_value(arguments, "config")
    if spec is None:
        return
    config = _load(spec)
    for argument in arguments:
        if argument.startswith("--config."):
            _check_override(argument.removeprefix("--config.").partition("=")[0], config)


def _last_value(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of `--flag=VALUE` or `--flag VALUE`, None without the flag."""
    found = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"--{flag}="):
            found = argument.partition("=")[2]
        elif argument == f"--{flag}" and position + 1 < len(arguments):
            found = arguments[position + 1]
    return found


def _load(spec: str) -> ConfigDict:
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        folder = path.parent
        others = sorted(folder.glob("*.py")) if folder.is_dir() else []
        close = difflib.get_close_matches(str(path), map(str, others), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--config={spec}: {name} does not exist{hint}")
    sys.path.insert(0, str(pathlib.Path.cwd()))  # as ml_collections: a file imports its neighbours
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    finally:
        sys.path.pop(0)
    if get_config is None:
        raise ConfigError(f"--config={spec}: {name} has no function get_config")
    try:
        return get_config(argument) if argument else get_config()
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from error


def _check_override(path: str, config: ConfigDict) -> None:
    try:
        keys: Iterable[str | int] = config_path.split(path)
    except (ValueError, TypeError):
        raise ConfigError(
            f"--config.{path} is not a field path; write list items as data.train[0].path"
        ) from None
    node: Any = config
    walked = "config"
    for key in keys:
        if isinstance(node, (list, tuple)):
            if not isinstance(key, int) or not -len(node) <= key < len(node):
                count = f"{len(node)} item{'s' * (len(node) != 1)}"
                raise ConfigError(
                    f"--config.{path}: {walked} has {count}, so [{key}] is out of range"
                )
        elif not isinstance(node, (ConfigDict, dict)) or key not in node:
            raise ConfigError(f"--config.{path}: {_unknown(walked, key, node)}")
        node = node[key]
        walked += f"[{key}]" if isinstance(key, int) else f".{key}"


def _unknown(walked: str, key: str | int, node: Any) -> str:
    if not isinstance(node, (ConfigDict, dict)):
        return f"{walked} is a value, it has no fields"
    close = difflib.get_close_matches(str(key), node.keys(), n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"{walked} has no field {key!r}{hint} Fields: {', '.join(node.keys())}"
