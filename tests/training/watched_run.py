"""A run of a tiny model with its data, held-out images, and the watcher that its settings ask for."""

import json
import signal

import torch
from run_data import write_run_data, write_run_settings
from training_fixtures import tiny_model

from unigendet.config_file import load_settings
from unigendet.data.tokenizer import load_tokenizer
from unigendet.inference import pipeline as pipeline_module
from unigendet.model.autoencoder import build_autoencoder
from unigendet.training import watch as watch_module
from unigendet.training.config import TrainConfig
from unigendet.training.run import build_loader, prepare_watcher
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer


def write_data(folder):
    """Six images of 8×8 pixels, annotated for both tasks, a tokenizer, and held-out images in a folder of their own."""
    write_run_data(folder)
    (folder / "held_out").mkdir()
    write_run_data(folder / "held_out")


def write_settings(data, folder):
    """Settings of a run on ``data``, with looks, that writes to ``folder``/out; their file."""
    settings = {
        "total_steps": 4,
        "log_every": 2,
        "loader": {"max_tokens": 800, "max_sample_tokens": 400},
        "optimizer": {"lr": 1e-2, "eps": 1e-8, "warmup_steps": 1},
        "watch": {
            "every": 2,
            "prompts": ["picture 1", "picture"],
            "count": 3,
            "guidance": {"num_timesteps": 3, "text_scale": 2.0},
            "detection": str(data / "held_out" / "detection.json"),
            "limit": 4,
        },
    }
    return write_run_settings(folder / "run.yaml", data, folder / "out", **settings)


def make_trainer(data, file, *overrides, console=None, parallel=None, change=lambda model: None):
    """A trainer of a tiny model, with the watcher that the settings in ``file`` ask for.

    ``change`` is applied to the model before several processes divide it.
    """
    config = load_settings(TrainConfig, file, overrides)
    tokenizer = load_tokenizer(data / "tokenizer")
    model = tiny_model(vocab_size=280, max_position=512)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)  # so that weights and prompts show in the samples
    change(model)
    shard = parallel.shard if parallel is not None and parallel.sharded else None
    model = shard(model) if shard else model
    watcher = prepare_watcher(config, parallel)
    return Trainer(
        make_stage(model, config, shard),
        build_loader(config, model, tokenizer, parallel=parallel),
        config,
        parallel=parallel,
        watch=watcher and watcher(model, tokenizer, build_autoencoder(model.config.latent)),
        console=console,
        quiet=console is None,
    )


def note_while(monkeypatch, made, stop, where, at):
    """``stop`` notes a signal at the first image, or step of sampling, of the look after step ``at``.

    Returns a list of the steps after which there was an image, or step of sampling.
    """
    seen = []

    def note():
        seen.append(made.state.step)
        if made.state.step == at:
            stop.received = signal.SIGTERM

    if where == "judging":
        outcome = watch_module.judge

        def judge(*arguments, **options):
            for each in outcome(*arguments, **options):
                note()
                yield each

        monkeypatch.setattr(watch_module, "judge", judge)
    else:
        inner = pipeline_module.generate_latents

        def generate(*arguments, progress, **options):
            return inner(*arguments, progress=lambda *done: (note(), progress(*done)), **options)

        monkeypatch.setattr(pipeline_module, "generate_latents", generate)
    return seen


def rows_of(folder, name="watch.jsonl"):
    """The rows of a run's file."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
