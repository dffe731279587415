"""Everything a run needs to go on exactly where it stopped, and its checkpoints.

A checkpoint is a folder that appears whole or not at all, and is on the disk when it does. That of a run of several
processes is written while they go on, and each writes its rows of every tensor (``saving``). It holds

* ``model/``: settings and weights under the published names, ready for ``UniGenDet.from_pretrained``;
* ``ema/``: the same with the averaged weights, if the run keeps them;
* ``stage.safetensors``: what the stage keeps beside the model (DIGA's frozen teacher);
* ``optimizer.safetensors``: the optimizer's state as ``PARAMETER.ENTRY``, in shards from 5 GiB on, as all weights;
* ``training.json``: step, random generator, loader position, settings.

Nothing in it is code: safetensors and JSON only. Any number of processes can go on from it, whatever the number that
wrote it; each reads its own rows. Nothing is skipped on loading: what is missing or does not fit is an error that says
what.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.files import OLD, naming, new_folder, remove_folder, settle
from unigendet.model.checkpoint import OURS, load_parts, published_parts, write_config, write_weights
from unigendet.model.rows import Part, Piece, find_pieces, local, read_rows, whole_shape
from unigendet.model.shards import CheckpointError, JsonObject, listed, shard_files, write_shards
from unigendet.model.unigendet import UniGenDet
from unigendet.training.parallel import Parallel
from unigendet.training.saving import Saving
from unigendet.training.stages import Stage

MODEL, EMA, STAGE, OPTIMIZER, RECORD = "model", "ema", "stage", "optimizer", "training.json"
_FIELDS = {"step": int, "identity": dict, "trained": list, "generators": list, "position": dict | None}


class ExponentialAverage:
    """Exponential moving average of the parameters that learn: a ← decay · a + (1 − decay) · p after every step.

    Frozen parameters have no second copy, and of a parameter that several processes divide each averages its own part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = [local(p) for p in parameters.values()]
        self.tensors = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average."""
        torch._foreach_lerp_(self.tensors, self._parameters, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; they are exchanged. Do not train meanwhile."""
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
    def _exchange(self) -> None:
        for parameter, average in zip(self._parameters, self.tensors, strict=True):
            was = parameter.clone()  # contents change places, since FSDP holds on to the parameters' memory
            parameter.copy_(average)
            average.copy_(was)


