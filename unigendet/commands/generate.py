"""``unigendet generate``: pictures from prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from unigendet.commands.common import IMAGE_SUFFIXES, Commands, UserError, load_pipeline, model_options


def add(commands: Commands) -> None:
    """Describe the command."""
    generate = commands.add("generate", run, "Make images from prompts.", model_options(),
                   epilog="Sampling settings that are not given are the model folder's (generation.json).")  # fmt: skip
    generate.add_argument("--prompt", action="append", required=True, help="what to show; repeat it for several images")
    generate.add_argument("--out", type=Path, required=True, metavar="PATH",
                          help="the picture to write; with several images, a folder")  # fmt: skip
    generate.add_argument("--count", type=int, default=1, help="images per prompt (default: 1)")
    generate.add_argument("--seed", type=int, default=0, help="of the first image; each next one adds 1 (default: 0)")
    generate.add_argument(
        "--size", type=_size, metavar="HxW", help="pixels (default: the largest square the model makes)"
    )
    generate.add_argument("--steps", type=int, help="points in time; one less Euler steps")
    generate.add_argument("--text-scale", type=float, help="text guidance; 1 = none")
    generate.add_argument("--shift", type=float, metavar="S",
                          help="timestep shift; above 1, more of the steps at high noise")  # fmt: skip
    generate.add_argument("--renorm", choices=["global", "channel", "text_channel"],
                          help="what bounds the guided velocity: its norm over the image, per token, or per token "
                               "for the text guidance alone")  # fmt: skip
    generate.add_argument("--batch-size", type=int, default=8, help="images denoised together (default: 8)")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, say 512x768") from None


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    if not prompts:
        raise UserError(f"--count is {options.count}; it must be at least 1")
    single = len(prompts) == 1 and options.out.suffix.lower() in IMAGE_SUFFIXES
    if not single and options.out.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"--out {options.out} is one picture, but {len(prompts)} images are asked for; name a folder")
    target = options.out.parent if single else options.out
    if target.exists() and not target.is_dir():
        raise UserError(f"--out: {target} is a file; it must be a folder")
    if not single and len(prompts) == 1 and options.out.suffix and not options.out.is_dir():
        raise UserError(
            f"--out {options.out} names no picture format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}, or a folder"
        )
    target.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    pipeline = load_pipeline(options)
    asked = {
        "num_timesteps": options.steps,
        "text_scale": options.text_scale,
        "timestep_shift": options.shift,
        "renorm": options.renorm,
    }
    guidance = dataclasses.replace(pipeline.guidance, **{k: v for k, v in asked.items() if v is not None})

    def show(done: int, steps: int) -> None:
        if sys.stderr.isatty():
            print(f"\rstep {done}/{steps}", end="\n" if done == steps else "", file=sys.stderr)

    images = pipeline.generate(
        prompts, size=options.size, guidance=guidance, seed=options.seed, batch_size=options.batch_size, progress=show
    )
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = options.out if single else options.out / f"{i:05}.png"
        image.save(path)
        print(f"{path}\tseed {options.seed + i}\t{prompt}")
    return 0
