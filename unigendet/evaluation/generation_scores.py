"""Scores of generated images against real ones: Fréchet distance, and agreement with the prompts where they are digits.

Two kinds of features. ``inception``: 2048 of the Inception network, for images of any kind. ``digits``: those of
``DigitJudge``, fitted to the quickstart's training digits and compared with its test digits; its SVM then also reads
whether a picture shows the digit that its prompt asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unigendet.config import check
from unigendet.data.quickstart import CAPTIONS, SIDE, WHITE, caption, load_digits, quantise
from unigendet.data.transforms import read_image
from unigendet.environment import environment
from unigendet.evaluation.generation import COMPONENTS, Agreement, DigitJudge, JudgeReference, frechet_distance
from unigendet.evaluation.inception import FEATURES, SHA256, InceptionFeatures
from unigendet.evaluation.results import plain
from unigendet.files import write_text

SCHEMA = 1  # of generation.json; rises when a key changes its meaning or goes
KIND = "unigendet generation scores"
FILE = "generation.json"
ENOUGH = 10  # images per feature; below, the distance's upward bias is large (it falls as 1 / images)


@dataclass(frozen=True)
class GenerationScores:
    """``frechet``: of ``images`` generated images to ``reference`` real ones, in ``dimensions`` features.

    ``agreement`` with the prompts, and what ``real`` digits score: None where the images are no digits.
    ``warnings``: why a number should be read with care.
    """

    features: str
    images: int
    reference: int
    dimensions: int
    frechet: float
    agreement: Agreement | None = None
    real: JudgeReference | None = None
    warnings: tuple[str, ...] = ()


def score_inception(
    images: Sequence[Path],
    reference: Sequence[Path],
    features: InceptionFeatures,
    *,
    batch_size: int = 8,
    done: Callable[[], None] | None = None,
) -> GenerationScores:
    """Score image files against real ones, at least two of each; ``done`` is called after every image."""
    for name, files in (("images", images), ("reference", reference)):
        check(len(files) >= 2, name, f"{len(files)} files", "two or more: a distance of distributions needs a spread")
    generated, real = (features(files, batch_size=batch_size, done=done) for files in (images, reference))
    warnings = _few(len(images), len(reference), FEATURES)
    if not features.published:
        warnings += (
            f"the Inception weights are not the published ones (their sha256 does not begin with {SHA256}): the "
            "distance is comparable with no published FID",
        )
    return GenerationScores(
        "inception", len(images), len(reference), FEATURES, frechet_distance(generated, real), warnings=warnings
    )


def score_digits(images: Sequence[Path], prompts: Sequence[str | None]) -> GenerationScores:
    """Score 8×8 pictures of digits, at least two; ``prompts``: of each, None where it is not known.

    Raises ValueError for a file that is no image or of another size; names it.
    """
    check(len(images) >= 2, "images", f"{len(images)} files", "two or more: a distance of distributions needs a spread")
    digits = load_digits()
    judge = DigitJudge(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
    levels = np.stack([_levels(path) for path in images])
    asked = digits_of(prompts)
    real = len(digits.test_labels)
    warnings = _few(len(images), real, COMPONENTS)
    agreement = None
    if None in asked:
        i = asked.index(None)
        what = "has no known prompt" if prompts[i] is None else f"has the prompt {prompts[i]!r}, which is no digit's"
        warnings += (f"no agreement with the prompts: {images[i]} {what}",)
    else:
        agreement = judge.agreement(levels, asked)
        counts = np.bincount(asked, minlength=10) / len(asked)
        if not np.array_equal(counts, np.bincount(digits.test_labels, minlength=10) / real):
            warnings += (
                "the digits do not come as often as in the reference, the test digits: the distance counts that too",
            )
    return GenerationScores(
        "digits", len(images), real, COMPONENTS, judge.frechet(levels), agreement, judge.reference(), warnings
    )


def digits_of(prompts: Sequence[str | None]) -> list[int | None]:
    """The digit that each prompt asks for, in any of the quickstart's phrasings; None for other prompts."""
    known = {caption(digit, phrasing): digit for digit in range(10) for phrasing in range(len(CAPTIONS))}
    return [None if prompt is None else known.get(" ".join(prompt.split())) for prompt in prompts]


def _levels(path: Path) -> NDArray[np.uint8]:
    image = read_image(path)
    if image.size != (SIDE, SIDE):
        raise ValueError(f"image {path} has {image.width}×{image.height} pixels; a digit must have {SIDE}×{SIDE}")
    return quantise(np.asarray(image.convert("L"), np.float64) * (WHITE / 255))


def _few(images: int, reference: int, dimensions: int) -> tuple[str, ...]:
    fewest = min(images, reference)
    if fewest >= ENOUGH * dimensions:
        return ()
    singular = ": fewer than features, so the covariance is singular" if fewest <= dimensions else ""
    return (
        f"the smaller set has {fewest:,} images for {dimensions:,} features{singular}; the Fréchet distance is biased "
        f"upwards with so few, so compare it only with one of as many images",
    )


def write_scores(folder: Path, scores: GenerationScores, settings: Mapping[str, Any]) -> Path:
    """Write ``generation.json``, schema 1, and return its path. The same scores and settings give the same bytes.

    ``schema, kind``; ``settings`` as given; ``environment`` {versions, platform, cpus, commit}; ``counts`` {images,
    reference, dimensions}; ``features``; ``frechet_distance``; ``agreement`` null or fields of ``Agreement``; ``real``
    null or fields of ``JudgeReference``; ``warnings`` [text].
    """
    data = {
        "schema": SCHEMA,
        "kind": KIND,
        "settings": settings,
        "environment": environment(),
        "features": scores.features,
        "counts": {"images": scores.images, "reference": scores.reference, "dimensions": scores.dimensions},
        "frechet_distance": scores.frechet,
        "agreement": scores.agreement,
        "real": scores.real,
        "warnings": scores.warnings,
    }
    path = folder / FILE
    text = json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")
    return path


def is_scores(path: Path) -> bool:
    """Whether a file is one that ``write_scores`` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == KIND
    except (ValueError, AttributeError, OSError):
        return False


def format_scores(scores: GenerationScores) -> str:
    """The numbers as lines of text."""
    rows = [
        ("generated images", f"{scores.images:,}"),
        ("real images", f"{scores.reference:,}"),
        ("Fréchet distance", f"{scores.frechet:.4g}  ({scores.features}, {scores.dimensions:,} features)"),
    ]
    if scores.agreement is not None:
        low, high = scores.agreement.interval
        rows.append(("prompt agreement", f"{scores.agreement.accuracy:.1%}  (95 % interval {low:.1%} to {high:.1%})"))
    if scores.real is not None:
        rows.append(("of real digits", f"Fréchet distance {scores.real.frechet_train_matched:.4g}, agreement "
                                       f"{scores.real.svm_accuracy:.1%}"))  # fmt: skip
    return "\n".join(f"{name:<18}{value}" for name, value in rows)
