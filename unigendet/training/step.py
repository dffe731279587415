"""Losses and gradients of one step: of all its packs, in all processes of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigendet.model.losses import Counts
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import PackedBatch
from unigendet.training.config import TrainConfig
from unigendet.training.parallel import Parallel, whole
from unigendet.training.stages import Stage


@dataclass(frozen=True)
class StepValues:
    """``values``: the loss, its terms and the gradients' norm before clipping, by name, of all processes. ``own``: of
    loss and terms this process's part, on its device; ``samples``: the names of its samples.
    """

    values: dict[str, float]
    own: Tensor
    samples: list[str]

    def not_finite(self) -> str:
        """Those values that are not finite, as text; empty if there are none."""
        return ", ".join(f"{name} = {value}" for name, value in self.values.items() if not math.isfinite(value))

    def suspects(self, parallel: Parallel) -> str:
        """The samples that a value which is not finite may come from; all processes must ask."""
        parts = parallel.gather((bool(self.own.isfinite().all()), self.samples))
        blamed = [part for part in parts if not part[0]] or parts  # a gradient alone may be of any of them
        return f"Samples of the batch: {', '.join(name for _, names in blamed for name in names)}"


class Gradients:
    """Computes a step's gradients, clipped, into the parameters of ``stage.trained``.

    Args:
        stage: what learns and from which losses.
        config: of the run.
        parallel: this process among those of the run.
    """

    def __init__(self, stage: Stage, config: TrainConfig, parallel: Parallel) -> None:
        self._stage, self._parallel, self._clip = stage, parallel, config.optimizer.clip
        self._autocast = config.precision == "bf16" and not parallel.sharded
        self._parameters = list(stage.trained.values())

    def compute(self, batches: Sequence[Any], generators: Sequence[torch.Generator], step: int) -> StepValues:
        """Gradients of this process's batches, summed with those of the others.

        Args:
            batches: what the loader yields, on the host.
            generators: of noise and timesteps, one per batch.
            step: number of the step, for errors.
        """
        device = self._parallel.device
        packs = [self._stage.student(batch) for batch in batches]
        counts = self._counts(packs)
        names, parts = [], []
        for left, batch, pack, generator in zip(range(len(packs))[::-1], batches, packs, generators, strict=True):
            self._parallel.sum_copies(self._stage.model, last=not left)
            try:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocast):
                    losses = self._stage.losses(_move(batch, device), generator, counts)
                losses.total.backward()
            except Exception as error:
                error.add_note(f"in step {step}, with the samples {list(pack.names)}")
                raise
            names = ["loss", *losses.terms]
            parts.append(torch.stack([v.float() for v in (losses.total.detach(), *losses.terms.values())]))
        norm = whole(nn.utils.clip_grad_norm_(self._parameters, self._clip))
        own = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        total = self._parallel.total(own.clone())
        # One copy to the host is the step's only wait for the device.
        values = torch.cat([total, norm.float().reshape(1).to(total.device)]).tolist()
        samples = [name or "(unnamed)" for pack in packs for name in pack.names]
        return StepValues(dict(zip([*names, "grad_norm"], values, strict=True)), own, samples)

    def _counts(self, packs: Sequence[PackedBatch]) -> Counts:
        """What the losses' means divide by: the counts of all packs of all processes."""
        counts = Counts.of(*packs)
        return counts if self._parallel.world_size == 1 else Counts(*self._parallel.sum(counts.numbers()))


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, PackedBatch):
        return batch.to(device, non_blocking=True)
    return tuple(pack.to(device, non_blocking=True) for pack in batch)


def slot_generators(seed: int, parallel: Parallel, count: int) -> list[torch.Generator]:
    """Random generators for the ``count`` packs of a process in a step.

    What one draws depends on its slot, the pack's number among those of all processes in a step. So the same packs get
    the same noise, whether one process has them one after the other or several have them at once.
    """
    generators = []
    for slot in range(parallel.rank * count, (parallel.rank + 1) * count):
        own = seed
        if slot:
            own = int(np.random.SeedSequence([seed, slot]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generators.append(torch.Generator(parallel.device).manual_seed(own))
    return generators


def compile_layers(model: UniGenDet) -> None:
    """Compile every layer's forward, for packs of any length; the first steps then take minutes.

    Only where gradients are wanted: torch.compile keeps few variants of a function, and inference has others.
    """
    for layer in (*model.decoder.layers, *model.vision.layers):
        layer.forward = _compiled_in_training(layer.forward)


def _compiled_in_training(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True)

    def forward(*arguments: Any, **options: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*arguments, **options)

    return forward
