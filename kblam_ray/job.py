"""How every job runs: one pydantic model is its flags and its YAML, one JSON line is its result.

A job module declares a subclass of `JobConfig` and a function that takes it and returns the summary, and
ends with `main(name, Config, function)`. Flags are the fields in kebab-case, `--config FILE.yaml` gives
the same fields, and flags win. A field that is a model itself is a mapping in YAML and a flag per field on the command
line, with its own name before theirs (`mix: {kb_per: batch}` is `--mix-kb-per batch`); a field that is a mapping takes
`--name KEY=VALUE`. The last line on stdout is a JSON object: `job`, `ok`, `seconds` and what the job did, or
`error: {code, message}`; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from kblam_ray.errors import InputError, KblamError, MissingDependencyError


class JobConfig(BaseModel):
    """Base of every job's settings: a name that is not a setting is an error."""

    model_config = ConfigDict(extra="forbid")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message, where="command line", help=f"see `{self.prog} --help`")


def main(name: str, config_type: type[JobConfig], run: Callable[[Any], dict[str, Any]]) -> NoReturn:
    """Parse, run, print the summary line and exit: 0 done, 2 wrong input, 1 anything else."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _terminate)
    # The line is JSON in UTF-8 whatever the terminal's locale is.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    summary: dict[str, Any] = {}
    outcome: dict[str, Any] = {"ok": True}
    exit_code = 0
    try:
        summary = run(parse(name, config_type, sys.argv[1:]))
    except KblamError as error:
        exit_code = error.exit_code
        outcome = {"ok": False, "error": {"code": error.code, "message": str(error)}}
    except KeyboardInterrupt as error:
        exit_code = 143 if isinstance(error, _Terminated) else 130
        outcome = {"ok": False, "error": {"code": "interrupted", "message": "stopped before it was done"}}
    except Exception as error:  # noqa: BLE001 - the summary line must come, whatever happened
        traceback.print_exc()
        exit_code = 1
        outcome = {"ok": False, "error": {"code": "internal", "message": f"{type(error).__name__}: {error}"}}
    if not outcome["ok"]:
        print(f"{name}: {outcome['error']['message']}", file=sys.stderr)
    _shut_ray_down()
    seconds = round(time.monotonic() - started, 3)
    sys.stderr.flush()
    print(json.dumps({"job": name, **outcome, "seconds": seconds, **summary}, ensure_ascii=False), flush=True)
    sys.exit(exit_code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which a scheduler asks a job to stop: leave through `finally` blocks as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


@contextmanager
def packages_of(extra: str, doing: str) -> Iterator[None]:
    """Around a job's late imports: a package that is not installed is named with the extra that brings it.

    Args:
        extra: of this package, such as `train`.
        doing: what needs it: `training needs`.

    Raises:
        MissingDependencyError: a package of others is not installed; a missing module of ours stays what it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "kblam_ray").partition(".")[0] == "kblam_ray":
            raise
        raise MissingDependencyError(
            f"{doing} the package {error.name}", help=f'pip install "kblam-ray[{extra}]"'
        ) from None


def parse(name: str, config_type: type[JobConfig], arguments: list[str]) -> JobConfig:
    """The settings from flags and `--config`; flags win.

    Raises:
        InputError: an unknown flag, a wrong value, a missing one, or an unreadable YAML file.
    """
    parser = _Parser(
        prog=f"jobs/{name}.py",
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the same settings as YAML; flags win over it")
    own = config_type.__annotations__
    for field, info in sorted(config_type.model_fields.items(), key=lambda item: item[0] not in own):
        if (part := _part_of(info)) is None:
            _add_flag(parser, field, info)
            continue
        for inner, inner_info in part.model_fields.items():
            _add_flag(parser, f"{field}.{inner}", inner_info)
    flags = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    path = flags.pop("config", None)
    settings = _with_flags(config_type, _read_yaml(path) if path else {}, flags)
    try:
        return config_type.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        steps = [str(step).replace("_", "-") for step in first["loc"] if isinstance(step, str)]
        # Deeper than the flag itself are the members of lists, mappings and unions.
        depth = 2 if steps and _is_part(config_type, steps[0]) else 1
        flag = "--" + "-".join(steps[:depth]) if steps else "the settings"
        raise InputError(
            f"{flag}: {first['msg']}", where=path or "command line", help=f"see `jobs/{name}.py --help`"
        ) from None


def _part_of(info: FieldInfo) -> type[BaseModel] | None:
    """The model that a field is, where it is one."""
    kind = _without_none(info.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _is_part(config_type: type[JobConfig], flag: str) -> bool:
    info = config_type.model_fields.get(flag.replace("-", "_"))
    return info is not None and _part_of(info) is not None


def _with_flags(config_type: type[JobConfig], settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file with those of the command line in their places."""
    settings = {
        name: _snake_case(value) if isinstance(value, dict) and _is_part(config_type, name) else value
        for name, value in settings.items()
    }
    for name, value in flags.items():
        field, _, inner = name.partition(".")
        if not inner:
            settings[field] = value
            continue
        part = settings.get(field) or {}
        if isinstance(part, dict):  # else the file is wrong, and validation says so
            settings[field] = {**part, inner: value}
    return settings


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


class _Pairs(argparse.Action):
    """Collects `KEY=VALUE` arguments into a mapping."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None) -> None:
        key, equals, text = str(value).partition("=")
        if not equals or not key:
            parser.error(f"{option}: {value!r} is not KEY=VALUE")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), key: text})


def _add_flag(parser: argparse.ArgumentParser, field: str, info: FieldInfo) -> None:
    flag = "--" + field.replace("_", "-").replace(".", "-")
    metavar = field.rpartition(".")[2].upper()
    kind = _without_none(info.annotation)
    note = info.description or ""
    default = info.get_default(call_default_factory=True, validated_data={})
    if info.is_required():
        note += " (required)"
    elif default not in (None, []):
        note += f" (default: {default})"
    note = note.replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, dest=field, action=argparse.BooleanOptionalAction, default=None, help=note)
    elif typing.get_origin(kind) is dict:
        parser.add_argument(flag, dest=field, action=_Pairs, metavar="KEY=VALUE", help=f"{note} (repeatable)")
    elif typing.get_origin(kind) is list or (typing.get_origin(kind) is tuple and ... in typing.get_args(kind)):
        parser.add_argument(flag, dest=field, action="append", metavar=metavar, help=f"{note} (repeatable)")
    elif typing.get_origin(kind) is tuple:
        count = len(typing.get_args(kind))
        parser.add_argument(flag, dest=field, nargs=count, metavar=metavar, help=note)
    else:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        metavar = "|".join(map(str, choices)) if choices else metavar
        parser.add_argument(flag, dest=field, metavar=metavar, help=note)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the configuration: {error}", where=path, help="give a YAML file") from None
    if not isinstance(settings, dict):
        raise InputError("the configuration is not a mapping", where=path, help="write `name: value` lines")
    return _snake_case(settings)


def _snake_case(settings: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def _shut_ray_down() -> None:
    """Disconnect from Ray if the job used it, so that no worker's log follows the summary line."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
