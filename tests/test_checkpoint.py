"""Weights in and out under the published names: round trips, BAGEL folders, and every way a file can be wrong."""

import dataclasses
import json

import pytest
import torch
from golden import Golden
from safetensors.torch import load_file, save_file

from unigendet.config import ModelConfig, VisionConfig, quickstart
from unigendet.model import shards as shards_module
from unigendet.model.checkpoint import (
    CheckpointError,
    load_config,
    load_pretrained,
    load_weights,
    published_names,
    published_state_dict,
    save_pretrained,
    stored_config,
    weight_files,
)
from unigendet.model.unigendet import UniGenDet

TINY = dataclasses.replace(
    quickstart(vocab_size=16),
    hidden_size=16,
    intermediate_size=12,
    num_layers=2,
    vision=dataclasses.replace(quickstart().vision, hidden_size=8, intermediate_size=12, num_channels=3),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = UniGenDet(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def published(model):
    """Copies of all weights, to be changed and saved."""
    return {name: value.detach().clone() for name, value in published_state_dict(model).items()}


def test_round_trip(model, tmp_path):
    save_pretrained(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    again = UniGenDet.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert_equal(again, model)
    assert_equal(UniGenDet.from_pretrained(tmp_path / "new" / "folder" / "model.safetensors"), model)
    half = UniGenDet.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())


def test_published_names_are_those_of_the_golden_files(golden_file, tmp_path):
    golden = Golden.read(golden_file)
    expected = golden.named("model.")
    with torch.device("meta"):
        mine = published_state_dict(UniGenDet(golden.config))
    unused = {name for name in expected if name.startswith("latent_to_vit_connector.")}
    assert mine.keys() == expected.keys() - unused
    for name, value in mine.items():
        assert value.shape == expected[name].shape, name
    save_pretrained(golden.model(tmp_path, "auto"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == mine.keys()
    for name, value in written.items():
        assert torch.equal(value, expected[name]), name


def test_fused_parameters_are_cut_in_the_right_places(model):
    """q, k and v have 4, 2 and 2 heads here; the ViT's are equal."""
    weights = published_state_dict(model)
    head_dim = TINY.head_dim
    fused = model.decoder.layers[1].qkv.gen.weight
    layer = "language_model.model.layers.1.self_attn.{}_proj_moe_gen.weight"
    assert torch.equal(weights[layer.format("q")], fused[: 4 * head_dim])
    assert torch.equal(weights[layer.format("k")], fused[4 * head_dim : 6 * head_dim])
    assert torch.equal(weights[layer.format("v")], fused[6 * head_dim :])
    gate_up = model.decoder.layers[0].gate_up.und.weight
    assert torch.equal(weights["language_model.model.layers.0.mlp.gate_proj.weight"], gate_up[:12])
    assert torch.equal(weights["language_model.model.layers.0.mlp.up_proj.weight"], gate_up[12:])
    vit = model.vision.layers[1].qkv.bias
    assert torch.equal(weights["vit_model.vision_model.encoder.layers.1.self_attn.k_proj.bias"], vit[8:16])
    with pytest.raises(KeyError, match=r"'decoder.other' has no published name"):
        published_names("decoder.other")


def test_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 8000)
    save_pretrained(model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    assert len(shards) >= 3
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert not (tmp_path / "model.safetensors").exists()
    sizes = []
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sorted(tensors) == sorted(name for name, file in index.items() if file == shard)
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        assert sizes[-1] <= 8000 or len(tensors) == 1
    assert sum(sizes) == sum(t.numel() * t.element_size() for t in published_state_dict(model).values())
    assert_equal(UniGenDet.from_pretrained(tmp_path), model)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not there: .*{shards[1]}"):
        UniGenDet.from_pretrained(tmp_path)


@pytest.mark.parametrize("sizes", [(8000, 10**9), (10**9, 8000), (4000, 8000), (8000, 8000)])
def test_a_later_save_replaces_an_earlier_one(model, tmp_path, monkeypatch, sizes):
    """Also when it has another number of shards: nothing of the first may be found again."""
    monkeypatch.setattr(shards_module, "SHARD_BYTES", sizes[0])
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    monkeypatch.setattr(shards_module, "SHARD_BYTES", sizes[1])
    save_pretrained(model, tmp_path)
    assert_equal(UniGenDet.from_pretrained(tmp_path), model)
    assert set(weight_files(tmp_path)) == set(tmp_path.glob("*.safetensors"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("bytes_per_shard", [8000, 10**9])
def test_an_interrupted_save_leaves_the_old_weights(model, tmp_path, monkeypatch, bytes_per_shard):
    monkeypatch.setattr(shards_module, "SHARD_BYTES", bytes_per_shard)
    save_pretrained(model, tmp_path)
    before = published(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    written = []

    def full_disk(tensors, path, **options):
        path.write_bytes(b"half a file")
        written.append(path)
        if len(written) == (2 if bytes_per_shard == 8000 else 1):
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            save_pretrained(model, tmp_path)
    loaded = published(UniGenDet.from_pretrained(tmp_path))
    assert all(torch.equal(loaded[name], value) for name, value in before.items())
    save_pretrained(model, tmp_path)
    assert_equal(UniGenDet.from_pretrained(tmp_path), model)


def test_patch_embedding_as_a_convolution(model, tmp_path):
    """The published kernel [out, channel, row, column] becomes a row of (row, column, channel)."""
    weights = published(model)
    name = "vit_model.vision_model.embeddings.patch_embedding.weight"
    kernel = torch.randn(8, 3, 2, 2)
    weights[name] = kernel
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load_pretrained(tmp_path / "w.safetensors", config=TINY)
    image = torch.randn(1, 3, 4, 6)
    bias = loaded.vision.patch_embedding.bias
    expected = torch.nn.functional.conv2d(image, kernel, bias, stride=2).flatten(2)[0].T
    from unigendet.packing import patchify

    torch.testing.assert_close(loaded.vision.patch_embedding(patchify(image[0], 2)), expected)
    weights[name] = torch.randn(8, 3, 4, 2)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight is \[8, 24\], the model needs \[8, 12\]"):
        load_pretrained(tmp_path / "w.safetensors", config=TINY)


LLM = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "architectures": ["Qwen2ForCausalLM"],
}
VIT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 980,
    "model_type": "siglip_vision_model",
}


@pytest.fixture
def bagel(tmp_path):
    """A folder as BAGEL's release has it: no heads of ours, an unused last ViT layer left out."""
    (tmp_path / "llm_config.json").write_text(json.dumps(LLM))
    (tmp_path / "vit_config.json").write_text(json.dumps(VIT))
    torch.manual_seed(0)
    source = UniGenDet(load_config(tmp_path))
    weights = {
        name: value for name, value in published(source).items() if not name.startswith(("fake_cls_head.", "diga_mlp."))
    }
    save_file(weights, tmp_path / "ema.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "ae.safetensors")
    return tmp_path, weights


def test_bagel_folder(bagel):
    folder, weights = bagel
    config = load_config(folder)
    assert config == ModelConfig(
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position=4096,
        vision=VisionConfig(hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2),
    )
    with pytest.raises(CheckpointError, match=r"10 missing: fake_cls_head.0.weight, .*diga_mlp.2.bias"):
        load_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=r"4 missing: diga_mlp.0.weight, .*diga_mlp.2.bias\. To start diga_mlp afresh"
    ):
        load_pretrained(folder, initialize=["fake_cls_head"])
    torch.manual_seed(3)
    model = load_pretrained(folder, initialize=["fake_cls_head", "diga_mlp"])
    loaded = published_state_dict(model)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    without = dataclasses.replace(config, class_head=False, align_head=False)
    assert load_pretrained(folder, config=without).class_head is None


def test_stored_heads(bagel):
    """For inference, a BAGEL folder has the heads that its weights have; our own folders say it themselves."""
    folder, weights = bagel
    config = stored_config(folder)
    assert (config.class_head, config.align_head) == (False, False)
    model = load_pretrained(folder, config=config)
    assert dataclasses.replace(config, class_head=True, align_head=True) == load_config(folder)
    save_file(weights | {"fake_cls_head.1.bias": torch.zeros(2)}, folder / "ema.safetensors")
    config = stored_config(folder)
    assert (config.class_head, config.align_head) == (True, False)
    with pytest.raises(CheckpointError, match=r"5 missing: fake_cls_head.0.weight"):
        load_pretrained(folder, config=config)
    save_pretrained(model, folder / "ours")
    assert stored_config(folder / "ours") == model.config
    with pytest.raises(FileNotFoundError, match="no weights in"):
        stored_config(folder.parent)


def test_initialized_heads_are_as_in_a_new_model(bagel, monkeypatch):
    """Every tensor of them is initialised; uninitialised memory is filled with NaN here."""
    empty_like = torch.empty_like

    def poisoned(*args, **options):
        tensor = empty_like(*args, **options)
        return tensor if tensor.is_meta else tensor.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)
    model = load_pretrained(bagel[0], initialize=["fake_cls_head", "diga_mlp"])
    norm = model.class_head[0]
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))
    for linear in (model.class_head[1], model.class_head[3], model.align_head.fc1, model.align_head.fc2):
        assert not linear.bias.any()
        assert 0.2 < linear.weight.std() * linear.in_features**0.5 < 3
    assert all(p.isfinite().all() for p in model.state_dict().values())


def test_only_whole_optional_modules_may_be_missing(bagel):
    folder, weights = bagel
    with pytest.raises(
        ValueError, match=r"model\.initialize\) names \['vae2llm'\]; .* \['fake_cls_head', 'diga_mlp'\]"
    ):
        load_pretrained(folder, initialize=["vae2llm"])
    save_file(weights | {"fake_cls_head.1.bias": torch.zeros(2)}, folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"5 missing: fake_cls_head.0.weight"):
        load_pretrained(folder, initialize=["fake_cls_head", "diga_mlp"])


def test_everything_that_does_not_fit_is_listed(model, tmp_path):
    weights = published(model)
    del weights["vae2llm.bias"], weights["language_model.lm_head.weight"]
    weights["extra.weight"] = torch.zeros(2)
    weights["language_model.model.layers.2.input_layernorm.weight"] = torch.zeros(16)
    weights["llm2vae.bias"] = torch.zeros(7)
    weights["connector.fc1.weight"] = weights["connector.fc1.weight"].T.contiguous()
    save_file(weights, tmp_path / "w.safetensors")
    before = published(model)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, tmp_path / "w.safetensors")
    message = str(error.value)
    for part in (
        f"{tmp_path / 'w.safetensors'} does not fit the model",
        "2 missing: language_model.lm_head.weight, vae2llm.bias",
        "2 unexpected: extra.weight, language_model.model.layers.2.input_layernorm.weight",
        "2 of another shape: connector.fc1.weight is [8, 16], the model needs [16, 8], llm2vae.bias is [7]",
    ):
        assert part in message
    after = published_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())  # nothing was half loaded


