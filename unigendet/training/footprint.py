"""Memory, disk and communication of one rank, in bytes.

With P numbers of parameters, Pl of them learning, S processes that a copy of the model is sharded over, and c the bytes
of a number in the gathered copies (2 with ``precision: bf16``), a rank holds

    4 P/S  weights      8 Pl/S  Adam's moments      4 Pl/S  averages      4 Pl/S  gradients (from the backward pass on)

and DIGA's teacher, 4/S bytes for each of its weights (with one process only for those that learn). Not sharded are
position tables, the autoencoder, the pack, and activations (``activations``). The copies that are gathered: of the root
(all but the layers) from the forward pass to the end of the backward pass; of a layer while it computes, of the next
one beside it, and the buffer in which that arrives. A layer's gradients are there whole, c bytes each, and again in
float32 while they are summed over the ranks. Memory is added up at the moments that can be the worst, and the largest
sum is the peak.

Each pass of a pack receives c (S − 1)/S bytes per number of the root once and of each layer twice, forward and
backward, and sends 4 (S − 1)/S bytes per gradient. R copies of the model then sum theirs, 8 (R − 1)/(R S) bytes per
gradient, once per step (``Parallel.sum_copies``). Every number is of a rank, of the one with the largest shards.

The allocator's slack, the CUDA context, libraries' workspaces and NCCL's buffers are not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unigendet.config import ModelConfig
from unigendet.packing import PackedBatch
from unigendet.training.activations import Activations, Precision
from unigendet.training.config import TrainConfig
from unigendet.training.planned_pack import PlannedPack
from unigendet.training.sizes import FP32, ROOT, RunSizes, Shapes, elements, groups

Bytes = dict[str, int]


@dataclass(frozen=True)
class Footprint:
    """What a run of these sizes needs, of the rank with the largest shards.

    The model is ``replicate`` times there, each time over ``shard`` processes. Every method leaves out what is zero.
    """

    config: TrainConfig
    model: ModelConfig
    sizes: RunSizes
    packs: PlannedPack
    activations: Activations
    replicate: int
    shard: int

    @property
    def state(self) -> Bytes:
        """Weights, moments, averages and teacher: what a checkpoint holds."""
        learning = elements(self.sizes.learning, self.shard)
        steps = len(self.sizes.trained)  # Adam counts them for each parameter
        return _present(
            {
                "weights (float32)": FP32 * elements(self.sizes.parameters, self.shard),
                "Adam's moments": 2 * FP32 * learning + FP32 * steps,
                "averaged weights": 0 if self.config.ema_decay is None else FP32 * learning,
                "DIGA's teacher": FP32 * elements(self._teacher, self.shard),
            }
        )

    @property
    def gradients(self) -> int:
        """Gradients of all that learns."""
        return FP32 * elements(self.sizes.learning, self.shard)

    def held(self) -> Bytes:
        """What is on the device from the first step to the last."""
        packs = pack_bytes(self.packs.student) + pack_bytes(self.packs.teacher)
        tables = self.sizes.buffers * (2 if self._teacher and self._processes > 1 else 1) + self.sizes.rope
        unsharded = {
            "position tables": tables,
            "autoencoder": FP32 * self.sizes.autoencoder,
            "pack": packs,
        }
        return _present(({} if self.config.parallel.cpu_offload else self.state) | unsharded)

    def moments(self) -> dict[str, Bytes]:
        """What comes on top of ``held``, at each of the moments that can be the peak."""
        return {name: _present(values) for name, values in self._moments().items()}

    def _moments(self) -> dict[str, Bytes]:
        kept, weights = self.activations, _Gathered.of(self)
        gradients = 0 if self.config.parallel.cpu_offload else self.gradients
        before = {"gradients": gradients if self.config.accumulate > 1 else 0}  # those of the packs before
        vision, heads = {"ViT's activations": kept.vision}, {"heads' activations": kept.heads}
        whole = {"decoder's activations": kept.decoder} | vision
        layer = "one layer's activations and gradients"
        found = {
            "text loss": weights.forward | whole | heads | {"logits": kept.text_head} | before,
            "last layer's backward": weights.backward | whole | {layer: kept.decoder_layer} | before,
            "first layer's backward": weights.backward
            | {"decoder's activations": kept.decoder // self.model.num_layers}
            | vision
            | {layer: max(kept.decoder_layer, kept.vision_layer), "gradients": gradients},
            "end of the backward": weights.end | {"gradients": gradients},
        }
        if self.packs.teacher is not None:
            root = self._compute * elements(groups(self._teacher)[ROOT]) * (self._processes > 1)
            gathered = {"gathered weights": weights.forward.get("gathered weights", 0) + root}
            teacher = {"one layer of the teacher": kept.teacher}
            found["teacher's pass"] = weights.forward | gathered | whole | heads | teacher | before
        return found

    def host(self) -> Bytes:
        """Memory of the machine that a process needs, besides that of Python and its libraries."""
        state, loader = self.state, self.config.loader
        packs = pack_bytes(self.packs.student) + pack_bytes(self.packs.teacher)
        if self.model.latent.autoencoder == "flux":  # latent images come as pixels
            packs += FP32 * 3 * self.packs.side**2 * len(self.packs.student.latent_sizes)
        workers, samples = max(1, loader.num_workers), self.packs.student.layout.num_samples
        offload = sum(state.values()) + self.gradients if self.config.parallel.cpu_offload else 0
        return _present(
            {
                "packs made ahead": packs * (loader.num_workers * loader.prefetch + 1),
                "samples held for later packs": packs * workers * loader.lookahead // samples,
                "offloaded state and gradients": offload,
                "copy of the state for a checkpoint": sum(state.values()) // self.replicate * (self._processes > 1),
            }
        )

    def disk(self) -> Bytes:
        """A whole checkpoint."""
        model = FP32 * elements(self.sizes.parameters) + self.sizes.buffers
        return _present(
            {
                "model": model,
                "averaged model": 0 if self.config.ema_decay is None else model,
                "optimizer": 2 * FP32 * elements(self.sizes.learning) + FP32 * len(self.sizes.trained),
                "DIGA's teacher": FP32 * elements(self.sizes.teacher),
            }
        )

    def communication(self) -> Bytes:
        """Bytes that a rank receives (gathering) or sends (summing) in a step."""
        others = (self.shard - 1) / self.shard
        gathered, learning = self._per_pass(), elements(self.sizes.learning)
        copies = 2 * (self.replicate - 1) / self.replicate
        passes = self.config.accumulate
        sums = 1 if self.config.parallel.sums_once else passes
        return _present(
            {
                "gathering weights": round(passes * others * self._compute * gathered),
                "summing gradients over the shards": round(passes * others * FP32 * learning),
                "summing gradients over the copies": round(sums * copies * FP32 * learning / self.shard),
            }
        )

    def _per_pass(self) -> int:
        """Numbers that are gathered for a pack: the root once, every layer forward and backward; the teacher once."""
        found = {name: elements(shapes) for name, shapes in groups(self.sizes.parameters).items()}
        if not self.packs.student.vit_sizes:
            found = {name: count for name, count in found.items() if not name.startswith("vision.")}
        return 2 * sum(found.values()) - found[ROOT] + elements(self._teacher)

    @property
    def _teacher(self) -> Shapes:
        """What DIGA's teacher has copies of."""
        return self.sizes.teacher if self._processes == 1 else self.sizes.whole_teacher

    @property
    def _processes(self) -> int:
        return self.replicate * self.shard

    @property
    def _compute(self) -> int:
        return Precision.of(self.config.precision, self._processes > 1).compute


