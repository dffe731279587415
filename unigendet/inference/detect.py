"""Detection: is an image real or generated, and why; many images at a time.

The prefix is ``[latent image, clean] [ViT image] [question]``; without the latent image there is no symbiotic
attention, so it is there by default. The answer is decoded from its first token: the real/fake head reads that token's
final hidden state, and the text follows, greedy or sampled, until its end. All images are samples of one pack, decoded
together over one cache.
Source: paper section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigendet.config import ModelConfig, check
from unigendet.model.losses import clean_latents
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Segment, Text, VitImage, pack, sample_length


@dataclass(frozen=True)
class DetectionRequest:
    """One image: its ViT view, the question, and its latent view (None: no symbiotic attention).

    Raises ValueError for a noised latent view.
    """

    vit: VitImage
    question: Text
    latent: LatentImage | None = None
    name: str = ""

    def __post_init__(self) -> None:
        noised = self.latent is not None and self.latent.noised
        check(not noised, "latent", "a noised latent image", "a clean one or None")

    @property
    def prefix(self) -> tuple[Segment, ...]:
        """The segments before the answer."""
        return (self.vit, self.question) if self.latent is None else (self.latent, self.vit, self.question)


@dataclass
class DetectionOutput:
    """``class_logits`` [2] of (fake, real), None without a head; ``ids``: the answer's tokens after bos, without eos;
    ``ended``: whether eos was reached.
    """

    class_logits: Tensor | None
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def logit(self) -> float | None:
        """The head's logit of real less that of fake; its sigmoid is the probability that the image is real."""
        if self.class_logits is None:
            return None
        fake, real = self.class_logits.tolist()
        return real - fake


@dataclass(frozen=True)
class Detection:
    """The verdict on one image.

    ``real``: the verdict, by the real/fake head if the model has one, otherwise by the answer's first sentence; None if
    neither decides. ``probability``: of being real, by the head, calibrated if there is a calibration; ``logit``: the
    head's logit of real less that of fake, never calibrated. ``explanation``: the whole answer. ``name``: its path.
    ``error``: why there is no verdict, for a picture that could not be judged. ``unsure``: within the calibration's
    unsure band.
    """

    name: str
    real: bool | None
    probability: float | None
    explanation: str
    error: str | None = None
    logit: float | None = None
    unsure: bool = False

    @property
    def verdict(self) -> str:
        """``real``, ``fake``, ``unsure``, ``undecided`` (no head, and the text says neither) or ``error``."""
        if self.error is not None:
            return "error"
        if self.real is None:
            return "unsure" if self.unsure else "undecided"
        return "real" if self.real else "fake"


def answer_room(config: ModelConfig, question: Text, *, with_latent: bool = True) -> int:
    """The longest answer, in tokens after bos, that the model's positions leave after the images and ``question``.

    Negative where there is no room for the question itself.
    """
    images = 1 + with_latent
    # An image is one position; the question has bos and eos, the answer bos; its last token is never read.
    return config.max_position - images - (len(question.ids) + 2)


@torch.no_grad()  # not inference_mode: its results could not be trained on or changed in place
def detect_packed(
    model: UniGenDet,
    requests: Sequence[DetectionRequest],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    all_ended: Callable[[bool], bool] | None = None,
) -> list[DetectionOutput]:
    """Judge images and decode the answers.

    Args:
        model: on any device.
        requests: at least one; all are decoded together. With ``all_ended`` there may be none.
        max_new_tokens: longest answer, in tokens after bos; 0 asks for the head's verdict alone.
        temperature: 0 decodes greedily, otherwise tokens are sampled from softmax(logits / temperature).
        generator: for the sampling, on the model's device.
        all_ended: for a model of which several processes hold a part each, so that every pass is made by all of them or
            by none, whatever they were asked. Says, asked by all after every pass that decodes, whether its argument is
            true in all; as long as it is not, a process whose answers have ended goes on for nothing.

    Returns:
        One output per request.

    Raises:
        ValueError: no requests, a negative argument, or answers that could reach beyond the model's positions.
    """
    if len(requests) == 0 and all_ended is None:
        raise ValueError("requests is empty; there must be at least one")
    for name, value in (("max_new_tokens", max_new_tokens), ("temperature", temperature)):
        check(value >= 0, name, value, "at least 0")
    config, asked = model.config, len(requests)
    requests = requests or [_nothing_to_see(config)]
    outputs = [DetectionOutput(None, ended=asked == 0) for _ in requests]
    samples = [_answering(request, []) for request in requests]
    lengths = [sample_length(sample, config) for sample in samples]
    # The last token of an answer is never read by another, hence no row for it.
    capacity = [length + max(0, max_new_tokens - 1) for length in lengths]
    cache = model.new_cache(capacity)
    for step in range(max(1, max_new_tokens)):
        batch = pack(samples, config, cached=cache.lengths, capacity=capacity).to(model.device)
        if step == 0:  # now, not in the middle of an answer that happens to be long
            room = config.max_position - batch.layout.max_position
            check(max_new_tokens <= room, "max_new_tokens", max_new_tokens, f"at most {room} after these prefixes")
        latents = clean_latents(model, batch)
        hidden = model(batch, latent_tokens=latents.tokens, timesteps=latents.timesteps, cache=cache).hidden
        if step == 0 and model.class_head is not None:
            logits = model.class_logits(hidden, batch.last_rows)
            for output, row in zip(outputs, logits, strict=True):
                output.class_logits = row
        if max_new_tokens == 0:
            break
        _extend(model, hidden, batch.last_rows, outputs, temperature, generator)
        ended = all(output.ended for output in outputs)
        if ended if all_ended is None else all_ended(ended):
            break
        cache.commit(_cached(lengths, outputs))
        samples = [_answering(request, output.ids) for request, output in zip(requests, outputs, strict=True)]
    return outputs[:asked]


def _nothing_to_see(config: ModelConfig) -> DetectionRequest:
    """The smallest request: one black patch and no question."""
    vision = config.vision
    return DetectionRequest(VitImage(torch.zeros(vision.num_channels, vision.patch_size, vision.patch_size)), Text(()))


def _answering(request: DetectionRequest, ids: list[int]) -> Sample:
    return Sample((*request.prefix, Text(tuple(ids), eos=False)), name=request.name)


def _cached(lengths: Sequence[int], outputs: Sequence[DetectionOutput]) -> list[int]:
    """How many tokens of every sample the next pass finds cached; ``lengths``: those of its prefix and bos.

    An ended answer has all its tokens cached and takes no further part. Where none goes on, the first one's last token
    is computed once more, for a pass takes at least one.
    """
    cached = [length + len(o.ids) - (not o.ended) for length, o in zip(lengths, outputs, strict=True)]
    cached[0] -= all(output.ended for output in outputs)
    return cached


def _extend(
    model: UniGenDet,
    hidden: Tensor,
    last_rows: Tensor,
    outputs: Sequence[DetectionOutput],
    temperature: float,
    generator: torch.Generator | None,
) -> None:
    """Choose the next token of every answer that goes on."""
    going = [i for i, output in enumerate(outputs) if not output.ended]
    if not going:
        return
    rows = last_rows[torch.tensor(going, device=model.device)]
    chosen = _choose(model.text_logits(hidden, rows), temperature, generator)
    for i, token in zip(going, chosen, strict=True):
        if token == model.config.special_tokens.eos:
            outputs[i].ended = True
        else:
            outputs[i].ids.append(token)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> list[int]:
    if temperature == 0:
        return logits.argmax(-1).tolist()
    weights = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()
