from pathlib import Path

import pytest

from unigendet.config import ImageConfig
from unigendet.config_file import load_settings
from unigendet.quickstart import QuickstartConfig
from unigendet.training.config import AnnotationFile, LossWeights, TrainConfig, load_train_config

CONFIGS = Path(__file__).parents[2] / "configs"

TEXT = """
stage: diga
optimizer: {lr: 1e-3, betas: [0.8, 0.9]}
datasets:
  captions:
    - {file: a.json, weight: 2}
    - file: b.json
  views:
    latent_view: {min_size: 8, max_size: 8, stride: 2}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return to_file


def test_file_and_overrides(write):
    config = load_train_config(
        write(TEXT), ["optimizer.lr=1e-4", "--total_steps=7", "--ema_decay", "null", "--seed", "1"]
    )
    assert (config.stage, config.total_steps, config.ema_decay, config.seed) == ("diga", 7, None, 1)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (1e-4, (0.8, 0.9), 1.0)
    assert config.datasets.captions == (AnnotationFile("a.json", weight=2.0), AnnotationFile("b.json"))
    assert config.datasets.views.latent_view == ImageConfig(8, 8, 2)
    assert config.losses == LossWeights()
    assert load_settings(TrainConfig) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("total_step: 3", [], "total_step"),
        ("optimizer: {lrr: 1}", [], "lrr"),
        ("optimizer: 3", [], "settings of .*run.yaml"),
        ("datasets: {captions: [{fil: x}]}", [], "fil"),
        ("total_steps: [", [], "settings of .*run.yaml"),
        ("seed: 0", ["optimizer.lrr=1"], "lrr"),
        ("seed: 0", ["optimizer.lr=fast"], r"optimizer\.lr"),
        ("seed: 0", ["total_steps=1.5"], "total_steps"),
        ("seed: 0", ["stage=dica"], "stage"),
        ("seed: 0", ["total_steps"], "overrides has 'total_steps' without a value; it must be name=value"),
        ("seed: 0", ["--total_steps"], "overrides has '--total_steps' without a value"),
        ("seed: 0", ["--total_steps", "--seed=1"], "overrides has '--total_steps=--seed=1' without a value"),
        ("seed: 0", ["optimizer.lr=-1"], r"optimizer\.lr is -1.0; it must be positive"),
        (
            "seed: 0",
            ["optimizer.warmup_steps=2000"],
            r"optimizer\.warmup_steps is 2000; it must be at most total_steps",
        ),
        ("seed: 0", ["ema_decay=1"], r"ema_decay is 1.0; it must be in \[0, 1\)"),
        ("seed: 0", ["losses.diga=-0.1"], r"losses\.diga is -0.1; it must be at least 0"),
        ("seed: 0", ["dropout.text=2"], r"dropout\.text is 2.0; it must be a probability"),
        ("seed: 0", ["model.preset=bagel"], "model.preset is 'bagel'; it must be one of"),
        ("seed: 0", ["model.preset=quickstart", "model.checkpoint=x"], "a preset or a checkpoint, not both"),
        ("datasets: {captions: [{file: x, weight: 0}]}", [], "weight of x is 0.0; it must be positive"),
    ],
)
def test_mistakes_are_named(write, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_train_config(write(text), overrides)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_train_config(tmp_path / "nowhere.yaml")


def test_published_recipes():
    """docs/model.md §11, except for the warm-up, which must fit (§12.7)."""
    gduf, diga = (load_train_config(CONFIGS / f"{name}_bagel7b.yaml") for name in ("gduf", "diga"))
    for config in (gduf, diga):
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (2e-5, (0.9, 0.95), 1e-15, 0)
        assert (optimizer.clip, config.precision, config.loader.max_sample_tokens) == (1.0, "bf16", 16384)
        assert optimizer.warmup(config.total_steps) < config.total_steps / 10
        assert (config.dropout.text, config.dropout.latent, config.dropout.vit) == (0.1, 0.3, 0.3)
    assert (gduf.stage, gduf.total_steps, gduf.ema_decay, gduf.loader.max_tokens) == ("gduf", 1000, 0.99, 32768)
    assert (diga.stage, diga.total_steps, diga.ema_decay, diga.loader.max_tokens) == ("diga", 500, 0.95, 23000)
    assert (diga.align_layer, diga.teacher_layer, diga.losses.diga) == (8, 8, 0.5)
    assert (gduf.losses.mse, gduf.losses.ce, gduf.losses.label) == (1.0, 1.0, 0.2)


def test_quickstart_has_both_stages(write):
    both = load_settings(QuickstartConfig, CONFIGS / "quickstart.yaml", ["diga.total_steps=3"])
    assert (both.gduf.stage, both.diga.stage, both.diga.total_steps) == ("gduf", "diga", 3)
    assert both.gduf.model.preset == "quickstart"
    with pytest.raises(ValueError, match=r"diga\.stage is 'gduf'; it must be 'diga'"):
        load_settings(QuickstartConfig, CONFIGS / "quickstart.yaml", ["diga.stage=gduf"])
