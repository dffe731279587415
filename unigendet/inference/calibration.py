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

from unigendet.config import check
from unigendet.files import write_text
from unigendet.model.unigendet import UniGenDet

SCHEMA = "unigendet-calibration/1"


@dataclass(frozen=True)
class Calibration:
    """How a logit (that of real less that of fake) becomes a probability and a verdict. The defaults change nothing.

    ``temperature``: the probability of real is sigmoid(logit / temperature). ``threshold``: from this probability on,
    the verdict is real. ``unsure`` (low, high): strictly between the two there is no verdict; the threshold lies in it.
    ``head``: the model's ``head_fingerprint``, ``question`` and ``with_latent``: what the images were judged by when
    this was fitted, None for anything. ``measured``: what a file tells of the fit beside that; not used.
    """

    temperature: float = 1.0
    threshold: float = 0.5
    unsure: tuple[float, float] | None = None
    head: str | None = None
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
        for name, kind in (("head", str), ("question", str), ("with_latent", bool)):
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

    def check_use(self, model: UniGenDet, question: str, with_latent: bool) -> None:
        """Raise ValueError unless ``model`` has a head and is used as it was when this was fitted."""
        if model.class_head is None:
            raise ValueError("the model has no real/fake head, only its words; there is no probability to calibrate")
        again = "; calibrate anew for this, with 'unigendet calibrate'"
        if self.head is not None and self.head != head_fingerprint(model):
            raise ValueError(f"the calibration was fitted to another model: its real/fake head differs{again}")
        if self.question is not None and self.question != question:
            raise ValueError(f"the calibration was fitted with the question {self.question!r}, not {question!r}{again}")
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


def head_fingerprint(model: UniGenDet) -> str:
    """A short hash of the real/fake head's weights, the same for a model in float32 and in bfloat16.

    Any training of the detector changes it. Raises ValueError for a model without a head.
    """
    if model.class_head is None:
        raise ValueError("the model has no real/fake head")
    digest = hashlib.sha256()
    for name, weight in sorted(model.class_head.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
