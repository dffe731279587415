"""``unigendet export``: there and back, and what the published form cannot say."""

import dataclasses
import json
import os
import re
import weakref

import published_folder
import pytest
import torch
from golden import Golden
from published_folder import LLM, VIT, config, write_settings, write_tokenizer, write_weights
from run_data import ANSWERS
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from unigendet.cli import main
from unigendet.config import DataConfig, GuidanceConfig, ImageConfig
from unigendet.data.tokenizer import load_tokenizer, train_tokenizer
from unigendet.inference.pipeline import Pipeline
from unigendet.model import export as model_export
from unigendet.model import shards
from unigendet.model.autoencoder import PixelAutoencoder
from unigendet.model.checkpoint import published_state_dict, save_pretrained, stored_config
from unigendet.model.export import export_weights, not_published
from unigendet.model.unigendet import UniGenDet

VIEWS = DataConfig(ImageConfig(8, 8, 2), ImageConfig(8, 8, 2), question="Real?")
CONNECTOR = {f"latent_to_vit_connector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.fixture
def command(capsys):
    """Runs the command line; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        code = main(["export", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A folder with BAGEL's tokenizer."""
    folder = tmp_path_factory.mktemp("qwen2")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def ours(tmp_path, qwen2):
    """A model folder of ours whose settings the published files can say, with views and sampling of its own."""
    torch.manual_seed(0)
    model = UniGenDet(config())
    views = dataclasses.replace(DataConfig(), question="Is it?")
    guidance = GuidanceConfig(num_timesteps=7)
    Pipeline(model, load_tokenizer(qwen2), PixelAutoencoder(model.config.latent), views, guidance).save(tmp_path / "m")
    (tmp_path / "ae.safetensors").write_bytes(b"")
    save_file({"decoder.conv_in.weight": torch.ones(2)}, tmp_path / "ae.safetensors")
    return tmp_path / "m", model


@pytest.fixture
def digits(tmp_path):
    """A model folder like the quickstart's: pixel latents, a small tokenizer of its own."""
    model = tiny_model(vocab_size=280)
    Pipeline(model, train_tokenizer(ANSWERS, 270), PixelAutoencoder(model.config.latent), VIEWS).save(tmp_path / "d")
    return tmp_path / "d", model


def assert_equal(left, right, dtype=torch.float32):
    left, right = published_state_dict(left), published_state_dict(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(value.to(dtype), right[name].to(dtype)) for name, value in left.items())


def test_there_and_back(ours, command, tmp_path):
    folder, model = ours
    out = tmp_path / "release"
    code, printed, err = command("--model", folder, "--out", out, "--autoencoder", tmp_path / "ae.safetensors")
    assert (code, printed, err) == (0, f"{out}\n", "")
    assert sorted(p.name for p in out.iterdir()) == [
        "ae.safetensors", "data.json", "ema.safetensors", "generation.json", "llm_config.json", "merges.txt",
        "tokenizer.json", "tokenizer_config.json", "vit_config.json", "vocab.json",
    ]  # fmt: skip
    again = UniGenDet.from_pretrained(out)
    assert again.config == model.config
    assert_equal(again, model)
    for name in ("data.json", "generation.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert (out / "ae.safetensors").read_bytes() == (tmp_path / "ae.safetensors").read_bytes()


def test_the_settings_are_the_published_ones(ours, tmp_path, command):
    """For another program: every size under transformers' name, one layer more of the ViT than is used."""
    command("--model", ours[0], "--out", tmp_path / "release")
    llm, vit = (json.loads((tmp_path / "release" / f"{name}_config.json").read_text()) for name in ("llm", "vit"))
    assert llm["torch_dtype"] == "float32"
    assert llm["qk_norm"] is True
    known = {name: LLM[name] for name in llm if name not in ("torch_dtype", "qk_norm")}
    assert {name: llm[name] for name in known} == known
    assert {name: vit[name] for name in VIT} == VIT


def test_the_tensors_are_those_of_a_published_file(golden_file, tmp_path):
    """Names and shapes, also of what nothing uses, are those that the published implementation saved."""
    golden = Golden.read(golden_file)
    save_pretrained(golden.model(tmp_path, "auto"), tmp_path / "m")
    (tmp_path / "out").mkdir()
    export_weights(tmp_path / "m", tmp_path / "out")
    expected, written = golden.named("model."), load_file(tmp_path / "out" / "ema.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in expected.items()}
    assert all(torch.equal(t, expected[name]) for name, t in written.items() if name not in CONNECTOR)
    assert not any(written[name].any() for name in CONNECTOR)


def test_bfloat16(ours, command, tmp_path):
    folder, model = ours
    assert command("--model", folder, "--out", tmp_path / "release", "--dtype", "bfloat16")[0] == 0
    written = load_file(tmp_path / "release" / "ema.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    again = UniGenDet.from_pretrained(tmp_path / "release", dtype=torch.bfloat16)
    assert_equal(model, again, torch.bfloat16)
    assert json.loads((tmp_path / "release" / "llm_config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_in_qwen2s_files(ours, command, tmp_path):
    folder, _ = ours
    command("--model", folder, "--out", tmp_path / "release")
    (tmp_path / "release" / "tokenizer.json").unlink()
    mine, again = load_tokenizer(folder), load_tokenizer(tmp_path / "release")
    assert again.special == mine.special
    assert again.vocab_size == mine.vocab_size
    for text in ("the cat isn't 12 years old", "Is  this\n\n<|im_end|> theatre?", "日本 thé"):
        assert again.encode(text) == mine.encode(text)


def test_what_the_published_files_cannot_say_is_said_and_kept(digits, command, tmp_path):
    folder, model = digits
    code, _, err = command("--model", folder, "--out", tmp_path / "release")
    assert code == 0
    (line,) = err.splitlines()
    for name in ("latent.channels", "latent.downsample", "latent.autoencoder", "special_tokens.bos"):
        assert name in line
    assert "config.json says it, which unigendet reads and other programs do not" in line
    again = Pipeline.from_pretrained(tmp_path / "release")
    assert again.model.config == model.config
    assert again.data == VIEWS
    assert_equal(again.model, model)
    assert again.tokenizer.encode("This is") == load_tokenizer(folder).encode("This is")
    assert not (tmp_path / "release" / "vocab.json").exists()  # Qwen2's rule would cut texts differently


def test_every_setting_is_said_or_named():
    """A setting that neither file holds would be lost in silence."""
    changes = {
        "latent": dataclasses.replace(config().latent, max_size=32),
        "special_tokens": dataclasses.replace(config().special_tokens, bos=5),
        "vision": dataclasses.replace(config().vision, num_positions=5000),
        "align_projector": "conv",
    }
    assert not_published(config()) == []
    for name, value in changes.items():
        assert [n.partition(".")[0] for n in not_published(config(**{name: value}))] == [name]
    numbers = {"hidden_size": 32, "intermediate_size": 40, "num_layers": 1, "num_heads": 8, "num_kv_heads": 1,
               "vocab_size": 160000, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position": 99}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 8, "num_layers": 1, "num_heads": 4, "patch_size": 7,
              "max_patches_per_side": 9, "num_channels": 1, "layer_norm_eps": 1e-5}  # fmt: skip
    plain = {f.name for f in dataclasses.fields(config())} - changes.keys() - {"class_head", "align_head"}
    assert plain == numbers.keys()  # a new setting belongs into one of these lists
    assert {f.name for f in dataclasses.fields(config().vision)} - {"num_positions"} == vision.keys()


def test_every_plain_setting_comes_back(tmp_path, qwen2):
    vision = dataclasses.replace(
        config().vision, hidden_size=32, intermediate_size=8, num_layers=1, num_heads=4, patch_size=7,
        max_patches_per_side=9, num_channels=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    other = config(
        hidden_size=32, intermediate_size=40, num_layers=1, num_heads=8, num_kv_heads=1, vocab_size=160000,
        rope_theta=5e5, rms_norm_eps=1e-5, max_position=99, vision=vision, class_head=False,
    )  # fmt: skip
    save_pretrained(UniGenDet(other), tmp_path / "m")
    (tmp_path / "out").mkdir()
    assert export_weights(tmp_path / "m", tmp_path / "out") == []
    assert stored_config(tmp_path / "out") == other
    assert not CONNECTOR & load_file(tmp_path / "out" / "ema.safetensors").keys()  # as BAGEL's own


def test_one_file_whatever_its_size(ours, command, tmp_path, monkeypatch):
    """BAGEL's own code opens one. It is written tensor by tensor, and is laid out as safetensors' own files are."""
    folder, model = ours
    monkeypatch.setattr(shards, "SHARD_BYTES", 4_000_000)
    read, held = model_export.as_published, []

    def counted(name, tensor):
        held[:] = [reference for reference in held if reference() is not None]
        tensor = read(name, tensor).clone()
        held.append(weakref.ref(tensor))
        assert len(held) == 1
        return tensor

    monkeypatch.setattr(model_export, "as_published", counted)
    out = tmp_path / "release"
    assert command("--model", folder, "--out", out)[0] == 0
    assert held
    assert [p.name for p in out.glob("ema*")] == ["ema.safetensors"]
    assert_equal(UniGenDet.from_pretrained(out), model)
    content = (out / "ema.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    offsets = [entry["data_offsets"] for entry in header.values()]
    assert [start for start, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert offsets[-1][1] == len(content) - 8 - length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_tensors_come_back(tmp_path, dtype):
    """Of any shape, also without a dimension or an element, and of a tensor that is not contiguous."""
    tensors = {"é": torch.randn(5, 3).T, "none": torch.zeros(0, 4), "one": torch.tensor(2.5), "odd": torch.randn(7)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    like = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shards.stream_tensors(like, tensors.__getitem__, tmp_path / "x.safetensors")
    with shards.open_tensors(tmp_path / "x.safetensors") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == dtype and torch.equal(again[name], t) for name, t in tensors.items())
    with pytest.raises(ValueError, match=r"odd is \(\[1\], .*; it must be \(\[7\]"):
        shards.stream_tensors(like, (tensors | {"odd": torch.ones(1)}).__getitem__, tmp_path / "x.safetensors")


def test_an_export_without_an_autoencoder_says_so(ours, command, tmp_path):
    folder, _ = ours
    code, _, err = command("--model", folder, "--out", tmp_path / "release")
    assert code == 0
    assert err == (
        "unigendet export: no autoencoder was written: commands that use the model will need --autoencoder FILE\n"
    )


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "big"])
def test_a_shard_size_that_is_none(tmp_path, capsys, size):
    with pytest.raises(SystemExit) as end:
        main(["export", "--model", str(tmp_path), "--out", str(tmp_path / "x"), f"--shard-size={size}"])
    assert end.value.code == 2
    assert "--shard-size" in capsys.readouterr().err


def test_shards(ours, command, tmp_path):
    folder, model = ours
    out = tmp_path / "release"
    assert command("--model", folder, "--out", out, "--shard-size", 4_000_000 / 2**30)[0] == 0
    index = json.loads((out / "ema.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == sorted(p.name for p in out.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(out / file).values())
    assert_equal(UniGenDet.from_pretrained(out), model)
    # What an export leaves can be exported, and takes the place of another form.
    assert command("--model", out, "--out", folder, "--overwrite")[0] == 0
    assert not {"config.json", "model.safetensors"} & {p.name for p in folder.iterdir()}
    assert_equal(UniGenDet.from_pretrained(folder), model)


def test_a_published_folder_goes_through(command, tmp_path):
    """A BAGEL folder without heads, the patch embedding as a kernel, bfloat16: the same weights come out."""
    source = tmp_path / "BAGEL"
    source.mkdir()
    write_settings(source)
    write_weights(source, published_folder.model_weights(kernel=True))
    write_tokenizer(source)
    save_file({"decoder.conv_in.weight": torch.ones(2)}, source / "ae.safetensors")
    assert command("--model", source, "--out", tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    expected, written = published_folder.model_weights(), load_file(tmp_path / "out" / "ema.safetensors")
    assert expected.keys() == written.keys()
    assert all(torch.equal(t, expected[name]) for name, t in written.items())
    assert (tmp_path / "out" / "ae.safetensors").is_file()


@pytest.fixture
def checkpoint(digits):
    """A training checkpoint: the latest weights and an average that differs."""
    folder, _ = digits
    step = folder.parent / "run" / "checkpoints" / "step-000002"
    for seed, name in ((1, "model"), (2, "ema")):
        model = tiny_model(seed, vocab_size=280)
        tokenizer = load_tokenizer(folder)
        Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), VIEWS).save(step / name)
    (step / "training.json").write_text("{}")
    return step


@pytest.mark.parametrize(("arguments", "seed"), [([], 2), (["--weights", "ema"], 2), (["--weights", "model"], 1)])
def test_weights_of_a_training_checkpoint(checkpoint, command, tmp_path, arguments, seed):
    assert command("--model", checkpoint, "--out", tmp_path / "release", *arguments)[0] == 0
    assert_equal(UniGenDet.from_pretrained(tmp_path / "release"), tiny_model(seed, vocab_size=280))


def test_mistakes(ours, checkpoint, command, tmp_path):
    folder, _ = ours
    out = tmp_path / "release"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "damaged.safetensors").write_text("x")
    cases = [
        (["--model", tmp_path / "lost", "--out", out], "there is no folder"),
        (["--model", tmp_path / "full", "--out", out], "no weights in"),
        (["--model", folder, "--out", tmp_path / "full"], "is not empty; name another folder, or add --overwrite"),
        (["--model", folder, "--out", tmp_path / "full" / "notes.txt"], "is a file; it must be a folder"),
        (["--model", folder, "--out", folder, "--overwrite"], "lie in one another"),
        (["--model", folder, "--out", folder / "release"], "lie in one another"),
        (["--model", checkpoint, "--out", checkpoint / "ema" / "x"], "lie in one another"),
        (["--model", folder, "--out", out, "--weights", "ema"], "is no training checkpoint: it holds one set"),
        (["--model", checkpoint.parents[1], "--out", out], f"name one of its checkpoints, say {checkpoint}"),
        (["--model", folder, "--out", out, "--autoencoder", tmp_path / "lost"], "autoencoder weights .*lost do not"),
        (["--model", folder, "--out", out, "--autoencoder", tmp_path / "damaged.safetensors"], "not a complete"),
        (["--model", checkpoint, "--out", out, "--autoencoder", tmp_path / "ae.safetensors"], "latents are pixels"),
    ]
    for arguments, message in cases:
        code, printed, err = command(*arguments)
        assert (code, printed) == (1, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("unigendet export: ")
        assert re.search(message, err), err
        assert not out.exists()
    (checkpoint / "ema").rename(tmp_path / "away")
    code, _, err = command("--model", checkpoint, "--out", out, "--weights", "ema")
    assert code == 1
    assert "has no ema folder" in err


def test_overwriting_keeps_what_is_not_a_models(ours, command, tmp_path, monkeypatch):
    folder, model = ours
    out = tmp_path / "full"
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert command("--model", folder, "--out", out, "--overwrite")[0] == 0
    assert (out / "README.md").read_text() == "mine"
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(model_export, "as_published", full)
    code, _, err = command("--model", folder, "--out", out, "--overwrite")
    assert code == 1
    assert "No space left on device" in err
    assert "ema.safetensors" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert_equal(UniGenDet.from_pretrained(out), model)
