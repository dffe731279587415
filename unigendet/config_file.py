"""Settings from YAML files and the command line: any of the settings dataclasses, read with jsonargparse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Settings = TypeVar("Settings")


def load_settings(cls: type[Settings], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """An instance of the dataclass ``cls``.

    Args:
        cls: a settings dataclass, whose fields may be settings dataclasses.
        path: YAML file with some of its fields; the others keep their defaults. None: defaults only.
        overrides: ``name=value``, ``--name=value``, or ``--name`` and ``value``; dots for nested fields, values in
            YAML, say ``optimizer.lr=1e-4``. They win over the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown, of a wrong type or out of range; the message names it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--file", action="config")
    parser.add_class_arguments(cls)
    arguments = [] if path is None else [f"--file={path}"]
    arguments += _options(overrides)
    try:
        return cls(**_fields(parser.instantiate(parser.parse_args(arguments))))
    except (ArgumentError, TypeError) as error:  # TypeError: a number where a group of settings belongs
        raise ValueError(f"settings{'' if path is None else f' of {path}'}: {error}") from error


def _options(overrides: Sequence[str]) -> list[str]:
    """Every override as ``--name=value``."""
    options = []
    items = iter(overrides)
    for item in items:
        if item.startswith("--") and "=" not in item:
            item = f"{item}={next(items, '--')}"
        if "=" not in item or item.partition("=")[2].startswith("--"):
            raise ValueError(f"overrides has {item.removesuffix('=--')!r} without a value; it must be name=value")
        options.append("--" + item.removeprefix("--"))
    return options


def _fields(namespace: object) -> dict[str, object]:
    return {name: value for name, value in vars(namespace).items() if name != "file"}
