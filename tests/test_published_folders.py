"""Folders as BAGEL and UniGenDet are published: opened as they are, to generate, to judge, to train from."""

import json

import numpy as np
import published_folder
import pytest
import torch
from PIL import Image
from published_folder import (
    LLM,
    PATCHES,
    VIT,
    config,
    model_weights,
    write_autoencoder,
    write_settings,
    write_tokenizer,
    write_weights,
)
from safetensors.torch import save_file

from unigendet.config import DataConfig, GuidanceConfig, SpecialTokens
from unigendet.inference.pipeline import Pipeline
from unigendet.model import autoencoder
from unigendet.model.checkpoint import CheckpointError, load_config, published_state_dict, stored_config, weight_files
from unigendet.model.unigendet import UniGenDet


@pytest.fixture(scope="module")
def bagel(tmp_path_factory):
    """A whole BAGEL folder."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("BAGEL-7B-MoT")
    write_settings(folder)
    write_weights(folder, model_weights())
    write_tokenizer(folder)
    write_autoencoder(folder)
    index = {
        "metadata": {},
        "weight_map": {"language_model.model.norm.weight": "ema.safetensors", "x": "ae.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def small_autoencoder(tmp_path, monkeypatch):
    """The autoencoder that ``ae.safetensors`` is read into has the small folder's sizes."""
    (tmp_path / "flux.json").write_text(json.dumps(published_folder.AUTOENCODER))
    monkeypatch.setattr(autoencoder, "_FLUX_CONFIG", tmp_path / "flux.json")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_a_bagel_folder_generates_and_judges(bagel, small_autoencoder, picture):
    pipeline = Pipeline.from_pretrained(bagel)
    assert pipeline.model.config == config(class_head=False, align_head=False)
    assert pipeline.data == DataConfig()
    assert pipeline.guidance == GuidanceConfig()
    assert pipeline.tokenizer.special == SpecialTokens()
    ids = pipeline.tokenizer.encode("the cat is")
    assert pipeline.tokenizer.decode(ids) == "the cat is"
    assert len(ids) < len("the cat is")  # the merges are in use
    image, other = pipeline.generate(["a cat", "a dog"], size=(32, 48), guidance=GuidanceConfig(num_timesteps=3))
    assert image.size == (48, 32)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 0
    assert image.tobytes() != other.tobytes()
    (verdict,) = pipeline.detect([picture], max_new_tokens=3)
    assert verdict.probability is None  # no head: the text decides, which these weights cannot write
    assert verdict.verdict == "undecided"


def test_a_unigendet_folder_judges_with_its_head(bagel, small_autoencoder, picture, tmp_path):
    folder = tmp_path / "UniGenDet"
    folder.mkdir()
    write_settings(folder)
    (folder / "config.json").unlink()
    weights = model_weights(heads=True, kernel=True)
    write_weights(folder, weights, shards=3)
    write_tokenizer(folder)
    pipeline = Pipeline.from_pretrained(folder, autoencoder=bagel / "ae.safetensors")
    assert pipeline.model.config == config()
    (verdict,) = pipeline.detect([picture], max_new_tokens=0)
    assert 0 < verdict.probability < 1
    loaded = published_state_dict(pipeline.model)
    linear = weights.pop(PATCHES).permute(0, 2, 3, 1).reshape(16, 588)
    assert torch.equal(loaded.pop(PATCHES), linear.float())
    assert all(torch.equal(value, weights[name].float()) for name, value in loaded.items())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kernel", [False, True])
def test_every_form_of_the_weights(tmp_path, shards, kernel):
    write_settings(tmp_path)
    write_weights(tmp_path, model_weights(kernel=kernel), shards)
    model = UniGenDet.from_pretrained(tmp_path, config=stored_config(tmp_path))
    expected = model_weights()
    assert all(torch.equal(value, expected[name].float()) for name, value in published_state_dict(model).items())


def test_a_bagel_folder_without_heads_wants_them_named(bagel):
    with pytest.raises(CheckpointError, match="To start fake_cls_head and diga_mlp afresh, name them in initialize"):
        UniGenDet.from_pretrained(bagel)
    model = UniGenDet.from_pretrained(bagel, initialize=["fake_cls_head", "diga_mlp"])
    assert model.config == config()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_averaged_weights_go_first(tmp_path):
    """BAGEL's own trainer leaves both files; its inference reads the average."""
    write_settings(tmp_path)
    write_weights(tmp_path, model_weights())
    save_file(model_weights(seed=1), tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "ema.safetensors"]


def test_settings_as_newer_versions_write_them(tmp_path):
    """transformers 5 nests rope_theta and says ``dtype``; a whole SigLIP's settings nest the vision part."""
    llm = {name: value for name, value in LLM.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    llm |= {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": 4}
    (tmp_path / "llm_config.json").write_text(json.dumps(llm))
    vision = VIT | {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "dtype": "float32"}
    (tmp_path / "vit_config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    assert load_config(tmp_path) == config()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llm_config.json", {"hidden_act": "gelu"}, r"hidden_act of llm_config.json is 'gelu'; it must be 'silu'"),
        ("llm_config.json", {"rope_scaling": {"type": "yarn"}}, r"rope_scaling of .* must be None"),
        ("llm_config.json", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type of .* must be 'default'"),
        ("llm_config.json", {"use_sliding_window": True}, "use_sliding_window of .* must be False"),
        ("llm_config.json", {"head_dim": 8}, "head_dim of .* is 8; it must be hidden_size / num_attention_heads"),
        ("vit_config.json", {"hidden_act": "gelu"}, r"hidden_act of vit_config.json is 'gelu'"),
        ("vit_config.json", {"vision_config": 3}, "vit_config.json do not hold a model's settings"),
    ],
)
def test_settings_that_the_model_does_not_compute(tmp_path, name, changes, message):
    write_settings(tmp_path)
    values = json.loads((tmp_path / name).read_text()) | changes
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_another_models_config_alone_is_not_enough(tmp_path):
    write_settings(tmp_path)
    (tmp_path / "vit_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no settings of ours \(config.json is another model's\) in"):
        load_config(tmp_path)
