"""A run of a tiny model with its data, held-out images, and the watcher that its settings ask for."""

import json

import torch
from run_data import write_run_data, write_run_settings
from training_fixtures import tiny_model

from unigendet.config_file import load_settings
from unigendet.data.tokenizer import load_tokenizer
from unigendet.model.autoencoder import build_autoencoder
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


def make_trainer(data, file, *overrides, console=None):
    """A trainer of a tiny model, with the watcher that the settings in ``file`` ask for."""
    config = load_settings(TrainConfig, file, overrides)
    tokenizer = load_tokenizer(data / "tokenizer")
    model = tiny_model(vocab_size=280, max_position=512)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)  # so that weights and prompts show in the samples
    watcher = prepare_watcher(config)
    return Trainer(
        make_stage(model, config),
        build_loader(config, model, tokenizer),
        config,
        watch=watcher and watcher(model, tokenizer, build_autoencoder(model.config.latent)),
        console=console,
        quiet=console is None,
    )


def rows_of(folder, name="watch.jsonl"):
    """The rows of a run's file."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
