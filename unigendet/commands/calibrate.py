"""``unigendet calibrate``: probabilities and a threshold that fit labelled images, for ``unigendet detect``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.commands.common import (
    Commands,
    UserError,
    detector_options,
    load_pipeline,
    model_options,
    quiet_pillow,
    say,
)
from unigendet.commands.progress import Progress
from unigendet.commands.rows import check_out

if TYPE_CHECKING:
    from unigendet.data.datasets import DetectionRecord
    from unigendet.inference.calibration import Calibration
    from unigendet.inference.pipeline import Pipeline

EPILOG = """The file is for 'unigendet detect --calibration FILE'. It fits this model with its views, the question and
the latent view or its absence, and images like those it was fitted to; do not measure the detector on the same ones."""
ROWS = (("nll", "negative log-likelihood"), ("ece", "expected calibration error"), ("accuracy", "accuracy"),
        ("balanced_accuracy", "balanced accuracy"), ("false_alarms", "real images called fake"),
        ("missed_fakes", "fakes called real"), ("unsure", "share left unsure"),
        ("confident_accuracy", "accuracy of the others"))  # fmt: skip


def add(commands: Commands) -> None:
    """Describe the command."""
    asked = "the one it was trained with; of every image: annotations' own questions are not used"
    calibrate = commands.add(
        "calibrate", run, "Fit probabilities and threshold to labelled images.", model_options(),
        detector_options(asked, verdicts=False), epilog=EPILOG,
    )  # fmt: skip
    calibrate.add_argument("data", type=Path, metavar="DATA",
                           help="annotation file in FakeClue's format, or a folder with real/ and fake/")  # fmt: skip
    calibrate.add_argument("--image-root", type=Path, metavar="FOLDER",
                           help="what an annotation file's paths are relative to (default: its folder)")  # fmt: skip
    calibrate.add_argument("--out", type=Path, default=Path("calibration.json"), metavar="FILE",
                           help="the calibration (default: %(default)s)")  # fmt: skip
    calibrate.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    calibrate.add_argument("--max-false-alarms", type=float, metavar="RATE",
                           help="largest share of real images called fake (default: as is best)")  # fmt: skip
    calibrate.add_argument("--confident-accuracy", type=float, metavar="SHARE",
                           help="leave as few unsure as lets this share of the others be right")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.data.labelled import check_present, read_labelled
    from unigendet.evaluation.calibration import check_request, fit_calibration
    from unigendet.inference.model_files import folder_config

    records = read_labelled(options.data, image_root=options.image_root, root_option="--image-root")
    check_present(records)
    targets = {"max_false_alarms": options.max_false_alarms, "confident_accuracy": options.confident_accuracy}
    check_request([record.label for record in records], **targets)
    check_out(options.out, options.overwrite)
    if not folder_config(options.model).class_head:
        raise UserError(f"the model {options.model} has no real/fake head; there is nothing to calibrate")
    pipeline = load_pipeline(options)
    quiet_pillow()
    logits, labels = _judge(options, pipeline, records)
    fitted = fit_calibration(logits, labels, **targets)
    fitted = _described(options, pipeline, fitted, len(records) - len(labels))
    fitted.save(options.out)
    print("\n".join(_table(fitted)))
    if not fitted.measured["temperature_found"]:
        why = "these images determine no temperature (the logits do not tell them apart); it stays 1"
        say(options, why)
    print(f"The calibration: {options.out}")
    return 0


def _judge(
    options: argparse.Namespace, pipeline: Pipeline, records: list[DetectionRecord]
) -> tuple[list[float], list[int]]:
    """Logits and labels of the images that can be judged; the others are named on standard error."""
    logits, labels, failed = [], [], []
    detections = pipeline.detect(
        [record.image for record in records], question=options.question, with_latent=not options.no_latent,
        max_new_tokens=0, batch_size=options.batch_size, on_error="row",
    )  # fmt: skip
    with Progress(options.label, len(records)) as progress:
        for record, one in zip(records, detections, strict=True):
            if one.error is None:
                logits.append(one.logit)
                labels.append(record.label)
            else:
                failed.append(one.error)
            progress.advance()
    for error in failed:
        say(options, f"left out: {error}")
    return logits, labels


def _described(options: argparse.Namespace, pipeline: Pipeline, fitted: Calibration, left_out: int) -> Calibration:
    """With what it is for, and where it comes from."""
    from unigendet import __version__
    from unigendet.inference.calibration import model_fingerprint

    source = {
        "data": str(options.data),
        "model": str(options.model),
        "left_out": left_out,
        "max_false_alarms": options.max_false_alarms,
        "confident_accuracy": options.confident_accuracy,
        "unigendet": __version__,
    }
    return dataclasses.replace(
        fitted,
        model=model_fingerprint(pipeline.model, pipeline.data),
        question=pipeline.data.question if options.question is None else options.question,
        with_latent=not options.no_latent,
        measured=source | fitted.measured,
    )


def _table(fitted: Calibration) -> list[str]:
    measured: dict[str, Any] = fitted.measured
    before, after = measured["before"], measured["after"]
    lines = [
        f"{measured['real']} real and {measured['fake']} fake images of {measured['data']}",
        "",
        f"{'':28}{'before':>10}{'after':>10}",
        f"{'temperature':28}{1:10.4f}{fitted.temperature:10.4f}",
        f"{'threshold':28}{0.5:10.4f}{fitted.threshold:10.4f}",
    ]
    for name, text in ROWS[: None if fitted.unsure else -2]:
        lines.append(
            f"{text:28}" + "".join(f"{'-' if v is None else f'{v:.4f}':>10}" for v in (before[name], after[name]))
        )
    if fitted.unsure:
        lines.append(f"unsure between {fitted.unsure[0]:.4f} and {fitted.unsure[1]:.4f}")
    return [*lines, ""]
