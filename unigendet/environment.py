"""What a result was made with and on: versions, platform, the commit of this package, and the GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("unigendet", "torch", "triton", "numpy", "scipy", "scikit-learn", "transformers", "tokenizers")


def environment() -> dict[str, Any]:
    """``{"versions": {package: version}, "platform": str, "cpus": int, "commit": str | None}`` of this process.

    ``cpus``: how many this process may use.
    The commit is that of this package if it lies in its own git repository, else None.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or this one straight from its source tree
    # Not os.cpu_count: a process may be confined to a part of the machine.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {"versions": versions, "platform": system, "cpus": cpus, "commit": _git_commit()}


def _git_commit() -> str | None:
    """Commit hash, with "+changes" if tracked files differ from it; None outside a repository that tracks this file."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        return output_of("git", "-C", str(here.parent), *arguments)

    # A virtual environment may lie inside somebody else's repository: only one that tracks this file counts.
    if git("ls-files", "--error-unmatch", here.name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else commit + ("+changes" if changed else "")


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    printed = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.partition("\n")[0] if printed else None


def output_of(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
