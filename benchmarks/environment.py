"""What a result was measured on: device, versions, commit, and a hash of the kernels' sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unigendet.device import device_name
from unigendet.environment import driver_version, output_of

# The root of a checkout; in an installed package, the package's folder: ``kernels`` lies in both.
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "flash_attn", "flash_attn_3", "flash-attn-4", "liger-kernel", "quack-kernels",
            "magi_attention", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
KERNEL_SUFFIXES = (".py", ".json", ".h", ".cuh", ".cu", ".cpp")


def is_checkout() -> bool:
    """Whether these benchmarks lie in a checkout of the project, where results are recorded and documents written."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "unigendet").is_dir()


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, git commit ("+changes" if tracked files differ) and a hash of the kernel sources."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"name": device_name(device), "processor": _processor()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["cuda"] = torch.version.cuda
        hardware |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory // 2**20,
            "driver": driver_version(),
        }
    return {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": hardware,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": found,
        "commit": _commit() if is_checkout() else None,
        "kernels_sha256": kernels_hash(),
    }


def _processor() -> str | None:
    """What the CPU calls itself, on Linux."""
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return None


def _commit() -> str | None:
    git = ("git", "-C", str(ROOT))
    commit = output_of(*git, "rev-parse", "HEAD")
    changed = output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return commit + "+changes" if commit and changed else commit


def device_slug(name: str) -> str:
    """A device's name as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def kernels_hash(*folders: Path) -> str:
    """sha256 over the names and contents of the kernels' sources and tuned configurations (default: all of them).

    Results of other kernels are stale.
    """
    digest = hashlib.sha256()
    for folder in folders or [f for f in (ROOT / "kernels", ROOT / "csrc") if f.is_dir()]:
        for path in sorted(path for path in folder.iterdir() if path.suffix in KERNEL_SUFFIXES):
            for part in (path.name.encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def short_commit(environment: Mapping[str, Any]) -> str:
    """The abbreviated commit of a recorded environment, and whether files differed from it."""
    commit, plus, changes = (environment.get("commit") or "unknown").partition("+")
    return commit[:12] + plus + changes


def machine_line(environment: Mapping[str, Any]) -> str:
    """Where a recorded run of the quickstart or of a study ran (``unigendet.environment.environment``):
    "2 CPUs (Linux x86_64, Python 3.11.7, PyTorch 2.13.0, commit 0123456789ab)".
    """
    versions = environment["versions"]
    return (
        f"{environment['cpus']} CPUs ({environment['platform']}, Python {versions['python']}, "
        f"PyTorch {versions['torch']}, commit {short_commit(environment)})"
    )
