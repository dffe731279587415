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
        overrides: ``name=value`` with dots for nested fields and values in YAML, say ``optimizer.lr=1e-4``; they win
            over the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown, of a wrong type or out of range; the message names it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise ValueError(f"overrides has {malformed}; each must be name=value")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--file", action="config")
    parser.add_class_arguments(cls)
    arguments = [] if path is None else [f"--file={path}"]
    arguments += ["--" + item.removeprefix("--") for item in overrides]
    try:
        return cls(**_fields(parser.instantiate(parser.parse_args(arguments))))
    except (ArgumentError, TypeError) as error:  # TypeError: a number where a group of settings belongs
        raise ValueError(f"settings{'' if path is None else f' of {path}'}: {error}") from error


def _fields(namespace: object) -> dict[str, object]:
    return {name: value for name, value in vars(namespace).items() if name != "file"}
