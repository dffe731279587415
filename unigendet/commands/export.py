"""``unigendet export``: a model in the form in which BAGEL and UniGenDet are published."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from unigendet.commands.common import Commands, UserError, say


def add(commands: Commands) -> None:
    """Describe the command."""
    export = commands.add(
        "export", run, "Write a model in the published form: llm_config.json, vit_config.json, ema.safetensors.",
        epilog="The weights are one file, all that BAGEL's own code opens, unless --shard-size asks for more. "
               "Settings that the published files cannot say go into config.json beside them, and a line says which; "
               "views and sampling settings are kept too.",
    )  # fmt: skip
    export.add_argument("--model", type=Path, required=True, metavar="FOLDER",
                        help="a model folder, or the checkpoint folder of a training run")  # fmt: skip
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to; a new or an empty folder")
    export.add_argument("--weights", choices=["ema", "model"],
                        help="of a checkpoint: the averaged weights or the latest (default: ema if there)")  # fmt: skip
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the weights (default: float32, which loses nothing)")  # fmt: skip
    export.add_argument("--autoencoder", type=Path, metavar="FILE",
                        help="copied as ae.safetensors (default: the one in the model folder, if any)")  # fmt: skip
    export.add_argument("--shard-size", type=_gib, metavar="GIB",
                        help="write the weights as files of at most so many GiB, with an index, which unigendet reads "
                             "and BAGEL's own code does not (default: one file)")  # fmt: skip
    export.add_argument("--overwrite", action="store_true", help="exchange the model that is in DIR; other files stay")


def run(options: argparse.Namespace) -> int:
    """Carry it out."""
    source = find_source(options.model, options.weights)
    check_target(options.out, source, options.overwrite)
    from unigendet.inference.export import export_model, needs_autoencoder

    unsaid = export_model(
        source, options.out, dtype=options.dtype, autoencoder=options.autoencoder, shard_bytes=options.shard_size
    )
    print(options.out)
    if needs_autoencoder(options.out):
        say(options, "no autoencoder was written: commands that use the model will need --autoencoder FILE")
    if unsaid:
        reads = "config.json says it, which unigendet reads and other programs do not"
        say(options, f"the published files have no word for {', '.join(unsaid)}: {reads}")
    return 0


def _gib(text: str) -> int:
    """GiB as bytes."""
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size; it must be a positive number of GiB")
    return max(1, int(size * 2**30))


def find_source(folder: Path, weights: str | None) -> Path:
    """The model folder that ``--model`` and ``--weights`` mean. Raises UserError if there is none."""
    from unigendet.training.state import EMA, MODEL, RECORD, checkpoints

    if not folder.is_dir():
        raise UserError(f"--model: there is no folder {folder}")
    if (folder / RECORD).is_file():
        chosen = weights or (EMA if (folder / EMA).is_dir() else MODEL)
        if not (folder / chosen).is_dir():
            raise UserError(f"--weights is {chosen}, but checkpoint {folder} has no {chosen} folder")
        return folder / chosen
    if run := checkpoints(folder):
        raise UserError(f"--model {folder} is the output of a run; name one of its checkpoints, say {run[-1]}")
    if weights is not None:
        raise UserError(f"--weights is {weights}, but {folder} is no training checkpoint: it holds one set of weights")
    return folder


def check_target(out: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError unless an export may be written to ``out``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; it must be a folder")
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"--out {out} and the model {source} lie in one another; name a folder of its own")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name another folder, or add --overwrite")
