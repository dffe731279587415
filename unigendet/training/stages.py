"""The two stages: which weights learn, and from which losses.

    GDUF   one pack of detection and generation samples; everything learns                    (paper section 3.2)
    DIGA   a pack of generation samples and the teacher's pack of the same images; the generation stream, φ, the latent
           projections and the time embedding learn from flow matching and from the frozen detector   (section 3.3)

Noise and timesteps are drawn on the model's device from a generator that the trainer owns.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.model.alignment import standardise_tokens
from unigendet.model.flops import diga_step, gduf_step
from unigendet.model.losses import (
    Counts,
    NoisedLatents,
    align_loss,
    clean_latents,
    gduf_losses,
    mse_loss,
    noise_latents,
    sample_timesteps,
)
from unigendet.model.rows import local
from unigendet.model.unigendet import UniGenDet
from unigendet.ops import ImageGrids
from unigendet.packing import PackedBatch
from unigendet.training.config import LossWeights, TrainConfig


@dataclass(frozen=True)
class StageLosses:
    """``total``: weighted sum, to differentiate; ``terms``: the unweighted terms by name, detached."""

    total: Tensor
    terms: dict[str, Tensor]


class Stage(ABC):
    """What the trainer asks of a stage. Making one marks the model's parameters as trained or frozen.

    Attributes:
        name: ``gduf`` or ``diga``.
        model: the model that learns.
        trained: its parameters that learn, by name.
        progress: the fraction of the run's steps that are done, in [0, 1); whoever runs the stage keeps it up to date.
    """

    name: str
    progress: float = 0.0

    def __init__(self, model: UniGenDet, weights: LossWeights | None = None, timestep_shift: float = 1.0) -> None:
        self.model, self.weights, self.timestep_shift = model, weights or LossWeights(), timestep_shift
        self.trained: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.learns(name))
            parameter.grad = None
            if parameter.requires_grad:
                self.trained[name] = parameter

    @abstractmethod
    def learns(self, name: str) -> bool:
        """Whether the parameter of that name is trained."""

    @abstractmethod
    def losses(self, batch: Any, generator: torch.Generator, counts: Counts | None = None) -> StageLosses:
        """Run the model on a batch.

        Args:
            batch: what the loader yields for this stage, on the model's device.
            generator: on that device; noise and timesteps come from it.
            counts: what the means divide by; default: the batch's own counts. Terms are the batch's shares then.

        Raises:
            ValueError: the batch holds nothing to learn from, or does not suit the stage.
        """

    def student(self, batch: Any) -> PackedBatch:
        """The pack of ``batch`` that the losses belong to; its names, tokens and counts stand for the batch."""
        return batch

    @abstractmethod
    def flops(self, batch: Any) -> int:
        """Useful floating-point operations of a step on ``batch``, wherever that lies (``model.flops``)."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a saved state of this stage is bound to."""
        return {"stage": self.name}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors beside the model's weights that a resumed run needs."""
        return {}

    def _noised(self, pack: PackedBatch, generator: torch.Generator) -> NoisedLatents:
        """The pack's latents at random times, with random noise."""
        if not pack.latent_sizes:
            return NoisedLatents(None, None, None)
        times = sample_timesteps(pack, self.timestep_shift, generator)
        shape = (pack.latent_positions.shape[0], self.model.config.latent.token_dim)
        noise = torch.randn(shape, generator=generator, device=pack.latents.device, dtype=pack.latents.dtype)
        return noise_latents(self.model, pack, times, noise)


class GDUFStage(Stage):
    """Generation-detection unified fine-tuning. φ (``align_head``) has no part in its losses and rests."""

    name = "gduf"

    def learns(self, name: str) -> bool:
        """Everything but φ; the position tables are no parameters."""
        return not name.startswith("align_head.")

    def flops(self, batch: PackedBatch) -> int:
        """Of the pack, forward and backward."""
        return gduf_step(self.model.config, batch).total

    def losses(self, batch: PackedBatch, generator: torch.Generator, counts: Counts | None = None) -> StageLosses:
        """Terms ``mse``, ``ce`` and ``label``, as far as the pack has something for them."""
        latents = self._noised(batch, generator)
        output = self.model(
            batch,
            latent_tokens=latents.tokens,
            timesteps=latents.timesteps,
            only_read=True,
            idle=() if counts is None else counts.inputs,
        )
        terms = gduf_losses(self.model, batch, output, latents, counts)
        if not terms:
            raise ValueError(
                "the batch has nothing to learn from: no noised image, no text with loss and no labelled sample"
            )
        total = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        return StageLosses(total, {name: term.detach() for name, term in terms.items()})


