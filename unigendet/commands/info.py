"""``unigendet info``: versions, devices, and which implementations of each op this build has."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from unigendet import __version__
from unigendet.commands.common import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    info = commands.add("info", run, "Show versions, devices, and which implementations of each op this build has.")
    info.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    facts = gather_info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, values in facts.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:<24}{', '.join(value) if isinstance(value, list) else value}")
    return 0


def gather_info() -> dict[str, dict[str, str | list[str]]]:
    """Versions, devices, implementations of each op, and installed extras, as ``info`` shows them."""
    import platform

    import torch

    from unigendet.ops.backends import available, extension_facts

    versions = {"unigendet": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _installed(name) for name in ("triton", "numpy")}
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    return {
        "versions": versions,
        "devices": devices,
        "ops (backends built)": available(),
        "compiled extension": _extension(extension_facts()),
        **_extras(),
    }


def _installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _extras() -> dict[str, dict[str, str]]:
    """The packages of each extra that a user may want, as the installed ``unigendet`` declares them."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("unigendet") or []
    except PackageNotFoundError:  # its folder is on the path, and nothing says what it needs
        return {"extras": {"unigendet": "not installed, so what its extras hold is not known"}}
    extras: dict[str, dict[str, str]] = {}
    for requirement in requirements:  # 'jsonargparse[signatures]>=4.49; extra == "train"'
        found = re.match(r"""([\w.-]+)[^;]*;.*\bextra *== *["']([\w.-]+)["']""", requirement)
        if found is not None and found[2] != "dev":
            extras.setdefault(f"extra '{found[2]}'", {})[found[1]] = _installed(found[1])
    return extras


def _extension(facts: dict[str, Any]) -> dict[str, str | list[str]]:
    if "problem" in facts:
        return {"unigendet._C": facts["problem"]}
    cuda = [*facts["cuda_archs"], f"by {facts['nvcc']}"] if facts["cuda_archs"] else "not built"
    in_use, *_ = facts["usable_isa_levels"]
    return {
        "unigendet._C": f"built by {facts['compiler']}",
        "instruction set in use": f"{in_use} (of {', '.join(facts['isa_levels'])})",
        "cuda": cuda,
    }
