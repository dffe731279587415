"""From the real/fake head's logits to probabilities that can be believed, and from those to verdicts.

``unigendet.evaluation.calibration`` fits a ``Calibration`` to labelled images; here it is applied, saved and loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigendet.config import DataConfig, check
from unigendet.files import write_text
from unigendet.model.unigendet import UniGenDet

SCHEMA = "unigendet-calibration/2"
UNREAD = ("align_head.", "lm_head.", "llm2vae.")  # parameters no verdict depends on
SAMPLES = 1024  # of each parameter, that its part of a fingerprint is made of


@dataclass(frozen=True)
class Calibration:
    """How a logit (that of real less that of fake) becomes a probability and a verdict. The defaults change nothing.

    ``temperature``: the probability of real is sigmoid(logit / temperature). ``threshold``: from this probability on,
    the verdict is real. ``unsure`` (low, high): strictly between the two there is no verdict; the threshold lies in it.
    ``model``: the ``model_fingerprint``, ``question`` and ``with_latent``: what the images were judged by when this was
    fitted, None for anything. ``measured``: what a file tells of the fit beside that; not used.
    """

    temperature: float = 1.0
    threshold: float = 0.5
    unsure: tuple[float, float] | None = None
    model: str | None = None
    question: str | None = None
    with_latent: bool | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        temperature, threshold = self.temperature, self.threshold
        check(_is_number(temperature) and temperature > 0, "temperature", temperature, "a positive number")
        check(_is_number(threshold) and 0 <= threshold <= 1, "threshold", threshold, "a probability from 0 to 1")
        if self.unsure is not None:
            fits = len(self.unsure) == 2 and all(map(_is_number, self.unsure))
            check(fits and 0 <= self.unsure[0] <= self.unsure[1] <= 1, "unsure", self.unsure, "0 ≤ low ≤ high ≤ 1")
            low, high = self.unsure
            check(low <= threshold <= high, "threshold", threshold, f"within the unsure band, from {low} to {high}")
        for name, kind in (("model", str), ("question", str), ("with_latent", bool)):
            value = getattr(self, name)
            check(value is None or isinstance(value, kind), name, value, f"a {kind.__name__} or None")
        check(isinstance(self.measured, dict), "measured", self.measured, "a mapping")

    def probability(self, logit: float) -> float:
        """Probability of real."""
        scaled = logit / self.temperature
        odds = math.exp(-abs(scaled))  # at most 1, so nothing overflows
        return (1.0 if scaled >= 0 else odds) / (1.0 + odds)

    def verdict(self, probability: float) -> bool | None:
        """Whether the image is real; None within the unsure band."""
        if self.unsure is not None and self.unsure[0] < probability < self.unsure[1]:
            return None
        return probability >= self.threshold

    def check_use(self, model: UniGenDet, data: DataConfig, question: str, with_latent: bool) -> None:
        """Raise ValueError unless ``model`` has a head and is used, with its views, as when this was fitted."""
        if model.class_head is None:
            raise ValueError("the model has no real/fake head, only its words; there is no probability to calibrate")
        again = "; calibrate anew for this, with 'unigendet calibrate'"
        if self.model is not None and self.model != model_fingerprint(model, data):
            raise ValueError(f"the calibration was fitted to another model: its weights or its views differ{again}")
        if self.question is not None and self.question != question:
            other = f"the calibration was fitted with the question {self.question!r}, not {question!r}"
            raise ValueError(f"{other}; ask that question (--question), or calibrate anew")
        if self.with_latent is not None and self.with_latent != with_latent:
            views = "with" if self.with_latent else "without"
            raise ValueError(f"the calibration was fitted {views} the latent view{again}")

    def save(self, file: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_text(file, json.dumps({"schema": SCHEMA} | dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no calibration, or one with a missing, unknown or unfit entry; names the file.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"calibration {file} does not exist; 'unigendet calibrate' makes one")
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"calibration {file} is not JSON: {error}") from error
        schema = entries.get("schema") if isinstance(entries, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"calibration {file} has the schema {schema!r}; it must be {SCHEMA!r}")
        names = {f.name for f in dataclasses.fields(cls)} | {"schema"}
        if entries.keys() != names:
            odd = sorted(entries.keys() ^ names)
            raise ValueError(f"calibration {file} lacks or has beyond its entries: {', '.join(odd)}")
        del entries["schema"]
        if isinstance(entries["unsure"], list):
            entries["unsure"] = tuple(entries["unsure"])
        try:
            return cls(**entries)
        except (ValueError, TypeError) as error:
            raise ValueError(f"calibration {file}: {error}") from error


def model_fingerprint(model: UniGenDet, data: DataConfig) -> str:
    """A short hash of what a verdict depends on besides the question, the same in float32 and in bfloat16.

    Of every parameter that the real/fake head's logits depend on (both streams of the decoder: the detector's latent
    view runs through that of generation), the name, the shape and ``SAMPLES`` values at fixed, evenly spread places,
    in bfloat16; and the two views of an image. Any training changes it, of the detector (GDUF) or of the generator
    (DIGA); a change of a few single values may not. Raises ValueError for a model without a head.
    """
    if model.class_head is None:
        raise ValueError("the model has no real/fake head")
    views = {"latent_view": dataclasses.asdict(data.latent_view), "vit_view": dataclasses.asdict(data.vit_view)}
    digest = hashlib.sha256(json.dumps(views, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        if name.startswith(UNREAD):
            continue
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(_sampled(weight).cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(weight: Tensor) -> Tensor:
    """At most ``SAMPLES`` values of a tensor, flattened, evenly spread from the first to the last."""
    flat = weight.detach().flatten()
    if flat.numel() <= SAMPLES:
        return flat
    places = torch.arange(SAMPLES, device=flat.device) * (flat.numel() - 1) // (SAMPLES - 1)
    return flat[places]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
