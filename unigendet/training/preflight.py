"""Everything of a run but its weights, made before they are loaded: mistakes in settings and files show at once.

A run calls ``prepare`` once it knows its processes, which ``parallel.mesh_shape`` checks. ``train --dry-run`` calls it
too (``rehearse``), but takes what is not there for a warning. Files that are not there come first, all of them; then
whether settings fit each other and the model; then what is in the files. Whether a run fits the checkpoint that it goes
on from shows when the state is loaded (``TrainState.load``).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from unigendet.config import PRESETS, ModelConfig
from unigendet.data.datasets import SampleBuilder, check_tokenizer, check_views
from unigendet.data.shards import Source
from unigendet.data.tokenizer import Tokenizer, load_tokenizer
from unigendet.model.autoencoder import FluxAutoencoder, PixelAutoencoder, build_autoencoder, check_autoencoder
from unigendet.model.checkpoint import check_weights
from unigendet.model.settings import load_config
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import TrainConfig, naming_setting
from unigendet.training.sources import (
    build_tokenizer,
    data_sets,
    require_data_sets,
    sample_builder,
    tokenizer_setting,
)
from unigendet.training.stages import make_stage
from unigendet.training.state import MODEL, checkpoints
from unigendet.training.tracking import require_wandb
from unigendet.training.watched import Watched, read_watched, require_watched

T = TypeVar("T")

_IS = {"file": Path.is_file, "folder": Path.is_dir, "file or folder": Path.exists}
# What a checkpoint must share with the preset that model.sizes names.
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")


@dataclass(frozen=True)
class Parts:
    """Everything of a run but its weights, checked against each other; in a dry run without what is not there.

    ``model`` is on the ``meta`` device. ``watched``: what the run's looks are at; None without looks.
    """

    model: UniGenDet
    tokenizer: Tokenizer | None
    autoencoder: PixelAutoencoder | FluxAutoencoder | None
    builder: SampleBuilder | None
    sources: list[Source]
    watched: Watched | None


def prepare(config: TrainConfig, resume: Path | None = None, missing: list[str] | None = None) -> Parts:
    """Make and read everything but the weights.

    Args:
        config: of the run.
        resume: the checkpoint that it goes on from, with a model of its own.
        missing: takes a line for everything that is not there, which then is no error.

    Raises:
        ModuleNotFoundError: the settings need a package that is not installed.
        FileNotFoundError: a file or folder that a setting names is not there; names the setting.
        ValueError: settings do not fit each other, or what they name; names the setting.
    """
    files = _Files(config, resume, missing)
    tokenizer = files.read(functools.partial(build_tokenizer, config), tokenizer_setting(config))
    settings = model_settings(config, tokenizer) if resume is None else load_config(resume / MODEL)
    with torch.device("meta"):
        model = UniGenDet(settings)
    check_settings(config, model)
    weights = "model.checkpoint" if resume is None else "resume"
    files.read(functools.partial(_check_weights, config, resume, model), weights)
    builder, load = None, functools.partial(build_autoencoder, settings.latent, config.model.autoencoder)
    autoencoder = files.read(load, "model.autoencoder")
    if tokenizer is not None:
        with naming_setting(tokenizer_setting(config)):
            check_tokenizer(tokenizer, settings)
        builder = sample_builder(config, settings, tokenizer, autoencoder)
    sources = [source for one in data_sets(config, builder) for source in files.read(one.read, one.setting) or ()]
    watched = _read_watched(config, model, tokenizer, files) if config.watch.every else None
    return Parts(model, tokenizer, autoencoder, builder, sources, watched)


def rehearse(config: TrainConfig, resume: bool | str | Path = False) -> tuple[ModelConfig, list[str]]:
    """What a run would do before it loads its weights, where its files may be missing.

    Returns:
        The settings of its model, and a line for each thing that would end a run on this machine: what is not there,
        and an ``output`` that cannot be used.

    Raises:
        ValueError: as ``prepare``.
    """
    missing: list[str] = []
    checkpoint = None
    try:
        checkpoint = resume_point(config, resume)
    except (FileNotFoundError, ValueError) as error:
        missing.append(str(error))
    return prepare(config, checkpoint, missing).model.config, missing


def check_settings(config: TrainConfig, model: UniGenDet) -> None:
    """Raise ValueError, which names the setting, unless the settings fit each other and the model.

    Neither files nor the model's weights matter: it may be on the ``meta`` device.
    """
    require_data_sets(config)
    check_views(config.datasets.views, model.config, "datasets.views")
    check_autoencoder(model.config.latent, config.model.autoencoder, "model.autoencoder")
    make_stage(model, config)
    if config.watch.every:
        from unigendet.training.watch import check_watch

        require_watched(config)
        check_watch(config.watch, model)


def _check_weights(config: TrainConfig, resume: Path | None, model: UniGenDet) -> None:
    """Whether the tensors that the run begins with are there and have the model's shapes."""
    if resume is not None:
        check_weights(model, resume / MODEL)
    elif config.model.checkpoint is not None:
        check_weights(model, config.model.checkpoint, initialize=config.model.initialize)


