"""What ``generate`` and ``evaluate generation`` share: sampling options, and pictures from prompts into a folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet import __version__
from unigendet.commands.common import UserError
from unigendet.commands.progress import Progress
from unigendet.commands.rows import cell

if TYPE_CHECKING:
    from unigendet.config import GuidanceConfig
    from unigendet.data.image_folder import ImageFolder
    from unigendet.data.prompts import PromptRecord
    from unigendet.inference.pipeline import Pipeline
    from unigendet.inference.requests import ImageRequest

GUIDANCE_NOTE = "Sampling settings that are not given are the model folder's (generation.json)."


def sampling_options() -> argparse.ArgumentParser:
    """How images are made, as a parent parser."""
    parent = argparse.ArgumentParser(add_help=False)
    options = parent.add_argument_group("sampling")
    options.add_argument("--seed", type=int, metavar="N",
                         help="of the first image; each next one adds 1 (default: 0)")  # fmt: skip
    options.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one image of each prompt for each of these")
    options.add_argument("--count", type=int, metavar="N", help="images per prompt (default: 1)")
    options.add_argument("--size", type=_size, metavar="HxW",
                         help="pixels (default: that of the last input image; without one the largest square the model "
                              "makes)")  # fmt: skip
    options.add_argument("--steps", type=int, metavar="N", help="points in time; one less Euler steps")
    options.add_argument("--text-scale", type=float, metavar="S", help="text guidance; 1 = none")
    options.add_argument("--image-scale", type=float, metavar="S", help="guidance by input images; 1 = none")
    options.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                         help="times (1 = noise, 0 = image) between which there is guidance")  # fmt: skip
    options.add_argument("--shift", type=float, metavar="S",
                         help="timestep shift; above 1, more of the steps at high noise")  # fmt: skip
    options.add_argument("--renorm", choices=["global", "channel", "text_channel"],
                         help="what bounds the guided velocity: its norm over the image, per token, or per token for "
                              "the text guidance alone")  # fmt: skip
    options.add_argument("--renorm-min", type=float, metavar="S",
                         help="how far the renorm may scale down: 0 = at will, 1 = not at all")  # fmt: skip
    options.add_argument("--batch-size", type=int, default=8, metavar="N",
                         help="images denoised together, and saved when they are done (default: 8)")  # fmt: skip
    return parent


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, say 512x768") from None


def guidance_of(options: argparse.Namespace) -> GuidanceConfig:
    """The model folder's settings with what the command line says. ValueError for an unfit one."""
    from unigendet.inference.pipeline import load_guidance

    asked = {
        "num_timesteps": options.steps,
        "text_scale": options.text_scale,
        "image_scale": options.image_scale,
        "interval": None if options.interval is None else tuple(options.interval),
        "timestep_shift": options.shift,
        "renorm": options.renorm,
        "renorm_min": options.renorm_min,
    }
    return dataclasses.replace(load_guidance(options.model), **{k: v for k, v in asked.items() if v is not None})


def requests_of(
    records: Sequence[PromptRecord], options: argparse.Namespace, images: Sequence[Path] = ()
) -> list[list[ImageRequest]]:
    """Per prompt, the images to make: one for each of ``--seeds``, or ``--count`` with seeds that follow each other.

    A record's own seed is that of its first image; its own size and input images go before those of the command line.
    """
    from unigendet.inference.requests import ImageRequest

    for name in ("seed", "count"):
        if options.seeds and getattr(options, name) is not None:
            raise UserError(f"--{name} and --seeds both say which images a prompt gets; give one of them")
    count = 1 if options.count is None else options.count
    if count < 1:
        raise UserError(f"--count is {count}; it must be at least 1")
    if len(set(options.seeds or ())) < len(options.seeds or ()):
        raise UserError(f"--seeds names a seed twice: {' '.join(map(str, options.seeds))}")
    rows = []
    for i, record in enumerate(records):
        if options.seeds and record.seed is not None:
            raise UserError(f"{record.where} has a seed of its own; --seeds is for prompts without")
        first = (options.seed or 0) + i * count if record.seed is None else record.seed
        seeds = options.seeds or range(first, first + count)
        size, given = record.size or options.size, record.images or tuple(images)
        rows.append([ImageRequest(record.prompt, seed, size, given, record.where) for seed in seeds])
    return rows


