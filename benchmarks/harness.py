"""Honest timing, memory, and the machine's own ceilings: what every benchmark measures with.

Competitors run in turns, on several sets of buffers, so that no call finds its inputs in the cache and whatever else
the machine does meets all alike; results are medians with the 20th and 80th percentile. On CUDA devices each call lies
between two events, and the device is kept busy until the calls of a turn are queued, so that launches are not timed;
elsewhere the monotonic clock is read around each call.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TURN = 2  # calls that a competitor makes before the next one's turn
MOST_RUNS = 200  # of one competitor
MOST_SETS = 32  # of buffers
CYCLES_PER_MS = 2_000_000  # of a GPU's clock, or fewer: a wait that lasts longer than it must costs nothing but time


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
    """Time calls that do the same on different buffers, for about ``seconds`` (at least 8 calls)."""
    return measure_paired({"": calls}, device, seconds=seconds)[""]


def measure_paired(
    calls: Mapping[str, Sequence[Callable[[], Any]]],
    device: torch.device,
    *,
    seconds: float = 0.5,
    turn: int = TURN,
    rounds: int = 4,
    on_host: bool = False,
) -> dict[str, Timing]:
    """Time what competes in turns.

    ``calls`` are each competitor's, one for each set of buffers; each runs about ``seconds`` (at least ``rounds`` turns
    of ``turn`` calls, at most 200 calls; the faster ones make more calls at a turn). Of the calls of a turn the first
    may meet memory and caches as another competitor left them, the others as it did itself. ``on_host``: the work is
    the host's, so that the clock is read, after the device has done what it was given.
    """
    estimates, queueing = {}, {}
    for name, own in calls.items():
        for call in own[:3]:  # warm-up
            call()
        synchronize(device)
        begin = time.monotonic()
        own[0]()
        queueing[name] = time.monotonic() - begin
        synchronize(device)
        estimates[name] = max(time.monotonic() - begin, 1e-6)
    runs = {name: min(MOST_RUNS, max(rounds * turn, int(seconds / each))) for name, each in estimates.items()}
    rounds = max(rounds, min(runs.values()) // turn)
    of: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, own in calls.items():
            done = len(of[name])
            each = [own[i % len(own)] for i in range(done, done + -(-runs[name] // rounds))]
            with_events = device.type == "cuda" and not on_host
            of[name] += _with_events(each, queueing[name]) if with_events else _with_clock(each, device)
    return {name: Timing.of(own) for name, own in of.items()}


def _with_events(turn: Sequence[Callable[[], Any]], queueing: float) -> list[float]:
    """Milliseconds of each call. ``queueing``: seconds that the host takes to queue one."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turn]
    torch.cuda._sleep(int((1.5 * queueing * len(turn) * 1e3 + 0.1) * CYCLES_PER_MS))  # the host gets ahead meanwhile
    for call, (begin, end) in zip(turn, events, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _with_clock(turn: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    milliseconds = []
    for call in turn:
        synchronize(device)
        begin = time.monotonic()
        call()
        synchronize(device)
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

    On a CPU it is the process's resident memory, by Linux's high-water mark, after the C library has given back what it
    kept; None where that mark cannot be reset.
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
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again, and not show
    except (AttributeError, OSError):
        return None
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
    """How many sets of ``num_bytes`` to take turns with: at least 2, together at least four times the last cache."""
    on_gpu = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else _cpu_cache()
    return max(2, min(MOST_SETS, math.ceil(4 * cache / num_bytes)))


@functools.cache
def _cpu_cache() -> int:
    """Bytes of the largest cache of the first core, on Linux; 32 MiB where it does not say."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)


def ceilings(device: torch.device, *, tiny: bool = False, seconds: float = 0.5) -> dict[str, float]:
    """What the device itself reaches: ``matmul_tflops``, n³ in bfloat16, and ``copy_gbs``, bytes read plus written.

    n is 8192 and the copy 2 GiB; on a CPU the faster of 1024 and 2048 in float32, and 256 MiB; ``tiny``: 128 in
    float32, and 1 MiB. Rates are those of the faster calls (20th percentile of their times): what else the machine does
    must not lower a ceiling.
    """
    sizes, dtype, size = (
        ([8192], torch.bfloat16, 2**31) if device.type == "cuda" else ([1024, 2048], torch.float32, 2**28)
    )
    if tiny:
        sizes, dtype, size = [128], torch.float32, 2**20
    tflops = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        matmul = measure([lambda a=a, b=b: a @ b], device, seconds=seconds / len(sizes))
        tflops = max(tflops, 2 * n**3 / matmul.p20 / 1e9)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, seconds=seconds)
    return {"matmul_tflops": tflops, "copy_gbs": 2 * size / copy.p20 / 1e6}


def reason(error: BaseException) -> str:
    """The status of a row whose implementation raised ``error``."""
    if isinstance(error, CannotRun):
        return f"cannot run: {error}"
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