@dataclass
class TrainState:
    """The moving parts of a run.

    ``generators``: of noise, one per pack of this process in a step. ``step``: steps done. ``parallel``: this process
    among those of the run.
    """

    model: UniGenDet
    stage: Stage
    optimizer: torch.optim.Optimizer
    ema: ExponentialAverage | None
    generators: list[torch.Generator]
    step: int = 0
    parallel: Parallel = field(default_factory=Parallel)

    @functools.cached_property
    def saving(self) -> Saving:
        """The checkpoint that is being written, where several processes write it."""
        return Saving(self.parallel)

    def save(
        self,
        output: str | Path,
        *,
        keep: int,
        position: dict[str, Any] | None,
        settings: dict[str, Any],
        companions: Sequence[Callable[[Path], None]] = (),
    ) -> Path:
        """Write the checkpoint folder of the present step and remove old ones; an error leaves nothing of it.

        Several processes only begin to write it here, and must all do so: ``saving`` says how it ends.

        Args:
            output: the run's output folder.
            keep: this many checkpoints stay.
            position: of the loaders, as JSON can hold it; None if they have none.
            settings: of the run, for the record.
            companions: each writes its files into the folder it is given, beside the weights: the tokenizer's ``save``.

        Returns:
            The folder.

        Raises:
            OSError: a file cannot be written; names it.
        """
        path = checkpoint_path(output, self.step)
        new = self._folder(path, keep, self._record(position, settings), companions)
        if self.parallel.sharded:
            self.saving.start(path, self._tensors(), new)
            return path
        with new as folder:
            write_weights(self.model, folder / MODEL)
            if self.ema is not None:
                with self.ema.applied():
                    write_weights(self.model, folder / EMA)
            if own := self.stage.state_dict():
                _write_tensors(own, folder, STAGE)
            _write_tensors(self._optimizer_state(), folder, OPTIMIZER)
        return path

    @contextmanager
    def _folder(
        self, path: Path, keep: int, record: str, companions: Sequence[Callable[[Path], None]]
    ) -> Iterator[Path]:
        """A new folder for ``path`` with all but the tensors; once it has its name, old ones go."""
        output = path.parents[1]
        clear_leftovers(output)
        with new_folder(path) as folder:
            for name in (MODEL, EMA) if self.ema is not None else (MODEL,):
                (folder / name).mkdir()
                for write in companions:
                    write(folder / name)
                write_config(self.model.config, folder / name)
            with naming(folder / RECORD):
                (folder / RECORD).write_text(record, encoding="utf-8")
            yield folder
        remove_old(output, keep)

    def _tensors(self) -> dict[str, dict[str, Part]]:
        """Everything that several processes write, by stem: this one's rows."""
        tensors = {f"{MODEL}/{OURS}": published_parts(self.model)}
        if self.ema is not None:
            tensors[f"{EMA}/{OURS}"] = self._averaged()
        for stem, own in ((STAGE, self.stage.state_dict()), (OPTIMIZER, self._optimizer_state())):
            tensors[stem] = {name: Part.of(tensor) for name, tensor in own.items()}
        return tensors

    def _averaged(self) -> dict[str, Part]:
        """This process's rows of the averaged weights, under the published names; what is frozen is the model's."""
        return published_parts(self.model, dict(zip(self.stage.trained, self.ema.tensors, strict=True)))

    def _record(self, position: dict[str, Any] | None, settings: dict[str, Any]) -> str:
        """The contents of ``training.json``."""
        generators = self.parallel.gather([bytes(g.get_state().tolist()).hex() for g in self.generators])
        record = {
            "step": self.step,
            "identity": self.stage.identity,
            "trained": list(self.stage.trained),
            "generators": list(itertools.chain.from_iterable(generators)),
            "position": position,
            "settings": settings,
        }
        return json.dumps(record, indent=2)

    def load(self, path: str | Path) -> dict[str, Any] | None:
        """Restore everything from a checkpoint folder; returns the loader's position.

        Raises:
            FileNotFoundError: the folder, or a part of it that this run needs, does not exist.
            CheckpointError: a part is damaged or does not fit this run.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
        if not (path / RECORD).is_file():
            raise FileNotFoundError(f"checkpoint {path} is incomplete for this run: it has no {RECORD}")
        record = _read_record(path / RECORD)
        own = self.stage.identity
        if record["identity"] != own:
            raise CheckpointError(
                f"checkpoint {path} is another run's: saved by {record['identity']}, this is {own}; resume it with its "
                f"own settings, or start this run from its weights ({_start(path)})"
            )
        pieces = self._find_parts(path)
        self._load_optimizer(pieces[OPTIMIZER], record["trained"], path)
        self._load_stage(pieces[STAGE], path)
        if self.ema is not None:
            load_parts(self._averaged(), path / EMA)
        load_parts(published_parts(self.model), path / MODEL)
        self._load_generators(record["generators"], path / RECORD)
        self.step = record["step"]
        return record["position"]

    def _load_generators(self, saved: Sequence[str], file: Path) -> None:
        """Every process takes those of its own packs."""
        count, processes = len(self.generators), self.parallel.world_size
        if len(saved) != processes * count:
            fits = len(saved) % processes == 0
            how = (
                f"accumulate={len(saved) // processes}" if fits else f"a number of processes that divides {len(saved)}"
            )
            raise CheckpointError(
                f"{file} is of a run with {len(saved)} packs per step, this one has {processes * count}; resume it "
                f"with as many ({how})"
            )
        first = self.parallel.rank * count
        try:
            for generator, state in zip(self.generators, saved[first : first + count], strict=True):
                generator.set_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: generators are not states of random generators on {self.generators[0].device}; resume on the "
                "kind of device that the checkpoint was saved on"
            ) from error

    def _find_parts(self, path: Path) -> dict[str, dict[str, list[Piece]]]:
        """Where the tensors of optimizer and stage are; an error if anything that this run needs is not there."""
        files = {stem: shard_files(path, stem) for stem in (OPTIMIZER, STAGE)}
        absent = [f"{OPTIMIZER}.safetensors"] * (not files[OPTIMIZER])
        absent += [f"{STAGE}.safetensors"] * (not files[STAGE] and bool(self.stage.state_dict()))
        absent += [name for name in (MODEL, *[EMA] * (self.ema is not None)) if not (path / name).is_dir()]
        if absent:
            raise FileNotFoundError(f"checkpoint {path} is incomplete for this run: it has no {', '.join(absent)}")
        return {stem: find_pieces(found) for stem, found in files.items()}

    def _load_stage(self, saved: Mapping[str, Sequence[Piece]], path: Path) -> None:
        own = {name: Part.of(tensor) for name, tensor in self.stage.state_dict().items()}
        shapes = {name: whole_shape(pieces) for name, pieces in saved.items()}
        wrong = sorted(n for n in own.keys() | shapes.keys() if n not in own or own[n].shape != shapes.get(n))
        if wrong:
            raise CheckpointError(
                f"checkpoint {path}: the saved state of stage {self.stage.name} has missing, unexpected or misshapen "
                f"tensors: {listed(wrong)}"
            )
        read_rows(saved, own)

    def _optimizer_state(self) -> dict[str, Tensor]:
        """``PARAMETER.ENTRY``; a parameter that has had no gradient yet has no entry."""
        own, trained = self.optimizer.state, self.stage.trained
        return {f"{name}.{key}": value for name, p in trained.items() if p in own for key, value in own[p].items()}

    def _load_optimizer(self, saved: Mapping[str, Sequence[Piece]], names: Sequence[str], path: Path) -> None:
        trained = self.stage.trained
        shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
        for entry, pieces in saved.items():
            name, _, key = entry.rpartition(".")
            shapes.setdefault(name, {})[key] = whole_shape(pieces)
        wrong = sorted(trained.keys() ^ shapes.keys())
        if wrong:
            raise CheckpointError(
                f"checkpoint {path}: the optimizer state does not fit; parameters on one side only: {wrong}"
            )
        for name, entries in shapes.items():
            misfits = {key: list(shape) for key, shape in entries.items() if shape not in ((), trained[name].shape)}
            if misfits:
                raise CheckpointError(
                    f"checkpoint {path}: the optimizer state of {name} has shapes {misfits}; "
                    f"the parameter is {list(trained[name].shape)}"
                )
        state = {
            name: {key: torch.empty_like(trained[name]) if shape else torch.empty(()) for key, shape in entries.items()}
            for name, entries in shapes.items()
        }
        read_rows(saved, {f"{n}.{key}": Part.of(t) for n, entries in state.items() for key, t in entries.items()})
        groups = self.optimizer.state_dict()["param_groups"]
        numbered = {i: state[name] for i, name in enumerate(trained) if state[name]}
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def loader_position(batches: Any, parallel: Parallel) -> dict[str, Any] | None:
    """The position of all processes' batches, for a checkpoint; None if they have none.

    Batches whose positions differ between processes have ``merge_states``, which makes one of them.
    """
    if not hasattr(batches, "state_dict"):
        return None
    states = parallel.gather(batches.state_dict())
    if hasattr(batches, "merge_states"):
        return batches.merge_states(states)
    if any(state != states[0] for state in states):
        raise ValueError(f"processes have batches at different positions, which {type(batches).__name__} cannot merge")
    return states[0]


def restore_position(batches: Any, position: dict[str, Any] | None, path: str | Path) -> None:
    """Let batches go on from the position in checkpoint ``path``.

    Raises CheckpointError unless it has one just if they do, and theirs.
    """
    has_position = hasattr(batches, "load_state_dict")
    if has_position != (position is not None):
        raise CheckpointError(
            f"checkpoint {path} holds {'no' if position is None else 'a'} loader position, but the batches "
            f"{'need' if has_position else 'cannot take'} one"
        )
    if has_position:
        try:
            batches.load_state_dict(position)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {path}: its loader position is damaged ({error!r})") from error
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path}: {error}; put back what has changed, or begin a new run from its weights "
                f"({_start(path)}, another output)"
            ) from error


def _start(path: str | Path) -> str:
    """The settings with which a new run begins with a checkpoint's weights, whatever the old one began with."""
    return f"model.checkpoint={Path(path) / MODEL} model.preset=null"


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, stem: str) -> None:
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    write_shards(sizes, lambda name: tensors[name].detach().cpu().contiguous(), folder, stem)