def _read_watched(config: TrainConfig, model: UniGenDet, tokenizer: Tokenizer | None, files: _Files) -> Watched:
    from unigendet.training.watch import check_watched

    watched = read_watched(config, files.read)
    if tokenizer is not None:
        check_watched(config, watched, model, tokenizer)
    return watched


class _Files:
    """Reads what settings name. What is not there is an error, or a line in the list ``missing``, if there is one."""

    def __init__(self, config: TrainConfig, resume: Path | None, missing: list[str] | None) -> None:
        self._missing = missing
        try:
            require_wandb(config)
        except ModuleNotFoundError as error:
            self._note(error, [str(error)])
        if lost := missing_paths(config, resuming=resume is not None):
            self._note(FileNotFoundError(". ".join(lost)), lost)

    def read(self, read: Callable[[], T], *settings: str) -> T | None:
        """What ``read`` gives; None if a file that one of ``settings`` names is not there."""
        if any(line.startswith(settings) for line in self._missing or ()):
            return None
        try:
            with naming_setting(settings[0]):
                return read()
        except FileNotFoundError as error:
            self._note(error, [str(error)])
            return None

    def _note(self, error: Exception, lines: list[str]) -> None:
        if self._missing is None:
            raise error
        self._missing += lines


def missing_paths(config: TrainConfig, *, resuming: bool = False) -> list[str]:
    """A line for every setting whose file or folder is not there, which begins with its name.

    ``resuming``: the run has its model from elsewhere, and ``model.checkpoint`` only gives the tokenizer.
    """
    found = []
    for name, path, kind in _paths(config, resuming):
        if path is None or _IS[kind](Path(path)):
            continue
        there = Path(path).exists()
        found.append(f"{name} is {path!r}; " + (f"it must be a {kind}" if there else f"there is no such {kind}"))
    return found


def _paths(config: TrainConfig, resuming: bool) -> Iterator[tuple[str, str | None, str]]:
    """Every path that the run reads: setting, path, kind."""
    source, datasets, watch = config.model, config.datasets, config.watch
    if not resuming or source.tokenizer is None:
        yield "model.checkpoint", source.checkpoint, "file or folder"
    yield "model.tokenizer", source.tokenizer, "folder"
    yield "model.autoencoder", source.autoencoder, "file"
    kinds = [("captions", datasets.captions)]
    if config.stage == "gduf":
        kinds.insert(0, ("detection", datasets.detection))
    for kind, files in kinds:
        for i, one in enumerate(files):
            yield f"datasets.{kind}[{i}].file", one.file, "file or folder" if kind == "detection" else "file"
            yield f"datasets.{kind}[{i}].image_root", one.image_root, "folder"
    if watch.every:
        yield "watch.prompts_file", watch.prompts_file, "file"
        yield "watch.detection", watch.detection, "file or folder"
        yield "watch.image_root", watch.image_root, "folder"


