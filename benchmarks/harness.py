"""What every benchmark needs: honest timing, the machine's own ceilings, what it ran on, and one JSON schema.

Timing rotates through several sets of buffers, so that no call finds its inputs in the cache; it warms up, and reports
the median with the 20th and 80th percentile. On CUDA devices events around each call are read after all calls were
queued; elsewhere the monotonic clock is read around each call. A row whose implementation cannot run says why: rows are
never left out, and an interrupted run keeps those it has.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1  # of the JSON; rises when a key changes its meaning or goes
PACKAGES = ("torch", "triton", "numpy", "flash_attn", "flash_attn_3", "liger-kernel",
            "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
TURN = 3  # calls that a competitor makes before the next one's turn
KERNEL_SUFFIXES = (".py", ".json", ".h", ".cuh", ".cu", ".cpp")
COLUMNS = ("trace", "direction", "backend", "ms", "tflops", "of_matmul", "peak_mib", "correct", "status")


class CannotRun(Exception):
    """An implementation is not on this machine, or cannot do what is asked; the message becomes the row's status."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the 20th and 80th percentile of ``runs`` calls."""

    ms: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Of single measurements."""
        ordered = sorted(milliseconds)
        at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def measure(calls: Sequence[Callable[[], Any]], device: torch.device, *, seconds: float = 0.5) -> Timing:
    """Time calls that do the same on different buffers, taking turns, for about ``seconds`` (5 to 200 calls)."""
    for call in calls:  # warm-up
        call()
    begin = time.monotonic()
    for call in calls[:2]:
        call()
        synchronize(device)
    estimate = max((time.monotonic() - begin) / len(calls[:2]), 1e-6)
    runs = min(200, max(5, int(seconds / estimate)))
    turns = [calls[i % len(calls)] for i in range(runs)]
    return Timing.of(_with_events(turns) if device.type == "cuda" else _with_clock(turns))


def measure_paired(
    calls: Mapping[str, Sequence[Callable[[], Any]]], device: torch.device, *, seconds: float = 0.5
) -> dict[str, Timing]:
    """Time what competes in turns, so that whatever else the machine does meets all alike.

    ``calls`` are each competitor's, one for each set of buffers; each runs about ``seconds`` (6 to 200 calls), three
    calls at a turn: the first may meet memory and caches as another competitor left them, the others as it did itself.
    """
    estimates = {}
    for name, own in calls.items():
        for call in own:  # warm-up
            call()
        synchronize(device)
        begin = time.monotonic()
        own[0]()
        synchronize(device)
        estimates[name] = max(time.monotonic() - begin, 1e-6)
    rounds = min(200 // TURN, max(2, int(seconds * len(calls) / sum(estimates.values()) / TURN)))
    turns = [(name, own[i % len(own)]) for r in range(rounds) for name, own in calls.items() for i in _turn(r)]
    each = [call for _, call in turns]
    milliseconds = _with_events(each) if device.type == "cuda" else _with_clock(each)
    of = {name: [] for name in calls}
    for (name, _), time_ in zip(turns, milliseconds, strict=True):
        of[name].append(time_)
    return {name: Timing.of(own) for name, own in of.items()}


def _turn(number: int) -> range:
    """The numbers of the calls of a turn."""
    return range(number * TURN, (number + 1) * TURN)


def _with_events(turns: Sequence[Callable[[], Any]]) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
    torch.cuda._sleep(2_000_000)  # cycles: about 1 ms in which the host gets ahead, so that launches are not timed
    for call, (begin, end) in zip(turns, events, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _with_clock(turns: Sequence[Callable[[], Any]]) -> list[float]:
    milliseconds = []
    for call in turns:
        begin = time.monotonic()
        call()
        milliseconds.append(1e3 * (time.monotonic() - begin))
    return milliseconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_call(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of a call and its seconds, compilation included."""
    synchronize(device)
    begin = time.monotonic()
    result = call()
    synchronize(device)
    return result, time.monotonic() - begin


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call has at its peak beyond what was there before, its results included.

    On a CPU it is the process's resident memory, by Linux's high-water mark; None where that cannot be reset. Less than
    32 MiB may come from what the C library has kept, and not show.
    """
    if device.type != "cuda":
        return _peak_resident_mib(call)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _peak_resident_mib(call: Callable[[], Any]) -> float | None:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_kib("VmRSS")
        call()
        return (_resident_kib("VmHWM") - before) / 2**10
    except OSError:
        return None


def _resident_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def buffer_sets(num_bytes: int, device: torch.device) -> int:
    """How many sets of ``num_bytes`` to take turns with: at least 2, together at least four times the cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(4 * cache / num_bytes))


