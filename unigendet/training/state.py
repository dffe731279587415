"""Everything a run needs to go on exactly where it stopped, and its checkpoints.

A checkpoint is a folder that appears whole or not at all:

* ``model/``: settings and weights under the published names, ready for ``UniGenDet.from_pretrained``;
* ``ema/``: the same with the averaged weights, if the run keeps them;
* ``stage.safetensors``: what the stage keeps beside the model (DIGA's frozen teacher);
* ``state.pt``: optimizer, random generator, loader position; ``training.json``: step and settings, readable.

Nothing is skipped on loading: what is missing or does not fit is an error that says what.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.model.checkpoint import CheckpointError, load_weights, read_tensors, save_pretrained
from unigendet.model.unigendet import UniGenDet
from unigendet.training.stages import Stage

MODEL, EMA, STAGE, STATE, SETTINGS = "model", "ema", "stage.safetensors", "state.pt", "training.json"


class ExponentialAverage:
    """Exponential moving average of the parameters that learn: a ← decay · a + (1 − decay) · p after every step.

    Frozen parameters have no second copy.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters.values())
        self.tensors = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average."""
        torch._foreach_lerp_(self.tensors, self._parameters, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; they are exchanged, not copied. Do not train meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's weights with the averaged ones, for good."""
        torch._foreach_copy_(self._parameters, self.tensors)

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Start the average anew at the model's weights."""
        torch._foreach_copy_(self.tensors, self._parameters)

    def _exchange(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self.tensors[i] = self.tensors[i], parameter.data


@dataclass
class TrainState:
    """The moving parts of a run. ``step``: steps done."""

    model: UniGenDet
    stage: Stage
    optimizer: torch.optim.Optimizer
    ema: ExponentialAverage | None
    generator: torch.Generator
    step: int = 0

    def save(
        self,
        path: str | Path,
        *,
        position: dict[str, Any] | None,
        settings: dict[str, Any],
        companions: Sequence[Callable[[Path], None]] = (),
    ) -> None:
        """Write a checkpoint folder.

        Args:
            path: the folder; one that is there already is replaced.
            position: of the loader, plain numbers and strings; None if it has none.
            settings: of the run, for the record.
            companions: each writes its files into the folder it is given, beside the weights: the tokenizer's ``save``.
        """
        from safetensors.torch import save_file

        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_pretrained(self.model, partial / MODEL)
        if self.ema is not None:
            with self.ema.applied():
                save_pretrained(self.model, partial / EMA)
        for folder in (partial / MODEL, *([partial / EMA] if self.ema is not None else [])):
            for write in companions:
                write(folder)
        if own := self.stage.state_dict():
            save_file({name: tensor.cpu().contiguous() for name, tensor in own.items()}, partial / STAGE)
        state = {"optimizer": self._optimizer_state(), "generator": self.generator.get_state(), "position": position}
        torch.save(state, partial / STATE)
        record = {"step": self.step, "identity": self.stage.identity, "settings": settings}
        (partial / SETTINGS).write_text(json.dumps(record, indent=2), encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)

    def load(self, path: str | Path) -> dict[str, Any] | None:
        """Restore everything from a checkpoint folder; returns the loader's position.

        Raises:
            FileNotFoundError: the folder, or a part of it that this run needs, does not exist.
            CheckpointError: a part is damaged or does not fit this run.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
        self._require(path, [SETTINGS])
        record = _read(path / SETTINGS, _read_json, {"identity": dict, "step": int})
        own = self.stage.identity
        if record["identity"] != own:
            raise CheckpointError(f"checkpoint {path} is another run's: saved by {record['identity']}, this is {own}")
        self._require(path, [STATE, MODEL, *[EMA] * (self.ema is not None), *[STAGE] * bool(self.stage.state_dict())])
        fields = {"optimizer": dict, "generator": Tensor, "position": dict | None}
        state = _read(path / STATE, functools.partial(torch.load, map_location="cpu", weights_only=True), fields)
        self._load_optimizer(state["optimizer"], path)
        self._load_stage(path)
        if self.ema is not None:
            load_weights(self.model, path / EMA)
            self.ema.copy_from_model()
        load_weights(self.model, path / MODEL)
        self.generator.set_state(state["generator"])
        self.step = record["step"]
        return state["position"]

    def _require(self, path: Path, names: Sequence[str]) -> None:
        absent = [name for name in names if not (path / name).exists()]
        if absent:
            raise FileNotFoundError(f"checkpoint {path} is incomplete for this run: it has no {', '.join(absent)}")

    def _load_stage(self, path: Path) -> None:
        own = read_tensors(path / STAGE) if (path / STAGE).exists() else {}
        try:
            self.stage.load_state_dict(own)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error

    def _optimizer_state(self) -> dict[str, Any]:
        """Per parameter name; one that has had no gradient yet has an empty entry."""
        own = self.optimizer.state
        return {name: dict(own[p]) if p in own else {} for name, p in self.stage.trained.items()}

    def _load_optimizer(self, saved: dict[str, dict[str, Tensor]], path: Path) -> None:
        trained = self.stage.trained
        wrong = sorted(trained.keys() ^ saved.keys())
        if wrong:
            raise CheckpointError(
                f"checkpoint {path}: the optimizer state does not fit; parameters on one side only: {wrong}"
            )
        for name, entry in saved.items():
            shapes = {k: list(t.shape) for k, t in entry.items() if t.dim() and t.shape != trained[name].shape}
            if shapes:
                raise CheckpointError(
                    f"checkpoint {path}: the optimizer state of {name} has shapes {shapes}; "
                    f"the parameter is {list(trained[name].shape)}"
                )
        groups = self.optimizer.state_dict()["param_groups"]
        numbered = {i: saved[name] for i, name in enumerate(trained) if saved[name]}
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _read(file: Path, read: Callable[[Path], Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What ``read`` makes of a file: a dict with ``fields`` of these types. CheckpointError names a damaged file."""
    try:
        values = read(file)
    except OSError:
        raise
    except Exception as error:  # what unpickling raises for damaged bytes is of many kinds
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{file} is damaged and cannot be read: {why}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged: it holds a {type(values).__name__}; it must hold {sorted(fields)}")
    wrong = [name for name, kind in fields.items() if name not in values or not isinstance(values[name], kind)]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type")
    return values


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint folders of a run's output folder, oldest first."""
    found = [p for p in (Path(output) / "checkpoints").glob("step-*") if p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def checkpoint_path(output: str | Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return Path(output) / "checkpoints" / f"step-{step:06}"
