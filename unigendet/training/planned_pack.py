"""The pack that a run is planned with, since what its images and texts are like is known only to its data.

Images are square and as small as the latent view allows; they have the most texts per token, and so the most logits.
Texts have the lengths of ``Texts``. Samples are drawn in proportion to the files' weights until the next would pass
``loader.max_tokens``; a text without loss fills what is left, so that the plan is one of a full pack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from unigendet.config import ImageConfig, ModelConfig, check
from unigendet.data.transforms import resized_size
from unigendet.packing import LatentImage, PackedBatch, Sample, Text, VitImage, pack, sample_length
from unigendet.training.config import TrainConfig


@dataclass(frozen=True)
class Texts:
    """Tokens of each kind of text, without their delimiters."""

    question: int = 40
    answer: int = 120
    caption: int = 44
    teacher_prompt: int = 110

    def shortened(self, share: float) -> Texts:
        """All of them ``share`` times as long, but not empty."""
        return Texts(**{name: max(1, int(n * share)) for name, n in dataclasses.asdict(self).items()})


@dataclass(frozen=True)
class PlannedPack:
    """``student``: what the losses belong to; ``teacher``: DIGA's other pack. ``side``: of every image, in pixels."""

    student: PackedBatch
    teacher: PackedBatch | None
    detection: int
    generation: int
    side: int
    texts: Texts

    def contents(self) -> str:
        """What the pack holds."""
        kinds = [f"{self.detection} detection samples"] * bool(self.detection)
        kinds += [f"{self.generation} generation samples"] * bool(self.generation)
        return f"{' and '.join(kinds) or 'text'} with images of {self.side}×{self.side} pixels"

    def lengths(self) -> str:
        """Tokens of its texts."""
        texts = {"question": self.texts.question, "answer": self.texts.answer} if self.detection else {}
        texts |= {"caption": self.texts.caption} if self.generation else {}
        texts |= {"teacher's prompt": self.texts.teacher_prompt} if self.teacher is not None else {}
        return ", ".join(f"{name} {count} tokens" for name, count in texts.items())


def planned_pack(config: TrainConfig, model: ModelConfig, texts: Texts | None = None) -> PlannedPack:
    """The pack of one process and forward pass.

    Raises ValueError if ``loader.max_sample_tokens`` has no room for a sample with the smallest image.
    """
    views, limit = config.datasets.views, config.loader.max_sample_tokens
    side = views.latent_view.min_size
    latent = _latent(model, _resized(side, views.latent_view))
    pixels = torch.zeros(()).expand(model.vision.num_channels, *[_resized(side, views.vit_view)] * 2)
    texts = _fitting(texts or Texts(), model, limit, latent, pixels, config)
    share = _detection_share(config)

    def detection() -> Sample:
        images = (LatentImage(latent), VitImage(pixels)) if config.datasets.detection_latents else (VitImage(pixels),)
        return Sample((*images, _text(texts.question), _text(texts.answer, loss=True)), label=1)

    def generation() -> Sample:
        return Sample((_text(texts.caption), LatentImage(latent, noised=True)))

    samples, counts = _fill(detection, generation, share, config.loader.max_tokens, model)
    teacher = None
    if config.stage == "diga" and config.losses.diga:
        read = Sample((LatentImage(latent), _text(texts.teacher_prompt + texts.caption), VitImage(pixels)))
        teacher = pack([read] * counts[1], model)
    return PlannedPack(pack(samples, model), teacher, *counts, side, texts)


def _detection_share(config: TrainConfig) -> float:
    """How much of the samples is for detection; GDUF without any files: half."""
    if config.stage == "diga":
        return 0.0
    detection, captions = (
        sum(f.weight for f in files) for files in (config.datasets.detection, config.datasets.captions)
    )
    return detection / (detection + captions) if detection + captions else 0.5


def _resized(side: int, view: ImageConfig) -> int:
    return resized_size(side, side, **dataclasses.asdict(view))[0]


def _latent(model: ModelConfig, side: int) -> torch.Tensor:
    return torch.zeros(()).expand(model.latent.channels, *[side // model.latent.downsample] * 2)


def _text(tokens: int, loss: bool = False) -> Text:
    return Text((0,) * tokens, loss=loss)


def _fitting(
    texts: Texts, model: ModelConfig, limit: int, latent: torch.Tensor, pixels: torch.Tensor, config: TrainConfig
) -> Texts:
    """``texts``, shortened where a sample would be longer than ``limit`` or its positions not the model's."""
    diga = config.stage == "diga"
    images = [] if diga else [VitImage(pixels)]
    images += [LatentImage(latent)] * (diga or config.datasets.detection_latents)
    taken = sample_length(Sample(tuple(images)), model) + 4  # and the delimiters of two texts
    check(limit - taken >= 2, "loader.max_sample_tokens", limit, f"at least {taken + 2}, for the smallest image")
    trained = texts.caption if diga else max(texts.question + texts.answer, texts.caption)
    longest = max(trained, texts.teacher_prompt + texts.caption)  # positions run on over the texts
    return texts.shortened(min(1.0, (limit - taken) / trained, (model.max_position - 8) / longest))


def _fill(
    detection: Callable[[], Sample],
    generation: Callable[[], Sample],
    share: float,
    limit: int,
    model: ModelConfig,
) -> tuple[list[Sample], tuple[int, int]]:
    """Samples of both kinds in their proportion, and how many of each; the last one is a text that fills the pack."""
    samples, counts, left = [], [0, 0], limit
    while True:
        is_detection = counts[0] < share * (sum(counts) + 1)
        sample = detection() if is_detection else generation()
        if sample_length(sample, model) > left:
            break
        samples.append(sample)
        counts[not is_detection] += 1
        left -= sample_length(sample, model)
    while left > 2:
        filler = min(left, model.max_position)
        samples.append(Sample((_text(filler - 2),)))
        left -= filler
    return samples, (counts[0], counts[1])
