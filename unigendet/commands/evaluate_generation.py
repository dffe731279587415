"""``unigendet evaluate generation``: how close generated pictures come to real ones, and to their prompts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.commands.common import Commands, UserError, load_pipeline, model_options, say
from unigendet.commands.inputs import find_pictures
from unigendet.commands.progress import Progress
from unigendet.commands.sampling import (
    GUIDANCE_NOTE,
    check_grid,
    entries_of,
    file_name,
    fill_folder,
    guidance_of,
    requests_of,
    sampling_options,
    save_grid,
)

if TYPE_CHECKING:
    from unigendet.data.prompts import PromptRecord
    from unigendet.evaluation.generation_scores import GenerationScores
    from unigendet.evaluation.inception import InceptionFeatures

OF_A_MODEL = ("prompts", "autoencoder", "grid", "seed", "seeds", "count", "size", "steps", "text_scale", "image_scale",
              "interval", "shift", "renorm", "renorm_min")  # fmt: skip
ONE_WAY = ("weights", "dtype", "guidance")  # of a manifest's entries: what pictures scored together must share
EPILOG = f"""Either --model and --prompts, whose pictures are made first, in DIR/images, or --images. With digits as
features the reference are the quickstart's test digits, and the prompts those of its captions. An interrupted
evaluation goes on where it stopped: give the same command again. {GUIDANCE_NOTE}"""


def add(commands: Commands) -> None:
    """Describe the command."""
    command = commands.add(
        "generation", run, "Score generated pictures against real ones.",
        model_options(required=False), sampling_options(), epilog=EPILOG,
    )  # fmt: skip
    command.add_argument("--prompts", type=Path, metavar="FILE",
                         help="what the model is to show: a prompt file, see generate; in LAION annotations each "
                              "entry's image_path is a reference image")  # fmt: skip
    command.add_argument("--images", type=Path, metavar="DIR",
                         help="generated pictures to score, instead of a model; with the manifest of generate those it "
                              "lists, and their prompts are known")  # fmt: skip
    command.add_argument("--reference", type=Path, metavar="PATH",
                         help="real images: a folder, or annotations (default: those of --prompts)")  # fmt: skip
    command.add_argument("--image-root", type=Path, metavar="DIR",
                         help="what the paths in annotations are relative to (default: their folder)")  # fmt: skip
    command.add_argument("--features", choices=["inception", "digits"], required=True,
                         help="what the Fréchet distance compares")  # fmt: skip
    command.add_argument("--inception-weights", type=Path, metavar="FILE",
                         help="the Inception network's weights; they are not downloaded")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where generation.json goes")
    command.add_argument("--overwrite", action="store_true", help="replace what is in the way")
    command.add_argument("--grid", type=Path, metavar="FILE",
                         help="also a contact sheet of what --model makes, a row for each prompt (.png)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.evaluation.generation_scores import FILE, format_scores, is_scores, write_scores

    _check_options(options)
    scores_file = options.out / FILE
    if scores_file.exists() and not options.overwrite and not is_scores(scores_file):
        raise UserError(f"{scores_file} is there already and holds no scores; name another --out, or give --overwrite")
    records = _records(options)
    reference = _reference(options, records)  # all that can be missing is looked for before pictures are made
    features = _features(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.images is not None:
        images, prompts, made = _found(options)
        _check_apart(images, reference)
    else:
        images, prompts, made = _generated(options, records, reference)
    scores = _scored(options, images, prompts, reference, features)
    root = None if options.image_root is None else str(options.image_root)
    settings: dict[str, Any] = {"features": options.features, "image_root": root, **made}
    if features is not None:
        settings |= {**_described(options, reference), "inception_weights_sha256": features.sha256}
    path = write_scores(options.out, scores, settings)
    print(format_scores(scores))
    print(f"The numbers: {path}")
    for warning in scores.warnings:
        say(options, f"note: {warning}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if (options.model is None) == (options.images is None):
        raise UserError("give either --model, whose pictures are made first, or --images")
    if options.model is not None and options.prompts is None:
        raise UserError("--model needs --prompts: what it is to show")
    if options.images is not None:
        given = [name for name in OF_A_MODEL if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --model, not with --images")
        if not options.images.is_dir():
            raise UserError(f"--images {options.images} is no folder")
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if options.features == "digits":
        for name in ("reference", "inception_weights"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --features inception")
    elif options.inception_weights is None:
        from unigendet.evaluation.inception import WHERE

        raise UserError(f"--features inception needs --inception-weights: {WHERE}; it is never downloaded here")


def _records(options: argparse.Namespace) -> list[PromptRecord]:
    from unigendet.data.prompts import read_prompts

    return [] if options.prompts is None else read_prompts(options.prompts, options.image_root)


def _reference(options: argparse.Namespace, records: Sequence[PromptRecord]) -> list[Path]:
    """The real images, each once; none for digits, which bring their own."""
    from unigendet.data.prompts import read_prompts

    if options.features == "digits":
        return []
    if options.reference is not None and options.reference.is_dir():
        for name in ("out", "grid"):
            path = getattr(options, name)
            if path is not None and path.resolve().is_relative_to(options.reference.resolve()):
                raise UserError(
                    f"--{name} {path} lies in the folder of real images, {options.reference}; generated pictures must "
                    "not become real ones: name another"
                )
        return _below(options.reference)
    if options.reference is not None:
        records = read_prompts(options.reference, options.image_root)
    given = options.reference or options.prompts
    if given is None:
        raise UserError("--images needs --reference: a folder of real images, or annotations that name them")
    without = next((record.where for record in records if record.reference is None), None)
    if without is not None:
        raise UserError(f"{without} has no 'image_path', a real image to compare with; name real images as --reference")
    paths = list(dict.fromkeys(record.reference for record in records))
    lost = [path for path in paths if not path.is_file()]
    if lost:
        raise UserError(f"{given} names images that are not there, {len(lost)} of {len(paths)}: {lost[0]}, …")
    return paths


def _described(options: argparse.Namespace, reference: Sequence[Path]) -> dict[str, Any]:
    """What settings say of the real images: where they are, and a hash over their names and contents."""
    from unigendet.data.hashes import files_hash

    given = options.reference or options.prompts
    root = given if given.is_dir() else options.image_root or given.parent
    digest = files_hash((path.relative_to(root).as_posix(), path) for path in sorted(reference))
    return {"reference": str(given), "reference_sha256": digest}


def _check_apart(images: Sequence[Path], reference: Sequence[Path]) -> None:
    """Raises ValueError if a picture is both a generated and a real one."""
    real = {path.resolve() for path in reference}
    both = next((path for path in images if path.resolve() in real), None)
    if both is not None:
        raise ValueError(f"{both} is among the generated pictures and among the reference; they must be apart")


def _below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    return [Path(path) for path in find_pictures([str(folder)])]


def _features(options: argparse.Namespace) -> InceptionFeatures | None:
    if options.features == "digits":
        return None
    from unigendet.device import find_device
    from unigendet.evaluation.inception import InceptionFeatures

    try:
        return InceptionFeatures(options.inception_weights, find_device(options.device))
    except ImportError as error:
        raise UserError(str(error)) from error


def _found(options: argparse.Namespace) -> tuple[list[Path], list[str | None], dict[str, Any]]:
    """Pictures to score, their prompts as far as they are known, and what settings say of them.

    Those of the manifest where there is one; otherwise all that are no contact sheets.
    """
    from unigendet.data.image_folder import MANIFEST, read_manifest
    from unigendet.evaluation.contact_sheet import is_contact_sheet

    folder = options.images
    everything, manifest = _below(folder), dict(sorted(read_manifest(folder).items()))
    if not (folder / MANIFEST).is_file():
        images = [path for path in everything if not is_contact_sheet(path)]
        prompts, made = [None] * len(images), {}
        why = "are contact sheets"
    else:
        images = [folder / name for name in manifest]
        lost = [path for path in images if not path.is_file()]
        if lost:
            raise UserError(
                f"{folder} lacks pictures of its {MANIFEST}, {len(lost)} of {len(images)}: {lost[0]}; have the same "
                "command make them that made the others"
            )
        prompts, made = [entry["prompt"] for entry in manifest.values()], _made(list(manifest.values()), folder)
        why = f"are not in its {MANIFEST}"
    left_out = len(set(everything) - set(images))
    if left_out:
        say(options, f"note: {left_out} files of {folder} {why} and are left out")
    return images, prompts, {"images": str(folder), "left_out": left_out, **made}


def _made(entries: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What entries of a manifest say on how their pictures were made. Raises UserError unless it is one way."""
    for key in ONE_WAY:
        other = next((entry for entry in entries if entry.get(key) != entries[0].get(key)), None)
        if other is not None:
            raise UserError(
                f"{folder} holds pictures that were made in different ways: {entries[0]['file']} and {other['file']} "
                f"differ in {key}; score each kind alone"
            )
    sizes = {tuple(entry["size"]) for entry in entries if isinstance(entry.get("size"), list)}
    return {
        **{key: entry.get(key) for key in ONE_WAY for entry in entries[:1]},
        "seeds": sorted({entry["seed"] for entry in entries}),
        "sizes": [list(size) for size in sorted(sizes)],
    }


