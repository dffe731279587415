"""Settings from YAML files and the command line: any of the settings dataclasses.

The names are checked here, before jsonargparse checks and converts the values: its messages would speak of parser
keys, and it imports what a value names as a class.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

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
        ValueError: the file is no YAML file of settings, or a setting is unknown, of a wrong type or out of range; the
            message names it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    where = "settings" if path is None else f"settings of {path}"
    if path is not None:
        _check_names(cls, _read(Path(path)), "", f"{where}: ")
    options = _options(overrides)
    for name, value in options:
        _check_names(cls, {name: value}, "", f"{where}: ")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--file", action="config")
    parser.add_class_arguments(cls)
    arguments = [] if path is None else [f"--file={path}"]
    arguments += [f"--{name}={value}" for name, value in options]
    try:
        values = parser.parse_args(arguments)
        del values["file"]
        return _build(cls, values, "")
    except (ArgumentError, TypeError) as error:  # TypeError: a value that an unparsed group of settings cannot be
        raise ValueError(f"{where}: {_plain(str(error))}") from error


def _options(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Every override as its name and its value."""
    options = []
    items = iter(overrides)
    for item in items:
        if item.startswith("--") and "=" not in item:
            item = f"{item}={next(items, '--')}"
        name, equals, value = item.partition("=")
        if not equals or value.startswith("--"):
            raise ValueError(f"overrides has {item.removesuffix('=--')!r} without a value; it must be name=value")
        options.append((name.removeprefix("--"), value))
    return options


def _build(kind: Any, value: Any, name: str) -> Any:
    """The instance of ``kind`` that setting ``name`` has, of parsed values; errors name the settings as users do."""
    kind = _alternatives(kind)[0]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if value is None:
        return None
    if origin is tuple and dataclasses.is_dataclass(inner[0]):
        return tuple(_build(inner[0], one, f"{name}[{i}]") for i, one in enumerate(value))
    if origin is dict and dataclasses.is_dataclass(inner[1]):
        return {key: _build(inner[1], one, f"{name}.{key}") for key, one in value.items()}
    if not dataclasses.is_dataclass(kind) or isinstance(value, kind):
        return value
    types = typing.get_type_hints(kind)
    given = value if isinstance(value, dict) else vars(value)
    fields = {key: _build(types[key], one, f"{name}.{key}" if name else key) for key, one in given.items()}
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(_named(str(error), name, set(types))) from error


def _named(message: str, name: str, fields: set[str]) -> str:
    """What settings class ``name`` with these fields says of one of them, which it may call by a name of its own."""
    first, _, _ = message.partition(" ")
    own = first.rpartition(".")[2]
    if not name or first == name or first.startswith(f"{name}."):
        return message
    if first.partition(".")[0] in fields:
        return f"{name}.{message}"
    return f"{name}.{own}{message[len(first) :]}" if own in fields else f"{name}: {message}"


def _alternatives(kind: Any) -> list[Any]:
    """The types that a setting may have: what is not None, and ``NoneType`` behind it if it may be None."""
    kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    return sorted(kinds, key=lambda one: one is type(None))


def _read(file: Path) -> dict[str, Any]:
    """A file's settings, their values as YAML has them."""
    if file.is_dir():
        raise FileNotFoundError(f"settings file {file} is a folder; it must be a YAML file")
    if not file.is_file():
        raise FileNotFoundError(f"settings file {file} does not exist")
    import yaml

    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _loader())
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ValueError(f"settings of {file}: it is no text file; it must be a YAML file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"settings of {file}{line}: no YAML: {error.problem or error.context}") from error
    if not isinstance(values, dict):
        have = "nothing" if values is None else f"{str(values)[:40]!r}"
        raise ValueError(f"settings of {file}: it holds {have}; it must hold settings, each as 'name: value'")
    return values


def _loader() -> type:
    """A YAML loader to which a name that stands twice in a mapping is an error, not the last one's value."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep)

    return Loader


def _check_names(kind: Any, value: Any, name: str, where: str) -> None:
    """Raise ValueError for a name that is no setting's, anywhere in ``value``, and for one value instead of a group.

    ``kind``: the type that setting ``name`` has.
    """
    alternatives = _alternatives(kind)
    if value is None and type(None) in alternatives:
        return
    kind = alternatives[0]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        known = typing.get_type_hints(kind)
        if isinstance(value, str):
            value = _yaml(value)
        if not isinstance(value, dict):
            raise ValueError(f"{where}{name} is {value!r}; it must be a group of settings: {', '.join(known)}")
        for key, one in value.items():
            first, _, rest = str(key).partition(".")
            full = f"{name}.{first}" if name else first
            if first not in known:
                raise ValueError(f"{where}there is no setting {full!r}; {_remedy(first, full, name, list(known))}")
            _check_names(known[first], {rest: one} if rest else one, full, where)
    elif origin is tuple and dataclasses.is_dataclass(inner[0]):
        value = _yaml(value) if isinstance(value, str) else value
        if not isinstance(value, list):
            raise ValueError(f"{where}{name} is {value!r}; it must be a list, say [{_form(inner[0])}]")
        for i, one in enumerate(value):
            _check_names(inner[0], one, f"{name}[{i}]", where)
    elif origin is dict and dataclasses.is_dataclass(inner[1]):
        value = _yaml(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError(f"{where}{name} is {value!r}; it must be named groups, say {{NAME: {_form(inner[1])}}}")
        for key, one in value.items():
            first, _, rest = str(key).partition(".")
            _check_names(inner[1], {rest: one} if rest else one, f"{name}.{first}", where)


def _form(kind: Any) -> str:
    """How a group of settings is written."""
    return "{" + ", ".join(f"{field}: …" for field in typing.get_type_hints(kind)) + "}"


def _remedy(first: str, full: str, group: str, known: list[str]) -> str:
    """What to write instead of a name that does not exist."""
    near = difflib.get_close_matches(first, known, 1)
    if near:
        return f"is it {full.removesuffix(first) + near[0]!r} that is meant?"
    return f"{group or 'the settings'} {'has' if group else 'are'} {', '.join(known)}"


def _yaml(text: str) -> Any:
    """The value of an override; the text itself if it is no YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _plain(message: str) -> str:
    """jsonargparse's message in one line of this package's words, as far as it is about one setting's type."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(message.split()))
    found = re.fullmatch(r'Parser key "([^"]+)": Expected an? (.+?)\. Got value: (.*)', message)
    if found is None:
        return message
    name, kind, value = found.groups()
    choices = re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", kind)
    need = f"one of {choices[1]}" if choices else f"of type {kind}"
    return f"{name} is {value if value == 'None' else repr(value)}; it must be {need}"
