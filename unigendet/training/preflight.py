"""Mistakes in a run's settings that show before anything is loaded: paths, and layers that the model does not have.

A run calls ``check_run`` once it knows its processes, which ``parallel.mesh_shape`` checks. ``train --dry-run`` makes
the same checks, but takes files that are not there for a warning.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from unigendet.config import PRESETS, ModelConfig, check
from unigendet.data.tokenizer import Tokenizer, load_tokenizer
from unigendet.model.settings import load_config
from unigendet.training.config import TrainConfig
from unigendet.training.state import MODEL
from unigendet.training.tracking import require_wandb

_IS = {"file": Path.is_file, "folder": Path.is_dir, "file or folder": Path.exists}
# What a checkpoint must share with the preset that model.sizes names.
_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")


def check_run(config: TrainConfig, resume: Path | None = None) -> None:
    """Check everything that can be checked without loading weights or data.

    ``resume``: the folder that the run goes on from, with a model of its own.

    Raises:
        ModuleNotFoundError: the settings need a package that is not installed.
        FileNotFoundError: a file or folder that a setting names is not there; names the setting.
        ValueError: a layer is not the model's; names the setting.
    """
    require_wandb(config)
    check_paths(config, resuming=resume is not None)
    if config.stage == "diga" and (resume is not None or config.model.checkpoint or config.model.preset):
        check_layers(config, load_config(resume / MODEL) if resume is not None else model_settings(config))


def check_paths(config: TrainConfig, *, resuming: bool = False) -> None:
    """Raise FileNotFoundError that names every setting whose file or folder is not there.

    ``resuming``: the run has its model from elsewhere, and ``model.checkpoint`` only gives the tokenizer.
    """
    if missing := missing_paths(config, resuming=resuming):
        raise FileNotFoundError(". ".join(missing))


def missing_paths(config: TrainConfig, *, resuming: bool = False) -> list[str]:
    """What ``check_paths`` complains of, a line each."""
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


def check_layers(config: TrainConfig, model: ModelConfig) -> None:
    """Raise ValueError if DIGA's layers are not among the model's."""
    if config.stage != "diga":
        return
    for name in ("align_layer", "teacher_layer"):
        layer, need = getattr(config, name), f"in 1..{model.num_layers}, the model's decoder layers"
        check(1 <= layer <= model.num_layers, name, layer, need)


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