def _generated(
    options: argparse.Namespace, records: Sequence[PromptRecord], reference: Sequence[Path]
) -> tuple[list[Path], list[str | None], dict[str, Any]]:
    """The same of pictures that the model makes, as far as they are not there yet."""
    from unigendet.data.image_folder import ImageFolder

    rows = requests_of(records, options)
    requests = [request for row in rows for request in row]
    target = options.out / "images"
    _check_apart([target / file_name(i) for i in range(len(requests))], reference)
    if options.grid is not None:
        check_grid(options.grid, [target / file_name(i) for i in range(len(requests))], options.overwrite)
    guidance = guidance_of(options)
    pipeline = load_pipeline(options)
    requests = pipeline.check_requests(requests)
    folder = ImageFolder(target, overwrite=options.overwrite)
    entries = entries_of(requests, options, pipeline, guidance)
    images = fill_folder(folder, entries, pipeline, requests, guidance, options)
    if options.grid is not None:
        save_grid(options.grid, rows, images)
    made = {
        "prompts": str(options.prompts),
        "model": str(options.model),
        "images_per_prompt": len(rows[0]),
        **_made(entries, target),
    }
    return images, [request.prompt for request in requests], made


def _scored(
    options: argparse.Namespace,
    images: Sequence[Path],
    prompts: Sequence[str | None],
    reference: Sequence[Path],
    features: InceptionFeatures | None,
) -> GenerationScores:
    from unigendet.evaluation.generation_scores import score_digits, score_inception

    if features is None:
        return score_digits(images, prompts)
    with Progress(options.label, len(images) + len(reference), "images seen") as progress:
        return score_inception(images, reference, features, batch_size=options.batch_size, done=progress.advance)
