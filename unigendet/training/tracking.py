"""What a run tells, sent to Weights & Biases (https://wandb.ai) where the settings ask for it.

The run there has the settings, the scalars under the names that they have in TensorBoard, and the grids of samples. Its
x-axis is ``step``, a value of its own: W&B drops what comes with a smaller step than before, and a run that was killed
goes on at its last checkpoint, before the last step that it told.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

from unigendet.files import make_folder, write_text
from unigendet.training.config import TrainConfig

ID_FILE = "wandb-id.txt"
FINISHED, FAILED = 0, 1  # exit codes


def require_wandb(config: TrainConfig) -> None:
    """Raise ModuleNotFoundError if the settings ask for W&B and its package is not installed."""
    if config.wandb.project is not None:
        _package(config)


def open_tracker(config: TrainConfig, step: int) -> Tracker | None:
    """The W&B run of ``config``, after ``step`` steps; None if the settings ask for none.

    Only one process of a run calls this.

    Raises:
        ModuleNotFoundError: the package ``wandb`` is not installed.
        RuntimeError: W&B does not let the run begin, for want of a login or a network, say.
        OSError: the file with the run's id cannot be read or written; names it.
    """
    return None if config.wandb.project is None else Tracker(config, step)


class Tracker:
    """One run at W&B. Its id stands in ``wandb-id.txt`` in the output folder: a run that goes on is the same one there.

    Arguments and errors: see ``open_tracker``.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        self._wandb = _package(config)
        settings = config.wandb
        folder = Path(config.output or ".")
        make_folder(folder)
        file = folder / ID_FILE
        if not (step and file.is_file()):  # new, or its checkpoint came from another folder
            write_text(file, secrets.token_hex(8) + "\n")
        try:
            self._run = self._wandb.init(
                project=settings.project,
                name=settings.name,
                entity=settings.entity,
                mode=settings.mode,
                tags=list(settings.tags),
                dir=str(folder),
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow" if settings.mode == "online" else None,  # without a network only the id says so
                config=json.loads(json.dumps(dataclasses.asdict(config))),  # lists instead of tuples
                allow_val_change=True,  # a resumed run may have other settings
            )
        except self._wandb.Error as error:
            raise RuntimeError(f"wandb.project is {settings.project!r}, but W&B starts no run: {error}") from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Send numbers by name."""
        self._run.log({**values, "step": step})

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Send a picture uint8 [H, W, 3 or 4]."""
        self._run.log({name: self._wandb.Image(pixels), "step": step})

    def close(self, *, failed: bool = False) -> None:
        """End the run, which waits until all is sent; ``failed``: an error ended it."""
        self._run.finish(exit_code=FAILED if failed else FINISHED)


def _package(config: TrainConfig) -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise ModuleNotFoundError(
            f"wandb.project is {config.wandb.project!r}; it needs the package 'wandb': pip install 'unigendet[wandb]'",
            name="wandb",
        ) from error