def ceilings(device: torch.device, *, tiny: bool = False, seconds: float = 0.5) -> dict[str, float]:
    """What the device itself reaches: ``matmul_tflops``, n³ in bfloat16, and ``copy_gbs``, bytes read plus written.

    n is 8192 and the copy 2 GiB; on a CPU 2048 in float32, and 256 MiB; ``tiny``: 128 in float32, and 1 MiB.
    """
    n, dtype, size = (8192, torch.bfloat16, 2**31) if device.type == "cuda" else (2048, torch.float32, 2**28)
    if tiny:
        n, dtype, size = 128, torch.float32, 2**20
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = measure([lambda: a @ b], device, seconds=seconds)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, seconds=seconds)
    return {"matmul_tflops": 2 * n**3 / matmul.ms / 1e9, "copy_gbs": 2 * size / copy.ms / 1e6}


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, git commit ("+changes" if tracked files differ) and a hash of the kernel sources."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"name": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["cuda"] = torch.version.cuda
        hardware |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory // 2**20,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    status = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    changes = "+changes" if _output(*status) else ""
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "device": hardware,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": found,
        "commit": commit and commit + changes,
        "kernels_sha256": kernels_hash(),
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs {platform.machine()}"
    )


def kernels_hash(*folders: Path) -> str:
    """sha256 over the names and contents of the kernels' sources and tuned configurations (default: all of them).

    Results of other kernels are stale.
    """
    digest = hashlib.sha256()
    for folder in folders or (ROOT / "kernels", ROOT / "csrc"):
        for path in sorted(path for path in folder.iterdir() if path.suffix in KERNEL_SUFFIXES):
            for part in (path.name.encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there or fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def default_path(op: str, device: torch.device) -> Path:
    """``benchmarks/results/<device>/<op>.json``."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / slug / f"{op}.json"


class Record:
    """The rows of a run, shown (``columns`` of them) as they come and kept in a file (``path`` None: shown only)."""

    def __init__(self, path: Path | None, header: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
        self.path = path
        self.columns = columns
        self.header = {"schema": SCHEMA, **header}
        self.rows: list[dict[str, Any]] = []
        self.complete = False

    def add(self, **row: Any) -> None:
        """Add a row, show it, and write the file anew: what is done stays, whatever comes."""
        self.rows.append(row)
        print("  ".join(_cell(name, row.get(name)) for name in self.columns), flush=True)
        self.write()

    def write(self) -> None:
        """Write the file. ``complete`` is false in it until the run has set it."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self.header, "complete": self.complete, "rows": self.rows}, indent=1)
            temporary = self.path.with_suffix(".partial")
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.path)


def show_header(columns: Sequence[str] = COLUMNS) -> None:
    """Print the table's first line."""
    print("  ".join(_cell(name, name) for name in columns))


def _cell(name: str, value: Any) -> str:
    width = {"trace": 16, "op": 18, "shape": 38, "direction": 9, "backend": 20, "status": 0}.get(name, 10)
    if isinstance(value, float):
        value = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{'' if value is None else value!s:<{width}}"


def reason(error: BaseException) -> str:
    """The status of a row whose implementation raised ``error``."""
    if isinstance(error, CannotRun):
        return f"cannot run: {error}"
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