def _read_record(file: Path) -> JsonObject:
    record = JsonObject(file)
    wrong = [name for name, kind in _FIELDS.items() if name not in record or not isinstance(record[name], kind)]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {', '.join(wrong)} is missing or of a wrong type")
    return record


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint folders of a run's output folder, oldest first; nothing of what a killed save leaves.

    Between the two renames that replace a checkpoint by another of the same step, the first has a hidden name.
    """
    found: dict[int, Path] = {}
    folder = Path(output) / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # hidden names come first
        match = re.fullmatch(rf"(\.?)step-(\d+)(\.{OLD})?", path.name)
        if match and bool(match[1]) == bool(match[3]) and path.is_dir():
            found[int(match[2])] = path
    return [found[step] for step in sorted(found)]


def checkpoint_path(output: str | Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return Path(output) / "checkpoints" / f"step-{step:06}"


def clear_leftovers(output: str | Path) -> None:
    """Remove what killed saves and removals left, and give a checkpoint that one was about to replace its name back."""
    folder = Path(output) / "checkpoints"
    names = {m[1] for p in folder.glob(".step-*") if (m := re.fullmatch(r"\.(step-\d+)\.\w+", p.name))}
    for name in sorted(names):
        settle(folder / name)


def remove_old(output: str | Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep``; each is whole until it is gone from ``checkpoints``."""
    for path in checkpoints(output)[:-keep]:
        remove_folder(path)
