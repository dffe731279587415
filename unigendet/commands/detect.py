"""``unigendet detect``: verdicts on pictures."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.commands.common import Commands, detector_options, load_pipeline, model_options, quiet_pillow, say
from unigendet.commands.inputs import find_pictures
from unigendet.commands.progress import Progress
from unigendet.commands.rows import FORMATS, RowWriter, check_out, format_of

if TYPE_CHECKING:
    from unigendet.inference.calibration import Calibration
    from unigendet.inference.detect import Detection

COLUMNS = ("path", "verdict", "probability_real", "explanation", "error")
EPILOG = """One row per picture, in the order given: its path, the verdict (real, fake, unsure, undecided or error), the
probability of being real, the model's explanation, and why there is no verdict. On a terminal a table; otherwise a
line per row with tabs between; --format for programs. Exit code: 0 all pictures were judged, 1 some rows are errors or
nothing could be done."""


def add(commands: Commands) -> None:
    """Describe the command."""
    detect = commands.add(
        "detect", run, "Tell real images from generated ones; one row per picture.", model_options(),
        detector_options("the one it was trained with"), epilog=EPILOG,
    )  # fmt: skip
    detect.set_defaults(wrong=detect.error)
    detect.add_argument(
        "paths", nargs="*", metavar="PATH", help="files, folders (searched recursively) or patterns: 'shots/**/*.png'"
    )
    detect.add_argument("--list", metavar="FILE", help="also the files named in FILE, one per line; - = standard input")
    detect.add_argument("--format", choices=FORMATS, help="default: as --out ends (.jsonl, .csv), otherwise table")
    detect.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, each as soon as it is there")
    verdict = detect.add_argument_group("the verdict")
    verdict.add_argument("--threshold", type=float, metavar="P",
                         help="real from this probability on (default: the calibration's, or 0.5); alone, it drops "
                              "a calibration's unsure band that it lies outside of")  # fmt: skip
    verdict.add_argument("--unsure", type=float, nargs=2, metavar=("LOW", "HIGH"),
                         help="no verdict between these two (default: the calibration's, or none); alone, it moves "
                              "a threshold that lies outside to its middle, in logits")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    if not options.paths and options.list is None:
        options.wrong("name pictures: PATH, --list, or both")
    paths = find_pictures(options.paths, options.list)
    calibration = _calibration(options)
    check_out(options.out)
    pipeline = load_pipeline(options)
    quiet_pillow()
    detections = pipeline.detect(
        paths, question=options.question, with_latent=not options.no_latent, max_new_tokens=options.max_tokens,
        batch_size=options.batch_size, calibration=calibration, on_error="row",
    )  # fmt: skip
    failed = 0
    heads = {"path": min(max(map(len, paths)), 40), "verdict": 9, "p(real)": 7}
    writer = RowWriter(COLUMNS, heads, format_of(options.format, options.out), options.out)
    progress = Progress(options.label, len(paths))
    try:
        with progress, writer:
            for one in detections:
                writer.write(_row(one))
                progress.advance()
                failed += one.error is not None
    except BrokenPipeError:
        raise
    except BaseException:
        if progress.done:
            kept = "" if options.out is None else f", in {options.out}"
            say(options, f"{progress.done} of {len(paths)} rows were written{kept}")
        raise
    if failed:
        were = "was not judged; its row says why" if failed == 1 else "were not judged; their rows say why"
        say(options, f"{failed} of {len(paths)} images {were}")
    return 1 if failed else 0


def _calibration(options: argparse.Namespace) -> Calibration | None:
    from unigendet.inference.calibration import Calibration

    if options.calibration is None and options.threshold is None and options.unsure is None:
        return None
    calibration = Calibration() if options.calibration is None else Calibration.load(options.calibration)
    threshold, unsure = calibration.threshold, calibration.unsure
    if options.threshold is not None:
        threshold = options.threshold
    if options.unsure is not None:
        unsure = tuple(options.unsure)
    # What the command line says wins over what it does not say; where it says both, they must fit.
    if unsure is not None and not unsure[0] <= threshold <= unsure[1]:
        low, high = unsure
        if options.unsure is None and 0 <= threshold <= 1:
            unsure = None
            band = f"the unsure band of {options.calibration}, from {low:g} to {high:g}"
            say(options, f"--threshold {threshold:g} lies outside {band}; there is no band")
        elif options.threshold is None and 0 <= low <= high <= 1:
            before, threshold = threshold, _middle(low, high)
            instead = f"it is {threshold:g} instead"
            say(options, f"the threshold {before:g} lies outside --unsure {low:g} {high:g}; {instead}")
    return dataclasses.replace(calibration, threshold=threshold, unsure=unsure)


def _middle(low: float, high: float) -> float:
    """The probability whose logit is the mean of two probabilities'; not of 0 and 1."""
    real, fake = math.sqrt(low * high), math.sqrt((1 - low) * (1 - high))
    return min(max(low, real / (real + fake)), high)


def _row(one: Detection) -> dict[str, Any]:
    return {
        "path": one.name,
        "verdict": one.verdict,
        "probability_real": one.probability,
        "explanation": one.explanation,
        "error": one.error,
    }
