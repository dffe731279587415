"""Running a command in the test's own process, and a small model folder for it."""

import numpy as np
from PIL import Image
from run_data import ANSWERS
from tiny_models import tiny_model

from unigendet.cli import main
from unigendet.config import DataConfig, ImageConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import PixelAutoencoder

VIEW = ImageConfig(min_size=8, max_size=8, stride=2)


class Result:
    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err
        self.lines = self.out.splitlines()
        assert "Traceback" not in self.err


def run_command(capsys, *arguments):
    """The exit code of ``unigendet *arguments`` and what it printed."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:
        code = end.code
    return Result(code, capsys.readouterr())


def tiny_pipeline(**changes):
    model = tiny_model(vocab_size=280, **changes)
    tokenizer = train_tokenizer(ANSWERS, 270)
    return Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(VIEW, VIEW))


def noise_picture(seed, width=9, height=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
