"""What several commands share: their common options, a user's errors, loading a model."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

    from unigendet.inference.pipeline import Pipeline


class UserError(Exception):
    """Something the user can put right; its text is the whole message."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others; ``--help`` shows the rest."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Commands:
    """The parser's commands, as their modules add them."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str = "command") -> None:
        self._subparsers = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")

    def add(
        self, name: str, run: object, text: str, *parents: argparse.ArgumentParser, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        """A command with the common options; ``run`` takes the parsed options and returns the exit code.

        The options have the command's whole name as ``label``, with which all its messages begin.
        """
        command = self._subparsers.add_parser(
            name, help=text, description=text, parents=[self._common, *parents], epilog=epilog
        )
        command.set_defaults(run=run, label=command.prog)
        return command

    def group(self, name: str, text: str) -> Commands:
        """A command that has commands of its own, which are added to what this returns."""
        return Commands(self._subparsers.add_parser(name, help=text, description=text), dest="subcommand")


def say(options: argparse.Namespace, text: str) -> None:
    """A message on standard error, after the command's name."""
    print(f"{options.label}: {text}", file=sys.stderr)


def model_options(required: bool = True) -> argparse.ArgumentParser:
    """The options of commands that use a trained model, as a parent parser; ``required``: they cannot do without."""
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--model", type=Path, required=required, metavar="FOLDER", help="folder of a trained model")
    device.add_argument(
        "--autoencoder", type=Path, metavar="FILE", help="the autoencoder's weights (default: ae.safetensors in FOLDER)"
    )
    device.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    device.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of the weights (default: bfloat16 on cuda, float32 elsewhere)")  # fmt: skip
    return device


def detector_options(question: str, *, verdicts: bool = True) -> argparse.ArgumentParser:
    """How a detector is asked, as a parent parser.

    ``question``: what it is asked by default. ``verdicts``: with the options of answers and calibrated verdicts, too.
    """
    parent = argparse.ArgumentParser(add_help=False)
    options = parent.add_argument_group("judging")
    options.add_argument("--question", help=f"what the model is asked (default: {question})")
    options.add_argument("--no-latent", action="store_true", help="leave out the latent view (no symbiotic attention)")
    options.add_argument("--batch-size", type=int, default=16, metavar="N", help="images judged together (default: 16)")
    if verdicts:
        text = "longest explanation; 0 = verdict only (default: 256, or the model's room)"
        options.add_argument("--max-tokens", type=int, metavar="N", help=text)
        options.add_argument("--calibration", type=Path, metavar="FILE", help="what 'unigendet calibrate' wrote")
    return parent


def quiet_pillow() -> None:
    """Pillow's warnings (large pictures, odd metadata) name no file, and what it cannot read becomes an error."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where the model that ``model_options`` name runs, and the dtype of its weights."""
    import torch

    from unigendet.device import find_device

    device = find_device(options.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, default if options.dtype == "auto" else getattr(torch, options.dtype)


def load_pipeline(options: argparse.Namespace) -> Pipeline:
    """The model that ``model_options`` name."""
    from unigendet.inference.pipeline import Pipeline

    device, dtype = device_and_dtype(options)
    return Pipeline.from_pretrained(options.model, device=device, dtype=dtype, autoencoder=options.autoencoder)
