"""``unigendet generate``: pictures from prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unigendet.commands.common import Commands, UserError, load_pipeline, model_options
from unigendet.commands.progress import Progress
from unigendet.commands.sampling import (
    GUIDANCE_NOTE,
    check_grid,
    entries_of,
    file_name,
    fill_folder,
    guidance_of,
    picture_texts,
    requests_of,
    result_line,
    sampling_options,
    save_grid,
)

if TYPE_CHECKING:
    from unigendet.config import GuidanceConfig
    from unigendet.data.prompts import PromptRecord
    from unigendet.inference.pipeline import Pipeline
    from unigendet.inference.requests import ImageRequest

WRITABLE = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # the formats of --out, by suffix
EPILOG = f"""Prompt files: *.json holds a list, *.jsonl an entry a line; an entry is a string or an object with "prompt"
and, if need be, "seed", "size" [height, width], "images" [paths], "image_path" (a reference, as in LAION annotations,
not used here). Any other file is text: a prompt a line; blank lines and lines that begin with # are left out. A folder
gets a manifest.jsonl, and the same command again makes only what is missing there. {GUIDANCE_NOTE}"""


def add(commands: Commands) -> None:
    """Describe the command."""
    generate = commands.add(
        "generate", run, "Make images from prompts.", model_options(), sampling_options(), epilog=EPILOG
    )
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; repeat it for several images")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts; - is text on standard input")
    generate.add_argument("--image", action="append", type=Path, default=[], metavar="FILE",
                          help="an input image: the prompt says what to make of it; repeat it for several")  # fmt: skip
    generate.add_argument("--out", type=Path, required=True, metavar="PATH",
                          help="the picture to write; with several images, a folder")  # fmt: skip
    generate.add_argument("--overwrite", action="store_true", help="replace pictures that are in the way")
    generate.add_argument("--grid", type=Path, metavar="FILE",
                          help="also a contact sheet, a row for each prompt (.png)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    rows = requests_of(_records(options), options, options.image)
    requests = [request for row in rows for request in row]
    single = _single(options, len(requests))
    if options.grid is not None:
        pictures = [options.out] if single else [options.out / file_name(i) for i in range(len(requests))]
        check_grid(options.grid, pictures, options.overwrite)
    (options.out.parent if single else options.out).mkdir(parents=True, exist_ok=True)  # before the work, not after it
    guidance = guidance_of(options)
    pipeline = load_pipeline(options)
    requests = pipeline.check_requests(requests)
    if single:
        pictures = _one_picture(options, pipeline, requests[0], guidance)
    else:
        pictures = _folder(options, pipeline, requests, guidance)
    if options.grid is not None:
        save_grid(options.grid, rows, pictures)
    return 0


def _folder(
    options: argparse.Namespace, pipeline: Pipeline, requests: list[ImageRequest], guidance: GuidanceConfig
) -> list[Path]:
    from unigendet.data.image_folder import ImageFolder

    folder = ImageFolder(options.out, overwrite=options.overwrite)
    entries = entries_of(requests, options, pipeline, guidance)
    return fill_folder(folder, entries, pipeline, requests, guidance, options)


def _one_picture(
    options: argparse.Namespace, pipeline: Pipeline, request: ImageRequest, guidance: GuidanceConfig
) -> list[Path]:
    from unigendet.data.image_folder import save_image

    with Progress(options.label, 1, "pictures") as progress:
        (image,) = pipeline.generate_each(
            [request], guidance=guidance, batch_size=options.batch_size, progress=progress.steps
        )
        save_image(options.out, image, picture_texts(request))
        progress.show(result_line(options.out, request))
    return [options.out]


def _records(options: argparse.Namespace) -> list[PromptRecord]:
    from unigendet.data.prompts import PromptRecord, parse_prompts, read_prompts

    if options.prompt is not None:
        return [PromptRecord(prompt) for prompt in options.prompt]
    if str(options.prompts) == "-":
        if sys.stdin is None:
            raise UserError("--prompts - reads standard input, which is closed")
        return parse_prompts(sys.stdin.buffer.read(), "standard input", Path())
    return read_prompts(options.prompts)


def _single(options: argparse.Namespace, count: int) -> bool:
    """Whether ``--out`` is one picture, not a folder. Raises UserError where it fits neither."""
    out, suffix = options.out, options.out.suffix.lower()
    target = out.parent if suffix in WRITABLE else out
    if suffix in WRITABLE and count > 1:
        raise UserError(f"--out {out} is one picture, but {count} images are asked for; name a folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out: {target} is a file; it must be a folder")
    if count == 1 and suffix and suffix not in WRITABLE and not out.is_dir():
        raise UserError(f"--out {out} names no picture format; use one of {', '.join(sorted(WRITABLE))}, or a folder")
    if suffix in WRITABLE and out.exists() and not options.overwrite:
        raise UserError(f"--out {out} is there already; name another, or give --overwrite")
    return suffix in WRITABLE