@dataclass(frozen=True)
class _Gathered:
    """Copies of weights that are whole on a rank, and gradients on their way, at three times.

    ``forward``: its end; ``backward``: within a decoder layer; ``end``: when the root's gradients are summed.
    """

    forward: Bytes
    backward: Bytes
    end: Bytes

    @classmethod
    def of(cls, run: Footprint) -> _Gathered:
        compute = run._compute
        if run._processes == 1:  # autocast's copies, and a layer's gradients before they become float32
            copies = compute * run.sizes.autocast_copies(run.config.recompute) if compute < FP32 else 0
            values = {"low-precision copies of weights": copies}
            return cls(values, values, {})
        found, learning = groups(run.sizes.parameters), groups(run.sizes.learning)
        layer = max(elements(shapes) for name, shapes in found.items() if name != ROOT)
        root = compute * elements(found[ROOT])
        grown = max(elements(shapes) for name, shapes in learning.items() if name != ROOT)
        head = compute * elements(s for name, s in learning[ROOT].items() if name.startswith("lm_head."))
        rooted = elements(learning[ROOT])
        return cls(
            forward={"gathered weights": root + 2 * compute * layer},
            backward={
                "gathered weights": root + 3 * compute * layer,
                "gradients being summed": (compute + FP32) * grown + head,
            },
            end={"gathered weights": root, "gradients being summed": (compute + FP32) * rooted},
        )


def pack_bytes(batch: PackedBatch | None) -> int:
    """Bytes of the tensors of a pack, its layouts' among them; 0 for None."""
    if batch is None:
        return 0
    readout = batch.readout
    parts: list[object] = [batch, batch.layout, batch.vit_layout, readout, None if readout is None else readout.layout]
    return sum(_own_bytes(part) for part in parts if part is not None)


def _own_bytes(part: object) -> int:
    return sum(value.nbytes for value in vars(part).values() if isinstance(value, Tensor))


def _present(values: Bytes) -> Bytes:
    return {name: value for name, value in values.items() if value}