def test_the_unused_connector_is_accepted(model, tmp_path):
    weights = published(model) | {"latent_to_vit_connector.fc1.weight": torch.zeros(3, 3)}
    save_file(weights, tmp_path / "w.safetensors")
    assert_equal(load_pretrained(tmp_path / "w.safetensors", config=TINY), model)


def test_a_tensor_in_two_shards(model, tmp_path):
    weights = published(model)
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"vae2llm.bias": weights["vae2llm.bias"]}, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(weights, "a.safetensors") | {"vae2llm.bias": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"vae2llm.bias \(in a.safetensors and again in b.safetensors\)"):
        load_pretrained(tmp_path, config=TINY)


def test_wrong_paths(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere: there is no such file or folder"):
        UniGenDet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no weights in .*: it holds none of"):
        UniGenDet.from_pretrained(tmp_path)
    save_file(published(model), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no settings in .*: it holds neither config.json nor llm_config.json"):
        UniGenDet.from_pretrained(tmp_path)
    assert_equal(UniGenDet.from_pretrained(tmp_path, config=TINY), model)


def test_damaged_files(model, tmp_path):
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a complete safetensors file"):
        UniGenDet.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json is not a complete safetensors file"):
        UniGenDet.from_pretrained(tmp_path / "config.json")


def test_settings_with_a_misspelt_name(model, tmp_path):
    save_pretrained(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision"]["hiden_size"] = values["vision"].pop("hidden_size")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"unknown settings \['vision.hiden_size'\]"):
        UniGenDet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[]", "{", ""],
)
def test_a_damaged_index(model, tmp_path, content):
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    for call in (UniGenDet.from_pretrained, stored_config):
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            call(tmp_path)


@pytest.mark.parametrize(("name", "values"), [("llm_config.json", LLM), ("vit_config.json", VIT)])
def test_damaged_settings_of_bagel(bagel, name, values):
    folder, _ = bagel
    for key in set(values) & {"num_hidden_layers", "hidden_size", "rope_theta", "patch_size", "image_size"}:
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if k != key}))
        with pytest.raises(CheckpointError, match=rf"{name} has no '{key}'"):
            load_config(folder)
    for content in ("[]", "{", json.dumps(values | {"hidden_size": "8"}), json.dumps(values | {"hidden_size": None})):
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=name):
            load_config(folder)


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"hidden_size": "8"}'])
def test_damaged_settings(model, tmp_path, content):
    save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json does not hold a model's settings"):
        load_config(tmp_path)