_DIGA_MODULES = ("align_head.", "vae2llm.", "llm2vae.", "time_embedding.")


class DIGAStage(Stage):
    """Detector-informed generative alignment: the generator's features follow those of the detector, which is frozen.

    The teacher is made of the model's weights at this moment, so make the stage when DIGA starts.

    Args:
        model: it needs ``config.align_head``.
        weights: of the losses; with ``diga`` 0 no teacher runs and only ``mse`` is learnt.
        timestep_shift: see ``sample_timesteps``.
        align_layer: the student's decoder layer whose output is aligned, numbered from 1.
        teacher_layer: the teacher's last decoder layer.
        teacher_norm: ``none``, or ``tokens``: see ``standardise_tokens``.
        shuffled_teacher: a control: each image is aligned with the teacher's features of the next one in its pack.
        shard: divides the teacher's parameters as those of ``model`` are; None: ``model`` is whole.
    """

    name = "diga"

    def __init__(
        self,
        model: UniGenDet,
        weights: LossWeights | None = None,
        timestep_shift: float = 1.0,
        *,
        align_layer: int = 8,
        teacher_layer: int = 8,
        teacher_norm: str = "none",
        shuffled_teacher: bool = False,
        shard: Callable[[UniGenDet], UniGenDet] | None = None,
    ) -> None:
        layers = model.config.num_layers
        for what, layer in (("align_layer", align_layer), ("teacher_layer", teacher_layer)):
            if not 1 <= layer <= layers:
                raise ValueError(f"{what} is {layer}; it must be in 1..{layers}, the model's decoder layers")
        if model.align_head is None:
            raise ValueError("stage is 'diga'; it must be 'gduf' for a model without alignment head (align_head=True)")
        super().__init__(model, weights, timestep_shift)
        self.align_layer, self.teacher_layer = align_layer, teacher_layer
        self.teacher_norm, self.shuffled_teacher = teacher_norm, shuffled_teacher
        self.teacher = frozen_teacher(model, teacher_layer, shard) if self.weights.diga else None

    def learns(self, name: str) -> bool:
        """The decoder's generation stream, φ, the latent projections and the time embedding."""
        return name.startswith(_DIGA_MODULES) or (name.startswith("decoder.") and ".gen" in name)

    def student(self, batch: tuple[PackedBatch, PackedBatch]) -> PackedBatch:
        """The generation samples."""
        return batch[0]

    def flops(self, batch: tuple[PackedBatch, PackedBatch]) -> int:
        """Of student and teacher; of the student alone while the alignment has no weight."""
        pack, teacher_pack = batch
        aligned = teacher_pack if self.weights.alignment(self.progress) else None
        layers = {"align_layer": self.align_layer, "teacher_layer": self.teacher_layer}
        return diga_step(self.model.config, pack, aligned, **layers).total

    def losses(
        self, batch: tuple[PackedBatch, PackedBatch], generator: torch.Generator, counts: Counts | None = None
    ) -> StageLosses:
        """Terms ``mse`` and ``diga``. ``batch``: generation samples, and the teacher's samples of the same images."""
        pack, teacher_pack = batch
        counts = counts or Counts.of(pack)
        weight = self.weights.alignment(self.progress)
        latents = self._noised(pack, generator)
        if not pack.latent_sizes or pack.noised_tokens.shape != pack.latent_positions.shape:
            raise ValueError("DIGA learns from generation samples: every latent image of the batch must be noised")
        output = self.model(
            pack,
            latent_tokens=latents.tokens,
            timesteps=latents.timesteps,
            capture=(self.align_layer,) if weight else (),
            only_read=True,
        )
        mse = mse_loss(self.model, pack, output, latents, counts)
        if not weight:
            return StageLosses(self.weights.mse * mse, {"mse": mse.detach()})
        grids, teacher = alignment_grids(pack, teacher_pack, shuffled=self.shuffled_teacher), self.target(teacher_pack)
        weighted = align_loss(self.model, pack, output.captured[self.align_layer], teacher, grids, counts, weight)
        return StageLosses(self.weights.mse * mse + weighted, {"mse": mse.detach(), "diga": weighted.detach() / weight})

    @torch.no_grad()
    def features(self, pack: PackedBatch) -> Tensor:
        """The frozen teacher's features [ViT patches, hidden] of its pack, image by image, after the final norm."""
        if self.teacher is None:
            raise ValueError("losses.diga is 0, so this stage has no teacher")
        latents = clean_latents(self.teacher, pack)
        output = self.teacher(
            pack, latent_tokens=latents.tokens, timesteps=latents.timesteps, stop_after=self.teacher_layer
        )
        return output.hidden.index_select(0, pack.vit_rows)

    def target(self, pack: PackedBatch) -> Tensor:
        """What the student is drawn to: the teacher's features, standardised and shuffled as the settings say."""
        features = self.features(pack)
        if self.teacher_norm == "tokens":
            features = standardise_tokens(features, pack.vit_sizes)
        if self.shuffled_teacher:
            rows, columns = pack.vit_sizes[0]
            features = features.roll(-rows * columns, 0)  # image i has those of i + 1, the last those of the first
        return features

    @property
    def identity(self) -> dict[str, Any]:
        """Stage, layers, and what else the teacher is, where it is not the published one."""
        values = {"stage": self.name, "align_layer": self.align_layer, "teacher_layer": self.teacher_layer}
        options = {"teacher_norm": (self.teacher_norm, "none"), "shuffled_teacher": (self.shuffled_teacher, False)}
        return values | {name: value for name, (value, usual) in options.items() if value != usual}

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's own weights: those that the model no longer holds."""
        if self.teacher is None:
            return {}
        return {name: p.detach() for name, p in self.teacher.named_parameters() if name in self.trained}


