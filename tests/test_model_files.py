"""Which files of a model folder pictures and verdicts follow from."""

import dataclasses

import pytest
from tiny_models import tiny_config, tiny_model

from unigendet.data.hashes import files_hash
from unigendet.inference.model_files import autoencoder_file, folder_config, model_files
from unigendet.model.checkpoint import save_pretrained

PIXELS = tiny_config()
FLUX = dataclasses.replace(PIXELS, latent=dataclasses.replace(PIXELS.latent, autoencoder="flux"))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def names(folder, *arguments):
    return [path.name for path in model_files(folder, *arguments)]


def test_weights_settings_and_tokenizer(folder):
    assert names(folder, PIXELS) == ["model.safetensors", "config.json"]
    for name in ("data.json", "merges.txt", "generation.json", "calibration.json", "README.txt", "ae.safetensors"):
        (folder / name).write_text("{}")
    assert names(folder, PIXELS) == ["model.safetensors", "config.json", "data.json", "merges.txt"]


def test_the_autoencoder_s_weights(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model/ae\.safetensors does not exist; say where the autoencoder's"):
        model_files(folder, FLUX)
    assert model_files(folder, FLUX, tmp_path / "vae.safetensors")[-1] == tmp_path / "vae.safetensors"
    (folder / "ae.safetensors").write_bytes(b"")
    assert model_files(folder, FLUX)[-1] == folder / "ae.safetensors" == autoencoder_file(folder, FLUX)
    assert autoencoder_file(folder, PIXELS) is None


def test_a_hash_over_them(folder):
    def digest():
        return files_hash((path.name, path) for path in model_files(folder, PIXELS))

    before = digest()
    save_pretrained(tiny_model(seed=1), folder)
    other = digest()
    assert other != before
    (folder / "tokenizer.json").write_text("{}")
    assert len({before, other, digest()}) == 3


def test_settings_of_a_folder(folder, tmp_path):
    assert folder_config(folder) == PIXELS
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*nowhere"):
        folder_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no weights in"):
        folder_config(tmp_path)
