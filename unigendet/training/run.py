"""From settings to a finished run: model, tokenizer, autoencoder, data, stage, trainer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from unigendet.config import DataConfig
from unigendet.data.datasets import SampleBuilder, save_data_config
from unigendet.data.loader import Loader
from unigendet.data.shards import Source
from unigendet.data.tokenizer import Tokenizer
from unigendet.device import find_device
from unigendet.model.autoencoder import FluxAutoencoder, PixelAutoencoder, build_autoencoder
from unigendet.model.checkpoint import load_pretrained
from unigendet.model.new_weights import new_model
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import TrainConfig
from unigendet.training.parallel import Parallel, processes
from unigendet.training.preflight import Parts, model_settings, prepare, resume_point
from unigendet.training.signals import StopSignals
from unigendet.training.sources import build_sources, encodes_here, sample_builder
from unigendet.training.stages import make_stage
from unigendet.training.state import MODEL
from unigendet.training.trainer import Trainer, TrainResult
from unigendet.training.watched import Watched, read_watched

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
        ToldElsewhere: another process of the run raises the same error of the settings or files.
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
    checkpoint, parts = parallel.alike(functools.partial(_everything_but_weights, config, resume))
    torch.manual_seed(config.seed)
    shard = functools.partial(parallel.shard, precision=config.precision) if parallel.sharded else None
    model = build_model(config, parts.tokenizer, parallel.device, checkpoint, shard)
    autoencoder = parts.autoencoder.to(parallel.device)
    batches = _loader(config, parts.builder, parts.sources, autoencoder, parallel)
    make_watcher = prepare_watcher(config, parallel, parts.watched)
    watch = make_watcher and make_watcher(model, parts.tokenizer, autoencoder)
    stage = make_stage(model, config, shard)
    beside = companions(parts.tokenizer, config.datasets.views)
    trainer = Trainer(
        stage, batches, config, companions=beside, parallel=parallel, watch=watch, console=console, quiet=quiet
    )
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer


def _everything_but_weights(config: TrainConfig, resume: bool | str | Path) -> tuple[Path | None, Parts]:
    """The checkpoint to go on from, and all that is made before a model is loaded, which may take minutes."""
    checkpoint = resume_point(config, resume)
    return checkpoint, prepare(config, checkpoint)


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
    config: TrainConfig, parallel: Parallel | None = None, watched: Watched | None = None
) -> Callable[[UniGenDet, Tokenizer, Autoencoder], Watcher] | None:
    """What makes the ``Watcher`` of a run out of its parts, with all that it looks at read; None without looks.

    ``watched``: what ``read_watched`` gave; default: it is read now. Errors: see there.
    """
    if not config.watch.every:
        return None
    from unigendet.inference.pipeline import Pipeline
    from unigendet.training.watch import Watcher

    watched = read_watched(config) if watched is None else watched

    def make(model: UniGenDet, tokenizer: Tokenizer, autoencoder: Autoencoder) -> Watcher:
        all_ended = parallel.all if parallel is not None and parallel.sharded else None
        pipeline = Pipeline(model, tokenizer, autoencoder, config.datasets.views, all_ended=all_ended)
        return Watcher(config, pipeline, watched, parallel)

    return make


def build_loader(
    config: TrainConfig, model: UniGenDet, tokenizer: Tokenizer, parallel: Parallel | None = None
) -> Loader:
    """The endless stream of batches for ``config.stage``; of several processes, of those that this one gets.

    A FLUX autoencoder encodes in this process, on the model's device; pixel latents are made by the data workers.
    """
    autoencoder = build_autoencoder(model.config.latent, config.model.autoencoder).to(model.device)
    builder = sample_builder(config, model.config, tokenizer, autoencoder)
    return _loader(config, builder, build_sources(config, builder), autoencoder, parallel or Parallel())


def _loader(
    config: TrainConfig, builder: SampleBuilder, sources: list[Source], autoencoder: Autoencoder, parallel: Parallel
) -> Loader:
    """Of the batches, those of this process."""
    return Loader(
        sources,
        config.loader,
        length=builder.length,
        model=builder.model,
        dropout=config.dropout,
        encode=autoencoder.encode if encodes_here(builder.model) else None,
        rank=parallel.rank,
        world_size=parallel.world_size,
    )