def frozen_teacher(model: UniGenDet, layers: int, shard: Callable[[UniGenDet], UniGenDet] | None = None) -> UniGenDet:
    """A frozen view of ``model`` up to decoder layer ``layers``, without heads.

    A parameter that learns is copied, so that the teacher does not move with the model; one that is frozen is shared,
    so that it costs no memory. Where parameters are divided among processes (``shard`` divides them, and allocates this
    process's part), all are copied: each belongs to one FSDP module.
    """
    if shard is not None:
        return _sharded_teacher(model, layers, shard)
    dropped: list[nn.Module] = [*model.decoder.layers[layers:], model.lm_head, model.llm2vae]
    dropped += [head for head in (model.class_head, model.align_head) if head is not None]
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers(), *dropped]
    teacher = copy.deepcopy(model, {id(thing): thing for thing in shared})
    teacher.decoder.layers = teacher.decoder.layers[:layers]
    for name in ("lm_head", "llm2vae", "class_head", "align_head"):
        setattr(teacher, name, None)
    return teacher.requires_grad_(False)


def _sharded_teacher(model: UniGenDet, layers: int, shard: Callable[[UniGenDet], UniGenDet]) -> UniGenDet:
    with torch.device("meta"):
        teacher = UniGenDet(dataclasses.replace(model.config, num_layers=layers, class_head=False, align_head=False))
    teacher.lm_head = teacher.llm2vae = None
    teacher = shard(teacher.requires_grad_(False))
    own, models = teacher.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            local(tensor).copy_(local(models[name]))
    return teacher


def alignment_grids(pack: PackedBatch, teacher_pack: PackedBatch, *, shuffled: bool = False) -> ImageGrids:
    """Student and teacher grid of every image; ``shuffled``: each student's with the teacher's of the next image.

    Raises ValueError unless the packs hold equally many images, and more than one if they are to be shuffled.
    """
    if len(pack.latent_sizes) != len(teacher_pack.vit_sizes):
        raise ValueError(
            f"the teacher's pack has {len(teacher_pack.vit_sizes)} ViT images; it must have one for each of the "
            f"{len(pack.latent_sizes)} latent images of the student's pack"
        )
    teachers = teacher_pack.vit_sizes
    if shuffled:
        if len(teachers) < 2:
            raise ValueError(f"the pack has {len(teachers)} image; with shuffled_teacher it must have at least 2")
        teachers = (*teachers[1:], teachers[0])
    return ImageGrids.from_sizes([(*s, *t) for s, t in zip(pack.latent_sizes, teachers, strict=True)])


def make_stage(model: UniGenDet, config: TrainConfig, shard: Callable[[UniGenDet], UniGenDet] | None = None) -> Stage:
    """The stage that ``config`` describes, on ``model``; ``shard``: as a ``DIGAStage``'s."""
    if config.stage == "gduf":
        return GDUFStage(model, config.losses, config.timestep_shift)
    return DIGAStage(
        model,
        config.losses,
        config.timestep_shift,
        align_layer=config.align_layer,
        teacher_layer=config.teacher_layer,
        teacher_norm=config.teacher_norm,
        shuffled_teacher=config.shuffled_teacher,
        shard=shard,
    )
