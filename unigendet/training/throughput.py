"""How fast a run learns: tokens, samples and useful operations per second, the share of the device's peak, and memory.

Operations are counted as ``model.flops`` does: what the model has to compute, so that recomputed activations lower the
share, and so do the wait for data and an autoencoder's encoding of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unigendet.device import GIB, data_sheet_tflops
from unigendet.training.metrics import MEMORY, SECONDS, SHORTEST, Row
from unigendet.training.stages import Stage


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

    def begin(self) -> None:
        """A step begins: what was in memory before, while a look was made, say, is not of its peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def measure(
        self, batches: Sequence[Any], seconds: float, waited: float, encoded: float | None = None
    ) -> dict[str, Any]:
        """What this process did in a step, as JSON can hold it; ``combine`` makes a row of those of all processes.

        ``tokens, samples, flops`` of the batches' students; ``seconds``, and of them ``data_seconds`` and, if it is
        known, ``encode_seconds``; ``peak_tflops`` if known; on CUDA ``memory_gib`` and ``memory_reserved_gib``: the
        most since ``begin`` that tensors took, and that PyTorch held of the device.

        Args:
            batches: what the loader yielded, wherever it lies now: sizes and the layouts' tables on the host are read.
            seconds: that the step took, all that its batches took included.
            waited: seconds of these in which the process waited for data, or read it itself.
            encoded: seconds of these in which it encoded and packed what came, see ``Loader.encode_seconds``; None:
                that is done elsewhere.
        """
        layouts = [self._stage.student(batch).layout for batch in batches]
        measured: dict[str, Any] = {
            "tokens": sum(layout.num_queries for layout in layouts),
            "samples": sum(layout.num_samples for layout in layouts),
            "flops": sum(self._stage.flops(batch) for batch in batches),
            "seconds": seconds,
            "data_seconds": waited,
        }
        if encoded is not None:
            measured["encode_seconds"] = encoded
        if self._peak is not None:
            measured["peak_tflops"] = self._peak
        if self._device.type == "cuda":
            statistics = torch.cuda.memory_stats(self._device)
            peaks = [statistics.get(f"{kind}_bytes.all.peak", 0) / GIB for kind in ("allocated", "reserved")]
            measured |= dict(zip(MEMORY, peaks, strict=True))
        return measured


def combine(processes: Sequence[Mapping[str, Any]]) -> Row:
    """A step's row from what ``Meter.measure`` returned in each process.

    ``tokens``, ``samples`` and operations are summed; the step took the seconds, the wait, the encoding and the memory
    of the process with most of them. ``model_tflops_per_second`` is of all processes together, ``mfu`` the mean of
    their shares of their peak; absent unless every one's is known.
    """

    def of_all(name: str) -> list[Any]:
        return [process[name] for process in processes]

    row: Row = {name: sum(of_all(name)) for name in ("tokens", "samples")}
    row |= {name: max(of_all(name)) for name in SECONDS if all(name in process for process in processes)}
    seconds = max(row["seconds"], SHORTEST)
    row |= {f"{name}_per_second": row[name] / seconds for name in ("tokens", "samples")}
    row["model_tflops_per_second"] = sum(of_all("flops")) / seconds / 1e12
    if all("peak_tflops" in process for process in processes):
        shares = [process["flops"] / seconds / 1e12 / process["peak_tflops"] for process in processes]
        row["mfu"] = sum(shares) / len(shares)
    return row | {name: max(of_all(name)) for name in MEMORY if all(name in process for process in processes)}
