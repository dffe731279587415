"""Scoring a detector on annotated images.

The detector is anything with the ``detect`` of ``unigendet.inference.pipeline.Pipeline``, so a training run can score
its unfinished model the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unigendet.data.datasets import DetectionRecord
from unigendet.evaluation.detection import DetectionOutcome, DetectionSummary, evaluate_detection

if TYPE_CHECKING:
    from PIL.Image import Image

    from unigendet.evaluation.explanations import SentenceEncoder
    from unigendet.inference.calibration import Calibration
    from unigendet.inference.detect import Detection


class Detector(Protocol):
    """Whatever judges images as ``Pipeline.detect`` does, one detection per image and in their order."""

    @property
    def has_head(self) -> bool:
        """Whether verdicts come from a real/fake head, so that no text is needed for them."""
        ...

    def default_answer(self, questions: Iterable[str | None], *, with_latent: bool = True) -> int:
        """The longest answer, in tokens, where ``max_new_tokens`` is None and these are asked."""
        ...

    def detect(self, images: Iterable[Any], **options: Any) -> Iterator[Detection]:
        """Judge images; ``options`` are ``question``, ``transform``, ``with_latent``, ``max_new_tokens``,
        ``batch_size``, ``calibration``, ``on_error``.
        """
        ...


def judge(
    detector: Detector,
    records: Sequence[DetectionRecord],
    *,
    root: Path | None = None,
    question: str | None = None,
    transform: Callable[[Image], Image] | None = None,
    with_latent: bool = True,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    calibration: Calibration | None = None,
) -> Iterator[DetectionOutcome]:
    """The detector's outcome on every record, in order and as they come; an unreadable image is one without a verdict.

    Args:
        detector: see ``Detector``.
        records: what to judge; a record's category is the outcome's group.
        root: images are named by their paths relative to it; None: by their paths.
        question: asked of every image; None asks each record's own, and where it has none, the detector's.
        transform: applied to the original images, before the model's views.
        with_latent: show the latent view too.
        max_new_tokens: longest answer; 0 asks for no explanation, so there is nothing to compare with the annotation;
            None leaves it to the detector.
        batch_size: images judged together.
        calibration: the pipeline's, for its verdicts.

    Raises:
        ValueError: of the detector, for an unfit option.
    """
    detections = detector.detect(
        [record.image for record in records],
        question=[record.question or None for record in records] if question is None else question,
        transform=transform,
        with_latent=with_latent,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        calibration=calibration,
        on_error="row",
    )
    for record, detection in zip(records, detections, strict=True):
        name = record.image if root is None else record.image.relative_to(root)
        yield _outcome(str(name), record, detection, record.answer if max_new_tokens != 0 else "")


def _outcome(name: str, record: DetectionRecord, detection: Detection, reference: str) -> DetectionOutcome:
    return DetectionOutcome(
        name=name,
        group=record.category,
        label=record.label,
        verdict=None if detection.real is None else int(detection.real),
        probability=detection.probability,
        logit=detection.logit,
        explanation=detection.explanation,
        reference=reference,
        error=detection.error,
    )


def summarise(outcomes: Sequence[DetectionOutcome], encoder: SentenceEncoder | None = None) -> DetectionSummary:
    """All metrics of ``outcomes``, with ``css`` if there is an encoder."""
    texts = [o.explanation for o in outcomes], [o.reference for o in outcomes]
    return evaluate_detection(outcomes, css=None if encoder is None else encoder.cosines(*texts))
