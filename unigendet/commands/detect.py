"""``unigendet detect``: verdicts on pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unigendet.commands.common import Commands, find_images, load_pipeline, model_options

if TYPE_CHECKING:
    from PIL.Image import Image


def add(commands: Commands) -> None:
    """Describe the command."""
    detect = commands.add("detect", run, "Tell real images from generated ones; one line per picture.", model_options(),
                 epilog="Line: verdict, probability of being real, path, explanation, separated by tabs.")  # fmt: skip
    detect.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them (searched recursively)"
    )
    detect.add_argument("--question", help="what the model is asked (default: the question it was trained with)")
    detect.add_argument("--json", action="store_true", help="one JSON object per line")
    detect.add_argument("--no-latent", action="store_true", help="leave out the latent view (no symbiotic attention)")
    detect.add_argument(
        "--max-tokens", type=int, default=256, help="longest explanation; 0 = verdict only (default: 256)"
    )
    detect.add_argument("--batch-size", type=int, default=16, help="images judged together (default: 16)")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    from unigendet.data.transforms import read_image

    paths = find_images(options.paths)
    pipeline = load_pipeline(options)
    broken: list[str] = []

    def readable() -> Iterator[Image]:
        for path in paths:
            try:
                image = read_image(path)
            except (ValueError, OSError) as error:
                broken.append(str(error))  # it names the picture
                if options.json:
                    print(json.dumps({"path": str(path), "error": str(error)}), flush=True)
            else:
                yield image

    detections = pipeline.detect(
        readable(), question=options.question, with_latent=not options.no_latent, max_new_tokens=options.max_tokens,
        batch_size=options.batch_size,
    )  # fmt: skip
    for one in detections:
        if options.json:
            fields = {
                "path": one.name,
                "verdict": one.verdict,
                "probability_real": one.probability,
                "explanation": one.explanation,
            }
            print(json.dumps(fields), flush=True)
        else:
            probability = "-" if one.probability is None else f"{one.probability:.3f}"
            print(f"{one.verdict}\t{probability}\t{one.name}\t{' '.join(one.explanation.split())}", flush=True)
    for line in broken:
        print(f"unigendet detect: not judged: {line}", file=sys.stderr)
    return 1 if broken else 0