def planned_processes(config: TrainConfig) -> int:
    """How many processes a dry run plans for: torchrun's, else as many as ``parallel`` names, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return config.parallel.replicate * (config.parallel.shard or 1)


def model_settings(config: TrainConfig, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The settings of the model that ``config.model`` names: the checkpoint's where it is there, else a preset's.

    Nothing is guessed: a checkpoint that is not there has the sizes of ``model.sizes``. ``tokenizer``: of the run, if
    it is at hand; the quickstart's preset has its vocabulary, by default that of ``model.tokenizer``.

    Raises:
        ValueError: there is nothing to have them from, or the checkpoint's are not those of ``model.sizes``.
        CheckpointError, FileNotFoundError: see ``load_config``.
    """
    source = config.model
    if source.preset is None and source.checkpoint is None:
        raise ValueError("model.checkpoint and model.preset are both null; one of them must be set")
    if source.checkpoint is not None and Path(source.checkpoint).exists():
        with naming_setting("model.checkpoint"):
            settings = load_config(source.checkpoint)
        if source.sizes is not None:
            _check_sizes(settings, source.sizes)
    elif source.checkpoint is not None and source.sizes is None:
        raise ValueError(
            f"model.checkpoint is {source.checkpoint!r}; there is no such file or folder, so its sizes are not known: "
            f"name a preset that has them, one of {sorted(PRESETS)}, say model.sizes=bagel_7b"
        )
    else:
        settings = _preset(source.preset or source.sizes, source.tokenizer, tokenizer)
    if source.align_projector is not None:
        settings = dataclasses.replace(settings, align_projector=source.align_projector)
    return settings


def _preset(name: str | None, folder: str | None, tokenizer: Tokenizer | None) -> ModelConfig:
    if name != "quickstart":
        return PRESETS[name]()
    if tokenizer is None and folder is not None and Path(folder).is_dir():
        tokenizer = load_tokenizer(folder)
    return PRESETS[name]() if tokenizer is None else PRESETS[name](tokenizer.vocab_size, tokenizer.special)


def _check_sizes(settings: ModelConfig, preset: str) -> None:
    wanted = PRESETS[preset]()
    pairs = [(name, getattr(settings, name), getattr(wanted, name)) for name in _SIZES]
    wrong = [f"{name} {have} and not {need}" for name, have, need in pairs if have != need]
    if wrong:
        raise ValueError(f"model.sizes is {preset!r}, but the checkpoint has {', '.join(wrong)}")


def resume_point(config: TrainConfig, resume: bool | str | Path) -> Path | None:
    """The checkpoint to go on from; an error if there is none, or if the run would mix with another one's files.

    Checkpoints are numbered by step and the oldest go first, so later ones than where the run goes on would outlive
    its own.
    """
    found = [] if config.output is None else checkpoints(_folder(config.output))
    if isinstance(resume, str | Path):
        point = Path(resume)
        if not point.is_dir():
            raise FileNotFoundError(f"no checkpoint at {resume}: there is no such folder")
    elif resume and not found:
        raise FileNotFoundError(f"nothing to resume: output folder {config.output} holds no checkpoints")
    else:
        point = found[-1] if resume else None
    if not found:
        return point
    places = [path.resolve() for path in found]
    if point is None or point.resolve() not in places:
        raise ValueError(
            f"output is {config.output!r}, which holds checkpoints of another run; resume it or name another"
        )
    later = [path.name for path in found[places.index(point.resolve()) + 1 :]]
    if later:
        raise ValueError(
            f"resume is {str(resume)!r}, but output {config.output!r} holds later checkpoints: {', '.join(later)}; "
            "it must be the newest one (remove the later ones, or name another output)"
        )
    return point


def _folder(output: str) -> str:
    """The output folder, which exists or can be made."""
    nearest = next(path for path in (Path(output), *Path(output).absolute().parents) if path.exists())
    what = f"{nearest} is a file" if not nearest.is_dir() else f"{nearest} cannot be written to"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output is {output!r}; it must be a folder, or be one that can be made, but {what}")
    return output
