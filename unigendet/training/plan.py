"""What a run will need, computed before anything is loaded: memory, communication, tokens, disk (``train --dry-run``).

The formulas are those of ``footprint`` (what is kept, gathered and sent) and ``activations``.
"""

from __future__ import annotations

from dataclasses import dataclass

from unigendet.config import ModelConfig, check
from unigendet.device import GIB
from unigendet.model.flops import diga_step, gduf_step
from unigendet.training.activations import Activations, Precision, activations
from unigendet.training.config import TrainConfig
from unigendet.training.footprint import Bytes, Footprint
from unigendet.training.parallel import mesh_shape
from unigendet.training.planned_pack import PlannedPack, planned_pack
from unigendet.training.sizes import RunSizes

CARD, CARD_GIB = "80 GB", 79  # what PyTorch finds on such a card
SLACK = 0.1  # share of the card that should be left for what is not included


@dataclass(frozen=True)
class Plan:
    """All numbers are bytes of one rank, if nothing else is said.

    ``replicate``, ``shard``: the mesh; ``held``: what is on the device from the first step to the last; ``moments``:
    what comes on top of it, at each of the moments that can be the peak; ``host``: in the memory of the machine;
    ``disk``: of a checkpoint, whole; ``communication``: received or sent per step; ``operations``: useful operations of
    a step, as ``flops`` counts them.
    """

    config: TrainConfig
    model: ModelConfig
    replicate: int
    shard: int
    sizes: RunSizes
    pack: PlannedPack
    activations: Activations
    held: Bytes
    moments: dict[str, Bytes]
    host: Bytes
    disk: Bytes
    communication: Bytes
    operations: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard

    @property
    def worst(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Most memory on the device."""
        return sum(self.held.values()) + sum(self.moments[self.worst].values())

    @property
    def tokens(self) -> int:
        """Most tokens of a step, of all ranks."""
        return self.config.loader.max_tokens * self.config.accumulate * self.world_size

    def verdict(self) -> str:
        """Whether it fits a card of 80 GB."""
        left = CARD_GIB - self.peak / GIB
        if left < 0:
            return f"does not fit {CARD}: {-left:.1f} GiB too much"
        words = "fits" if left >= SLACK * CARD_GIB else "is tight on"
        return f"{words} {CARD}: {left:.1f} of {CARD_GIB} GiB are left for what is not included"


def make_plan(
    config: TrainConfig,
    model: ModelConfig,
    world_size: int = 1,
    *,
    sizes: RunSizes | None = None,
    packs: PlannedPack | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        config: of the run.
        model: its model's settings.
        world_size: number of processes.
        sizes: of the run; default: they are found out.
        packs: what a process reads at a time; default: ``planned_pack``'s.

    Raises:
        ValueError: the mesh does not fit ``world_size``, a layer is not the model's, or no sample fits the pack.
    """
    check(world_size > 0, "world_size", world_size, "positive")
    replicate, shard = mesh_shape(config.parallel, world_size)
    sizes, packs = sizes or RunSizes.of(config, model), packs or planned_pack(config, model)
    precision = Precision.of(config.precision, world_size > 1)
    captured = config.align_layer if packs.teacher is not None else None
    options = {"captured": captured, "teacher": packs.teacher}
    parts = activations(model, packs.student, precision, config.recompute, **options)
    footprint = Footprint(config, model, sizes, packs, parts, replicate, shard)
    return Plan(
        config=config,
        model=model,
        replicate=replicate,
        shard=shard,
        sizes=sizes,
        pack=packs,
        activations=parts,
        held=footprint.held(),
        moments=footprint.moments(),
        host=footprint.host(),
        disk=footprint.disk(),
        communication=footprint.communication(),
        operations=config.accumulate * _operations(config, model, packs),
    )


def _operations(config: TrainConfig, model: ModelConfig, packs: PlannedPack) -> int:
    """Useful operations of a pack."""
    if config.stage == "gduf":
        return gduf_step(model, packs.student).total
    layers = {"align_layer": config.align_layer, "teacher_layer": config.teacher_layer}
    return diga_step(model, packs.student, packs.teacher, **layers).total
