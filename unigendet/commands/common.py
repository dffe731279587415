"""What several commands share: their common options, a user's errors, loading a model, finding pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from unigendet.inference.pipeline import Pipeline

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class UserError(Exception):
    """Something the user can put right; its text is the whole message."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others; ``--help`` shows the rest."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Commands:
    """The parser's commands, as their modules add them."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")

    def add(
        self, name: str, run: object, text: str, *parents: argparse.ArgumentParser, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        """A command with the common options; ``run`` takes the parsed options and returns the exit code."""
        command = self._subparsers.add_parser(
            name, help=text, description=text, parents=[self._common, *parents], epilog=epilog
        )
        command.set_defaults(run=run)
        return command


def model_options() -> argparse.ArgumentParser:
    """The options of commands that use a trained model, as a parent parser."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of a trained model")
    device.add_argument(
        "--autoencoder", type=Path, metavar="FILE", help="the autoencoder's weights (default: ae.safetensors in FOLDER)"
    )
    device.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    device.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of the weights (default: bfloat16 on cuda, float32 elsewhere)")  # fmt: skip
    return device


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """The model that ``model_options`` name."""
    import torch

    from unigendet.device import find_device
    from unigendet.inference.pipeline import Pipeline

    device = find_device(options.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = default if options.dtype == "auto" else getattr(torch, options.dtype)
    return Pipeline.from_pretrained(options.model, device=device, dtype=dtype, autoencoder=options.autoencoder)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; folders as the images anywhere below them, sorted. Raises UserError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"no images in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            found.extend(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return found
