import json

import pytest
import torch
from flux_names import flux_state_dict, small_flux
from safetensors.torch import load_file, save_file

from unigendet.config import LatentConfig
from unigendet.model import autoencoder
from unigendet.model.autoencoder import build_autoencoder

LATENT = LatentConfig(channels=4, downsample=4, patch_size=2)
SMALL = small_flux([8, 8, 16], latent_channels=4)  # three levels: the reversed order of the decoder's levels shows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small autoencoder as diffusers builds it, and its weights in a file as FLUX publishes them."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL.from_config(SMALL)
    state = flux_state_dict(vae)
    path = tmp_path_factory.mktemp("flux") / "ae.safetensors"
    save_file(state, str(path))
    return path, vae.eval()


def test_reads_flux_weights_as_diffusers_does(checkpoint, tmp_path):
    path, vae = checkpoint
    ours = build_autoencoder(LATENT, path, vae_config=SMALL)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    theirs = type(vae).from_single_file(str(path), config=str(tmp_path), local_files_only=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.vae.state_dict()[name], tensor), name
        assert torch.equal(vae.state_dict()[name], tensor), name


def test_reads_diffusers_names_too(checkpoint, tmp_path):
    _, vae = checkpoint
    save_file({k: v.clone() for k, v in vae.state_dict().items()}, str(tmp_path / "x.safetensors"))
    ours = build_autoencoder(LATENT, tmp_path / "x.safetensors", vae_config=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), vae.parameters(), strict=True))


def test_encode_is_the_scaled_mean(checkpoint):
    path, vae = checkpoint
    ours = build_autoencoder(LATENT, path, vae_config=SMALL)
    pixels = torch.rand(3, 16, 24) * 2 - 1
    latent = ours.encode(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels[None]).latent_dist
        assert torch.allclose(latent, (posterior.mean[0] - 0.1159) * 0.3611)
        assert torch.allclose(ours.decode(latent), vae.decode(posterior.mean).sample[0], atol=1e-5)
    assert latent.shape == (4, 4, 6)
    assert torch.equal(latent, ours.encode(pixels))
    draws = [ours.encode(pixels, sample=True, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # z = mean + std · noise, so undoing the scaling gives unit-variance noise
    noise = (draws[0] / 0.3611 + 0.1159 - posterior.mean[0]) / posterior.std[0]
    assert 0.7 < noise.std() < 1.3


def test_autocast_makes_no_difference(checkpoint):
    ours = build_autoencoder(LATENT, checkpoint[0], vae_config=SMALL)
    pixels = torch.rand(3, 16, 24) * 2 - 1
    latent = ours.encode(pixels)
    image = ours.decode(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.encode(pixels), latent)
        assert torch.equal(ours.decode(latent), image)


def test_is_frozen(checkpoint):
    ours = build_autoencoder(LATENT, checkpoint[0], vae_config=SMALL).train()
    assert not ours.training
    assert not ours.vae.training
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.encode(torch.zeros(3, 8, 8)).requires_grad


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_incomplete_weights_are_refused(checkpoint, tmp_path, damage):
    state = load_file(str(checkpoint[0]))
    victim = "decoder.up.0.block.1.conv1.weight"
    tensor = state.pop(victim)
    if damage == "unknown":
        state |= {victim: tensor, "decoder.extra": tensor.clone()}
    if damage == "shape":
        state[victim] = tensor[:, :, :1].clone()
    save_file(state, str(tmp_path / "ae.safetensors"))
    named = {"missing": "up_blocks.2.resnets.1.conv1", "unknown": "decoder.extra", "shape": "of another shape"}[damage]
    with pytest.raises(ValueError, match=named):
        build_autoencoder(LATENT, tmp_path / "ae.safetensors", vae_config=SMALL)


def test_the_packaged_settings_are_flux(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(json.loads(autoencoder._FLUX_CONFIG.read_text()))
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683  # the published size
    assert len(vae.state_dict()) == 244
    autoencoder.FluxAutoencoder(LatentConfig(), vae)
    with pytest.raises(ValueError, match=r"latent.channels is 4; it must be the autoencoder's: 16"):
        autoencoder.FluxAutoencoder(LATENT, vae)


def test_pixels_are_their_own_latents(tmp_path):
    config = LatentConfig(channels=1, downsample=1, autoencoder="pixels")
    identity = build_autoencoder(config)
    pixels = torch.rand(1, 8, 6)
    assert torch.equal(identity.decode(identity.encode(pixels, sample=True)), pixels)
    with pytest.raises(ValueError, match=r"pixels has shape \[3, 8, 8\]; it must be \[1, 1·h, 1·w\]"):
        identity.encode(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="path is 'x'; it must be left out"):
        build_autoencoder(config, "x")
    with pytest.raises(ValueError, match="path is None"):
        build_autoencoder(LatentConfig())
    with pytest.raises(FileNotFoundError, match=r"ae.safetensors do not exist"):
        build_autoencoder(LatentConfig(), tmp_path / "ae.safetensors")


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_damaged_weights_are_named(checkpoint, tmp_path, kept):
    path, _ = checkpoint
    (tmp_path / "ae.safetensors").write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"ae\.safetensors is not a complete safetensors file"):
        build_autoencoder(LATENT, tmp_path / "ae.safetensors", vae_config=SMALL)
