"""``unigendet evaluate detection``: a model's scores as a detector."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet import __version__
from unigendet.commands.common import (
    Commands,
    UserError,
    detector_options,
    device_and_dtype,
    load_pipeline,
    model_options,
    quiet_pillow,
    say,
)
from unigendet.commands.progress import Progress
from unigendet.evaluation.robustness import KINDS, Disturbance

if TYPE_CHECKING:
    from unigendet.data.datasets import DetectionRecord
    from unigendet.evaluation.detection_run import Predictions, RunSettings

CALIBRATION = ("temperature", "threshold", "unsure")  # what of one moves verdicts


def add(commands: Commands) -> None:
    """Describe the command."""
    asked = "each annotation's own question; for a folder, the one it was trained with"
    command = commands.add(
        "detection", run, "Score a model's verdicts and explanations on labelled images.", model_options(),
        detector_options(asked),
        epilog="An interrupted evaluation goes on where it stopped: give the same command again. Images that are "
               "there but cannot be read count as wrong verdicts.",
    )  # fmt: skip
    command.add_argument("--data", type=Path, required=True, metavar="PATH",
                         help="FakeClue annotation file; or folder with real/ and fake/, whose sub-folders are "
                              "generators")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="where evaluation.json, evaluation.html and predictions.jsonl go; a new folder, or one "
                              "to continue")  # fmt: skip
    command.add_argument("--image-root", type=Path, metavar="DIR",
                         help="what the paths in an annotation file are relative to (default: its folder)")  # fmt: skip
    command.add_argument("--limit", type=int, metavar="N",
                         help="judge N images only, spread evenly over real and fake and over the groups")  # fmt: skip
    command.add_argument("--sentence-encoder", type=Path, metavar="FOLDER",
                         help="local sentence encoder (safetensors) for the semantic similarity of explanations, CSS; "
                              "without it, only words are compared")  # fmt: skip
    group = command.add_argument_group("disturbed images", "Verdicts again on images that were disturbed first.")
    group.add_argument("--robustness", action="store_true", help="under all three kinds, at the usual levels")
    for name, kind in KINDS.items():
        which = f"{kind.option}; none = the usual ones; without --robustness, only this kind"
        group.add_argument(f"--{name}", type=kind.parse, nargs="*", metavar=kind.metavar, help=which)


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from rich.console import Console

    from unigendet.data.hashes import files_hash
    from unigendet.data.labelled import check_present, limit_evenly, read_labelled
    from unigendet.evaluation import detection_run as folders
    from unigendet.evaluation.detection_report import format_detection, make_report, write_detection_report
    from unigendet.evaluation.explanations import SentenceEncoder
    from unigendet.inference.model_files import folder_config, model_files

    settings = _settings(options)
    everything = read_labelled(options.data, image_root=options.image_root, root_option="--image-root")
    records = limit_evenly(everything, options.limit)
    check_present(records)
    _check_questions(settings, {record.question for record in records})
    root = options.image_root or (options.data if options.data.is_dir() else options.data.parent)
    device, dtype = device_and_dtype(options)
    config = folder_config(options.model)
    encoder = None if options.sentence_encoder is None else SentenceEncoder(options.sentence_encoder, device)
    say(options, "reading model and data")
    identity = {
        "settings": _identifying(options, settings, dtype),
        "model": files_hash((path.name, path) for path in model_files(options.model, config, options.autoencoder)),
        "data": folders.data_hash(records, root),
    }
    predictions = folders.Predictions(folders.prepare_folder(options.out, identity), records, root)
    _complete(options, predictions, records, settings, root)
    shown = {
        "model": {"folder": str(options.model), "sha256": identity["model"]},
        "data": {"path": str(options.data), "sha256": identity["data"], "images": len(everything)},
        **identity["settings"],
        "device": str(device),
        "batch_size": settings.batch_size,
        "disturbances": [disturbance.name for disturbance in settings.disturbances],
    }
    title = f"Detection by {options.model.resolve().name}"
    report = make_report(
        predictions,
        records,
        settings,
        encoder,
        title=title,
        available=len(everything),
        has_head=config.class_head,
        settings=shown,
    )
    page = write_detection_report(options.out, report)
    console = Console()
    console.print(format_detection(report))
    console.print(f"The report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _complete(
    options: argparse.Namespace,
    predictions: Predictions,
    records: Sequence[DetectionRecord],
    settings: RunSettings,
    root: Path,
) -> None:
    """Judge what is missing, and say how far it is."""
    from unigendet.evaluation.detection_run import complete

    left = sum(len(predictions.missing(condition)) for condition in settings.conditions)
    total = len(records) * len(settings.conditions)
    if left < total:
        say(options, f"{options.out} has {total - left} of {total} verdicts already")
    quiet_pillow()
    with Progress(options.label, left, "verdicts") as bar:
        complete(
            predictions,
            records,
            settings,
            lambda: load_pipeline(options),
            root=root,
            progress=bar.advance,
        )


def _settings(options: argparse.Namespace) -> RunSettings:
    from unigendet.evaluation.detection_run import RunSettings
    from unigendet.inference.calibration import Calibration

    for name, least in (("limit", 1), ("batch_size", 1), ("max_tokens", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    return RunSettings(
        question=options.question,
        with_latent=not options.no_latent,
        max_new_tokens=options.max_tokens,
        batch_size=options.batch_size,
        calibration=None if options.calibration is None else Calibration.load(options.calibration),
        disturbances=tuple(_disturbances(options)),
    )


def _check_questions(settings: RunSettings, asked: set[str]) -> None:
    """Raise UserError if annotations bring other questions than the calibration's; "" is a record without one."""
    fitted = None if settings.calibration is None else settings.calibration.question
    if settings.question is None and fitted is not None and asked - {"", fitted}:
        raise UserError(f"the calibration was fitted with the question {fitted!r}; give --question with it")


def _disturbances(options: argparse.Namespace) -> Iterator[Disturbance]:
    for name, kind in KINDS.items():
        levels = getattr(options, name)
        if levels is None and not options.robustness:
            continue
        for level in dict.fromkeys(levels or kind.levels):
            try:
                yield Disturbance(name, level)
            except ValueError as error:
                raise UserError(f"--{name}: {error}") from error


def _identifying(options: argparse.Namespace, settings: RunSettings, dtype: object) -> dict[str, Any]:
    """The settings that verdicts depend on; batches and devices move last bits at most, so a run may change them."""
    from unigendet.evaluation.results import plain

    calibration = settings.calibration
    return {
        "limit": options.limit,
        "question": settings.question,
        "latent_view": settings.with_latent,
        "max_tokens": settings.max_new_tokens,
        "calibration": calibration and {name: plain(getattr(calibration, name)) for name in CALIBRATION},
        "dtype": str(dtype).removeprefix("torch."),
        "version": __version__,
    }
