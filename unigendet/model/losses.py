"""The losses of both training stages, from a model's output.

    GDUF   mse_weight · MSE + ce_weight · CE + label_weight · CE_real/fake               (paper section 3.2)
    DIGA   mse_weight · MSE + diga_weight · (1 − mean cos(resized teacher, φ(student)))  (paper section 3.3)

MSE is the mean over noised latent tokens of the channels' mean squared velocity error; CE the mean over text tokens
with loss; CE_real/fake the mean over labelled samples. ``Counts`` says what those means divide by: by default this
pack's own counts; where a step has several packs, or several processes, those of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unigendet.model.idle import nothing_from
from unigendet.model.unigendet import ModelOutput, UniGenDet, latent_rows
from unigendet.ops import ImageGrids, LatentGrids, alignment_loss, flow_matching, flow_matching_loss
from unigendet.packing import PackedBatch


@dataclass(frozen=True)
class Counts:
    """What the means divide by: text tokens with loss, noised tokens, labelled samples, aligned tokens; and what there
    is to look at: latent tokens and ViT patches.
    """

    targets: float
    noised: float
    labels: float
    aligned: float
    latents: float = 0
    patches: float = 0

    @classmethod
    def of(cls, *batches: PackedBatch) -> Counts:
        """The counts of packs together."""
        counts = []
        for batch in batches:
            noised = batch.noised_tokens.shape[0]
            latents, patches = (
                batch.latent_positions.shape[0],
                0 if batch.vit_layout is None else batch.vit_rows.shape[0],
            )
            counts.append((batch.targets.shape[0], noised, batch.labels.shape[0], noised, latents, patches))
        return cls(*map(sum, zip(*counts, strict=True)))

    @property
    def inputs(self) -> tuple[str, ...]:
        """What there is to look at, of ``vit`` and ``latent``."""
        return ("vit",) * bool(self.patches) + ("latent",) * bool(self.latents)

    def numbers(self) -> Sequence[float]:
        """The counts in their order."""
        return astuple(self)


@dataclass(frozen=True)
class NoisedLatents:
    """Flow matching's input and target: ``tokens``, ``target`` [Nl, patch²·channels]; ``timesteps`` [latent images]."""

    tokens: Tensor | None
    target: Tensor | None
    timesteps: Tensor | None


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """s·t / (1 + (s − 1)·t): moves times towards 1 (noise) for shift s > 1."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(batch: PackedBatch, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """Times [latent images], float32: the shifted sigmoid of a normal number for noised images, 0 for clean ones."""
    u = torch.randn(len(batch.latent_sizes), generator=generator, device=batch.latents.device)
    return torch.where(batch.noised_images, shift_timesteps(u.sigmoid(), shift), 0.0)


def noise_latents(
    model: UniGenDet, batch: PackedBatch, timesteps: Tensor | None, noise: Tensor | None
) -> NoisedLatents:
    """Noise a pack's latents: ``timesteps`` [images], ``noise`` [Nl, patch²·channels]; both None without latents."""
    if not batch.latent_sizes:
        return NoisedLatents(None, None, None)
    latent = model.config.latent
    grids = LatentGrids.from_sizes(batch.latent_sizes)
    tokens, target = flow_matching(
        batch.latents,
        noise,
        timesteps,
        grids,
        patch_size=latent.patch_size,
        channels=latent.channels,
        backend=model.backend,
    )
    return NoisedLatents(tokens, target, timesteps)


def clean_latents(model: UniGenDet, batch: PackedBatch) -> NoisedLatents:
    """The latents of a pack as they are (t = 0)."""
    rows, device = batch.latent_positions.shape[0], batch.latents.device
    noise = torch.zeros(rows, model.config.latent.token_dim, dtype=batch.latents.dtype, device=device)
    return noise_latents(model, batch, torch.zeros(len(batch.latent_sizes), device=device), noise)


def mse_loss(
    model: UniGenDet, batch: PackedBatch, output: ModelOutput, latents: NoisedLatents, counts: Counts
) -> Tensor:
    """Flow-matching loss of the noised latent tokens. The batch must have at least one, which callers see to."""
    rows = output.places(latent_rows(batch).index_select(0, batch.noised_tokens))
    error = flow_matching_loss(
        model.velocity(output.hidden, rows), latents.target.index_select(0, batch.noised_tokens), backend=model.backend
    )
    return error.sum() / counts.noised


def text_loss(model: UniGenDet, batch: PackedBatch, output: ModelOutput, counts: Counts) -> Tensor:
    """Cross-entropy of the predicted tokens."""
    logits = model.text_logits(output.hidden, output.places(batch.target_rows))
    return _cross_entropy(logits, batch.targets) / counts.targets


def label_loss(model: UniGenDet, batch: PackedBatch, output: ModelOutput, counts: Counts) -> Tensor:
    """Cross-entropy of the real/fake head over the labelled samples."""
    logits = model.class_logits(output.hidden, output.places(batch.label_rows))
    return _cross_entropy(logits, batch.labels) / counts.labels


def gduf_losses(
    model: UniGenDet, batch: PackedBatch, output: ModelOutput, latents: NoisedLatents, counts: Counts | None = None
) -> dict[str, Tensor]:
    """The three terms ``mse``, ``ce``, ``label``, unweighted. A term that ``counts`` has nothing for is left out; one
    that only this pack has nothing for is 0, and its head's gradient zeros.
    """
    own = Counts.of(batch)
    counts = counts or own
    losses = {}
    if counts.noised:
        has = batch.noised_tokens.shape[0]
        losses["mse"] = mse_loss(model, batch, output, latents, counts) if has else nothing_from(model.llm2vae)
    if counts.targets:
        has = batch.targets.shape[0]
        losses["ce"] = text_loss(model, batch, output, counts) if has else nothing_from(model.lm_head)
    if counts.labels:
        has = batch.labels.shape[0]
        losses["label"] = label_loss(model, batch, output, counts) if has else nothing_from(model.class_head)
    if losses and not (own.noised or own.targets or own.labels):  # a backward pass through the layers all the same
        name = next(iter(losses))
        losses[name] = losses[name] + output.hidden[:0].sum()
    return losses


def align_loss(
    model: UniGenDet,
    batch: PackedBatch,
    student: Tensor,
    teacher: Tensor,
    grids: ImageGrids,
    counts: Counts | None = None,
    weight: float = 1.0,
) -> Tensor:
    """DIGA's alignment term: ``weight`` · (1 − mean cosine).

    Args:
        model: its φ projects the student.
        batch: generation samples; all their latent images are noised and in the order of ``grids``.
        student: output [T, hidden] of the student's layer, stream-major.
        teacher: [ΣN', hidden], the teacher's ViT patch features, image by image.
        grids: student and teacher grids, built once per pack.
        counts: what the mean divides by.
        weight: of the loss, inside the kernel, so that the incoming gradient is 1.
    """
    counts = counts or Counts.of(batch)
    rows = latent_rows(batch).index_select(0, batch.noised_tokens)
    projected = model.align(student, rows, batch.latent_sizes)
    return alignment_loss(projected, teacher, grids, weight=weight, normalizer=counts.aligned, backend=model.backend)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over the rows, in float32, or float64 for a model in float64."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