def entries_of(
    requests: Sequence[ImageRequest], options: argparse.Namespace, pipeline: Pipeline, guidance: GuidanceConfig
) -> list[dict[str, Any]]:
    """What the manifest says of each image: all that the picture follows from."""
    from unigendet.data.hashes import fingerprint
    from unigendet.inference.model_files import model_files

    inputs = {image: fingerprint([image]) for image in {image for request in requests for image in request.images}}
    shared = {
        "guidance": dataclasses.asdict(guidance),
        "model": str(options.model),
        "weights": fingerprint(model_files(options.model, pipeline.model.config, options.autoencoder)),
        "dtype": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
    }
    return [
        {
            "file": file_name(i),
            "prompt": request.prompt,
            "seed": request.seed,
            "size": list(request.size),
            "images": [str(image) for image in request.images],
            "image_fingerprints": [inputs[image] for image in request.images],
            **shared,
        }
        for i, request in enumerate(requests)
    ]


def file_name(i: int) -> str:
    """Of picture i in a folder."""
    return f"{i:05}.png"


def picture_texts(request: ImageRequest) -> dict[str, str]:
    """A picture's metadata: its prompt, its seed, and what made it."""
    return {"prompt": request.prompt, "seed": str(request.seed), "Software": f"unigendet {__version__}"}


def fill_folder(
    folder: ImageFolder,
    entries: Sequence[dict[str, Any]],
    pipeline: Pipeline,
    requests: Sequence[ImageRequest],
    guidance: GuidanceConfig,
    options: argparse.Namespace,
) -> list[Path]:
    """Make the images that are not in the folder yet, each saved as it comes; a line of standard output for each.

    Returns the paths of all. Raises ValueError for another picture in the way.
    """
    todo = folder.missing(entries)
    paths = [folder.path / entry["file"] for entry in entries]
    with Progress(options.label, len(todo), "pictures") as progress:
        images = pipeline.generate_each(
            [requests[i] for i in todo], guidance=guidance, batch_size=options.batch_size, progress=progress.steps
        )
        folder.begin()
        remaining = set(todo)
        for i, (request, path) in enumerate(zip(requests, paths, strict=True)):
            if i in remaining:
                folder.add(entries[i], next(images), picture_texts(request))
                progress.show(result_line(path, request))
                progress.advance()
            else:
                progress.show(result_line(path, request) + "\t(kept)")
    return paths


def result_line(path: Path, request: ImageRequest) -> str:
    """A picture's line of standard output, in printable characters."""
    return f"{cell(path)}\tseed {request.seed}\t{cell(' '.join(request.prompt.split()))}"


def save_grid(path: Path, rows: Sequence[Sequence[ImageRequest]], pictures: Sequence[Path]) -> None:
    """A contact sheet of the pictures, which come row by row."""
    from unigendet.evaluation.contact_sheet import SheetRow, save_contact_sheet

    files = iter(pictures)
    sheet = [
        SheetRow(row[0].prompt, tuple(next(files) for _ in row), tuple(f"seed {r.seed}" for r in row)) for row in rows
    ]
    save_contact_sheet(path, sheet)


def check_grid(path: Path, pictures: Sequence[Path], overwrite: bool) -> None:
    """Raises UserError for a contact sheet's path that is no PNG file, or is that of something else."""
    from unigendet.evaluation.contact_sheet import is_contact_sheet

    if path.suffix.lower() != ".png":
        raise UserError(f"--grid {path} must be a .png file")
    if path.resolve() in {picture.resolve() for picture in pictures}:
        raise UserError(f"--grid {path} is the name of one of the pictures; name another")
    if path.exists() and not overwrite and not is_contact_sheet(path):
        raise UserError(f"--grid {path} is there already and is no contact sheet; name another, or give --overwrite")
