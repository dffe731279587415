"""From settings to a finished run: model, tokenizer, autoencoder, data, stage, trainer."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from unigendet.config import DataConfig
from unigendet.data.datasets import SampleBuilder, save_data_config
from unigendet.data.loader import Loader
from unigendet.data.tokenizer import Tokenizer
from unigendet.device import find_device
from unigendet.model.autoencoder import FluxAutoencoder, PixelAutoencoder, build_autoencoder
from unigendet.model.checkpoint import load_pretrained
from unigendet.model.new_weights import new_model
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import TrainConfig
from unigendet.training.parallel import Parallel, processes
from unigendet.training.preflight import check_run, model_settings
from unigendet.training.signals import StopSignals
from unigendet.training.sources import build_sources, build_tokenizer
from unigendet.training.stages import make_stage
from unigendet.training.state import MODEL, checkpoints
from unigendet.training.trainer import Trainer, TrainResult

if TYPE_CHECKING:
    from unigendet.training.watch import Watcher

Autoencoder = PixelAutoencoder | FluxAutoencoder
Shard = Callable[[UniGenDet], UniGenDet]


def train(
    config: TrainConfig,
    *,
    resume: bool | str | Path = False,
    console: Console | None = None,
    quiet: bool = False,
    catch_signals: bool = False,
) -> TrainResult:
    """Run one stage of training as ``config`` says.

    Args:
        config: everything about the run.
        resume: go on from a checkpoint folder; True: from the newest one in ``config.output``.
        console: where progress goes; default: standard error.
        quiet: show no progress.
        catch_signals: SIGTERM and SIGINT end the run after the present step, with a checkpoint (``signals``).

    Raises:
        FileNotFoundError: a file or folder that the settings or ``resume`` name does not exist.
        ModuleNotFoundError: the settings need a package that is not installed; names the extra that brings it.
        ValueError: the settings do not fit each other or the data; a checkpoint does not fit the run; the checkpoints
            in ``config.output`` are another run's, or later than the one to go on from.
        TrainingError, SaveError: see ``Trainer.run``.
    """
    with processes(config) as parallel:
        trainer = build_trainer(config, parallel, resume=resume, console=console, quiet=quiet)
        with StopSignals() if catch_signals else contextlib.nullcontext() as stop:
            return trainer.run(stop=stop)


def build_trainer(
    config: TrainConfig,
    parallel: Parallel | None = None,
    *,
    resume: bool | str | Path = False,
    console: Console | None = None,
    quiet: bool = False,
) -> Trainer:
    """The run that ``train`` runs, at its first step or where the checkpoint left it. Arguments and errors: its.

    ``parallel``: this process among those of the run; default: the only one.
    """
    if parallel is None:
        parallel = Parallel(device=find_device(config.device), config=config.parallel)
    checkpoint = _resume_point(config, resume)
    check_run(config, checkpoint)
    make_watcher = prepare_watcher(config, parallel)
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config)
    shard = functools.partial(parallel.shard, precision=config.precision) if parallel.sharded else None
    model = build_model(config, tokenizer, parallel.device, checkpoint, shard)
    autoencoder = build_autoencoder(model.config.latent, config.model.autoencoder).to(parallel.device)
    batches = build_loader(config, model, tokenizer, autoencoder, parallel)
    watch = make_watcher and make_watcher(model, tokenizer, autoencoder)
    stage = make_stage(model, config, shard)
    beside = companions(tokenizer, config.datasets.views)
    trainer = Trainer(
        stage, batches, config, companions=beside, parallel=parallel, watch=watch, console=console, quiet=quiet
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer


def build_model(
    config: TrainConfig,
    tokenizer: Tokenizer,
    device: torch.device | str,
    resume: Path | None = None,
    shard: Shard | None = None,
) -> UniGenDet:
    """The model to start from, float32: from ``resume`` (a checkpoint folder of a run), or as ``config.model`` says.

    ``shard``: divides the parameters among the processes of a run. Of a checkpoint each then reads its own part only,
    and new weights are drawn on the CPU (``new_weights``); without it they are drawn on ``device``.
    """
    source = config.model
    if resume is not None:
        return load_pretrained(resume / MODEL, device=device, shard=shard)
    if source.checkpoint is not None:
        sizes = None if source.align_projector is None else model_settings(config, tokenizer)
        options = {"config": sizes, "device": device, "initialize": source.initialize, "shard": shard}
        return load_pretrained(source.checkpoint, **options)
    sizes = model_settings(config, tokenizer)
    if shard is not None:
        return new_model(sizes, shard)
    with torch.device(device):
        return UniGenDet(sizes)


def companions(tokenizer: Tokenizer, views: DataConfig) -> list[Callable[[Path], None]]:
    """What makes a checkpoint's ``model/`` and ``ema/`` folders that can judge and make images, for ``Trainer``."""
    return [tokenizer.save, functools.partial(save_data_config, config=views)]


def prepare_watcher(
    config: TrainConfig, parallel: Parallel | None = None
) -> Callable[[UniGenDet, Tokenizer, Autoencoder], Watcher] | None:
    """What makes the ``Watcher`` of a run out of its parts, with all that it looks at read; None without looks.

    Errors: see ``watched.read_watched``, so that a mistake shows before a model is loaded.
    """
    if not config.watch.every:
        return None
    from unigendet.inference.pipeline import Pipeline
    from unigendet.training.watch import Watcher
    from unigendet.training.watched import read_watched

    watched = read_watched(config)

    def make(model: UniGenDet, tokenizer: Tokenizer, autoencoder: Autoencoder) -> Watcher:
        all_ended = parallel.all if parallel is not None and parallel.sharded else None
        pipeline = Pipeline(model, tokenizer, autoencoder, config.datasets.views, all_ended=all_ended)
        return Watcher(config, pipeline, watched, parallel)

    return make


def build_loader(
    config: TrainConfig,
    model: UniGenDet,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder | None = None,
    parallel: Parallel | None = None,
) -> Loader:
    """The endless stream of batches for ``config.stage``, of them those of this process (``parallel``).

    A FLUX autoencoder encodes in this process, on its device; pixel latents are made by the data workers.
    ``autoencoder``: default: a new one, as ``config.model`` says, on the model's device.
    """
    datasets = config.datasets
    if autoencoder is None:
        autoencoder = build_autoencoder(model.config.latent, config.model.autoencoder).to(model.device)
    here = model.config.latent.autoencoder == "flux"
    encode = autoencoder.encode if here else None
    builder = SampleBuilder(model.config, tokenizer, datasets.views, encode=None if here else autoencoder.encode)
    return Loader(
        build_sources(config, builder),
        config.loader,
        length=builder.length,
        model=model.config,
        dropout=config.dropout,
        encode=encode,
        rank=0 if parallel is None else parallel.rank,
        world_size=1 if parallel is None else parallel.world_size,
    )


def _folder(output: str) -> str:
    """The output folder, which exists or can be made."""
    nearest = next(path for path in (Path(output), *Path(output).absolute().parents) if path.exists())
    what = f"{nearest} is a file" if not nearest.is_dir() else f"{nearest} cannot be written to"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output is {output!r}; it must be a folder, or be one that can be made, but {what}")
    return output


def _resume_point(config: TrainConfig, resume: bool | str | Path) -> Path | None:
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
