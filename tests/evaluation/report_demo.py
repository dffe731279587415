"""A report from made-up results: the input of the report's tests, and a page to look at.

``python tests/evaluation/report_demo.py FOLDER`` writes it. Nothing in it was measured on a model.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from unigendet.evaluation.detection import DetectionOutcome, evaluate_detection
from unigendet.evaluation.generation import DigitJudge
from unigendet.evaluation.quickstart_report import write_report
from unigendet.evaluation.results import Aim, ImageGrid, RunResults, choose_examples

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROLES = {"Gaussian mixture": "seen in training", "kernel density": "held out", "UniGenDet": "the model's own samples"}
ENVIRONMENT = {"versions": {"python": "3.x", "torch": "2.x"}, "platform": "demo", "commit": "0123456789abcdef+changes"}


def demo_results(seed=0):
    """RunResults of real digits damaged in various ways, with a detector that guesses well but not always."""
    rng = np.random.default_rng(seed)
    data = load_digits()
    train, test, train_digits, test_digits = train_test_split(
        data.images, data.target, test_size=397, stratify=data.target, random_state=0
    )
    judge = DigitJudge(train, train_digits, test, test_digits)

    def damaged(strength):
        picks = np.concatenate([rng.choice(np.flatnonzero(train_digits == d), 1) for d in test_digits])
        return np.clip(train[picks] + rng.normal(0, strength, (len(picks), 8, 8)), 0, 16)

    before, after, mixture, kernel = damaged(3.5), damaged(1.8), damaged(2.2), damaged(2.8)
    outcomes, pictures = _verdicts(
        rng, {"real": test, "Gaussian mixture": mixture, "kernel density": kernel, "UniGenDet": after}
    )
    detection = evaluate_detection(outcomes)
    agreement = {"before DIGA": judge.agreement(before, test_digits), "after DIGA": judge.agreement(after, test_digits)}
    images = {"before DIGA": before, "after DIGA": after, "Gaussian mixture": mixture, "kernel density": kernel}
    frechet = {name: judge.frechet(value) for name, value in images.items()}
    rows = tuple(f"a handwritten digit {word}" for word in WORDS)
    grids = {"before DIGA": before, "after DIGA": after, "real digits": test}
    return RunResults(
        title="UniGenDet demo report",
        summary="Made-up results that show the layout of this page. Nothing here was measured on a model.",
        seed=seed,
        aims=(
            Aim(
                "Detection accuracy, held-out images", detection.overall.accuracy, 0.9, meaning="Right verdicts of all."
            ),
            Aim(
                "Prompt agreement",
                agreement["after DIGA"].accuracy,
                0.99,
                meaning="Digits that show what was asked for.",
            ),
            Aim(
                "Fréchet distance",
                frechet["after DIGA"],
                40,
                higher_is_better=False,
                kind="number",
                meaning="Lower is closer.",
            ),
            Aim(
                "Explanations, ROUGE-L",
                detection.overall.rouge_l,
                meaning="Words shared with the annotation, in order.",
            ),
            Aim("Time", 161.4, 180, higher_is_better=False, kind="seconds"),
            Aim("Peak memory", None, 2, higher_is_better=False, kind="number"),
        ),
        curves=_curves(rng),
        grids=tuple(
            ImageGrid(name, rows, np.stack([value[test_digits == d][:8] for d in range(10)]))
            for name, value in grids.items()
        ),
        detection=detection,
        roles={**ROLES, "real": "held-out digits"},
        examples=choose_examples(outcomes, pictures),
        agreement=agreement,
        frechet=frechet,
        reference=judge.reference(),
        settings={
            "model": {"hidden_size": 128, "num_layers": 4},
            "gduf": {"steps": 900, "lr": 1e-3},
            "note": "<b>plain</b>",
        },
        durations={"training": 138.2, "evaluation": 23.2},
        environment=ENVIRONMENT,
    )


def _verdicts(rng, groups):
    outcomes, pictures = [], {}
    for group, images in groups.items():
        label = int(group == "real")
        for i, image in enumerate(images[:120]):
            right = rng.random() < (0.8 if group == "kernel density" else 0.93)
            verdict = None if rng.random() < 0.02 else (label if right else 1 - label)
            probability = rng.beta(6, 2) if (verdict or 0) else rng.beta(2, 6)
            traits = ["The strokes are firm", "their edges are clean", "the ground is empty"]
            if not label:
                traits = ["There is faint speckle on the ground", "the edges are soft", "one stroke is broken & thin"]
            reference = f"This is a {'real' if label else 'fake'} image. {', '.join(traits)}."
            said = (
                "I cannot <tell>."
                if verdict is None
                else f"This is a {'real' if verdict else 'fake'} image. {', '.join(traits[:2])}."
            )
            name = f"{group}/{i:03d}.png"
            pictures[name] = image
            outcomes.append(DetectionOutcome(name, group, label, verdict, probability, said, reference))
    return outcomes, pictures


def _curves(rng):
    def curve(steps, start, end):
        fall = end + (start - end) * np.exp(-np.arange(steps) / (steps / 6))
        return fall * np.exp(rng.normal(0, 0.08, steps))

    gduf = zip(curve(900, 6.5, 0.6), curve(900, 1.9, 0.35), curve(900, 6.2, 0.2), curve(900, 0.7, 0.25), strict=True)
    diga = zip(curve(300, 0.6, 0.45), curve(300, 0.36, 0.32), curve(300, 0.9, 0.25), strict=True)
    return {
        "GDUF": [
            dict(zip(("step", "loss", "mse", "ce", "label"), (i + 1, *map(float, p)), strict=True))
            for i, p in enumerate(gduf)
        ],
        "DIGA": [
            dict(zip(("step", "loss", "mse", "alignment"), (i + 1, *map(float, p)), strict=True))
            for i, p in enumerate(diga)
        ],
    }


if __name__ == "__main__":
    print(write_report(sys.argv[1], demo_results()))
