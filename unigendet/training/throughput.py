"""How fast a run learns: tokens, samples and useful operations per second, the share of the device's peak, and memory.

Operations are counted as ``model.flops`` does: what has to be computed, so that recomputed activations lower the share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unigendet.device import data_sheet_tflops
from unigendet.training.metrics import MEMORY, Row
from unigendet.training.stages import Stage

GIB = 2**30
SHORTEST = 1e-9  # seconds that a step takes at least: it is divided by


class Meter:
    """Measures the steps of one process.

    Args:
        stage: counts the useful operations of its batches.
        device: that the process computes on.
        peak_tflops: dense TFLOP/s of the device at best; None: its data sheet's bfloat16 rate, where that is known.
    """

    def __init__(self, stage: Stage, device: torch.device, peak_tflops: float | None = None) -> None:
        self._stage, self._device = stage, device
        self._peak = data_sheet_tflops(device) if peak_tflops is None else peak_tflops

    def measure(self, batches: Sequence[Any], seconds: float, waited: float) -> dict[str, Any]:
        """What this process did in a step, as JSON can hold it; ``combine`` makes a row of those of all processes.

        ``tokens, samples, flops`` of the batches' students; ``seconds``, and ``data_seconds`` of them; ``peak_tflops``
        if known; on CUDA ``memory_gib`` and ``memory_reserved_gib``: the most that tensors took, and that PyTorch took
        from the device for them, since the last call.

        Args:
            batches: what the loader yielded, wherever it lies now: sizes and the layouts' tables on the host are read.
            seconds: that the step took, the wait for its batches included.
            waited: seconds of that wait.
        """
        layouts = [self._stage.student(batch).layout for batch in batches]
        measured: dict[str, Any] = {
            "tokens": sum(layout.num_queries for layout in layouts),
            "samples": sum(layout.num_samples for layout in layouts),
            "flops": sum(self._stage.flops(batch) for batch in batches),
            "seconds": seconds,
            "data_seconds": waited,
        }
        if self._peak is not None:
            measured["peak_tflops"] = self._peak
        if self._device.type == "cuda":
            statistics = torch.cuda.memory_stats(self._device)
            peaks = [statistics.get(f"{kind}_bytes.all.peak", 0) / GIB for kind in ("allocated", "reserved")]
            measured |= dict(zip(MEMORY, peaks, strict=True))
            torch.cuda.reset_peak_memory_stats(self._device)
        return measured


def combine(processes: Sequence[Mapping[str, Any]]) -> Row:
    """A step's row from what ``Meter.measure`` returned in each process.

    ``tokens``, ``samples`` and operations are summed; the step took the seconds, the wait and the memory of the process
    with most of them. ``model_tflops_per_second`` is of all processes together, ``mfu`` the mean of their shares of
    their peak; absent unless every one's is known.
    """

    def of_all(name: str) -> list[Any]:
        return [process[name] for process in processes]

    row: Row = {name: sum(of_all(name)) for name in ("tokens", "samples")}
    row |= {name: max(of_all(name)) for name in ("seconds", "data_seconds")}
    seconds = max(row["seconds"], SHORTEST)
    row |= {f"{name}_per_second": row[name] / seconds for name in ("tokens", "samples")}
    row["model_tflops_per_second"] = sum(of_all("flops")) / seconds / 1e12
    if all("peak_tflops" in process for process in processes):
        shares = [process["flops"] / seconds / 1e12 / process["peak_tflops"] for process in processes]
        row["mfu"] = sum(shares) / len(shares)
    return row | {name: max(of_all(name)) for name in MEMORY if all(name in process for process in processes)}
