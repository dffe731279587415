"""Pixels to latents and back. The autoencoder is frozen; its encoding is the posterior's mean unless a sample is
asked for, so that a verdict does not change from run to run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.config import LatentConfig, check
from unigendet.model.shards import read_tensors

_FLUX_CONFIG = Path(__file__).parent / "flux_vae" / "config.json"


class PixelAutoencoder(nn.Module):
    """The identity: the latents are the pixels themselves (1 grey or 3 RGB channels)."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, pixels: Tensor, *, sample: bool = False) -> Tensor:
        """[channels, H, W] in [-1, 1] → the same tensor. ``sample`` makes no difference: there is no posterior."""
        _check_image("pixels", pixels, self.config.channels, 1)
        return pixels

    def decode(self, latent: Tensor) -> Tensor:
        """[channels, H, W] → the same tensor."""
        _check_image("latent", latent, self.config.channels, 1)
        return latent


class FluxAutoencoder(nn.Module):
    """The FLUX autoencoder around diffusers' ``AutoencoderKL``: z = (posterior - shift) · scale (docs/model.md §11).

    It computes in its weights' dtype, under autocast too.
    """

    def __init__(self, config: LatentConfig, vae: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.vae = vae.eval().requires_grad_(False)
        downsample = 2 ** (len(vae.config.block_out_channels) - 1)
        for name, have in (("channels", vae.config.latent_channels), ("downsample", downsample)):
            if getattr(config, name) != have:
                raise ValueError(f"latent.{name} is {getattr(config, name)}; it must be the autoencoder's: {have}")

    def train(self, mode: bool = True) -> FluxAutoencoder:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Pixels → latent.

        Args:
            pixels: [3, H, W] in [-1, 1], H and W multiples of the downsampling; moved to the weights' device and dtype.
            sample: draw from the posterior instead of taking its mean.
            generator: of the draw, on the weights' device.

        Returns:
            float32 [channels, H / downsample, W / downsample] on the weights' device.
        """
        _check_image("pixels", pixels, self.vae.config.in_channels, self.config.downsample)
        pixels = self._input(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels).latent_dist
        latent = posterior.sample(generator) if sample else posterior.mode()
        return (latent[0].float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """[channels, h, w] → pixels float32 [3, h · downsample, w · downsample], about in [-1, 1] (not clipped)."""
        _check_image("latent", latent, self.config.channels, 1)
        latent = latent.float() / self.vae.config.scaling_factor + self.vae.config.shift_factor
        latent = self._input(latent)
        with torch.autocast(latent.device.type, enabled=False):
            return self.vae.decode(latent).sample[0].float()

    def _input(self, image: Tensor) -> Tensor:
        weight = next(self.vae.parameters())
        return image[None].to(weight.device, weight.dtype)


def check_autoencoder(config: LatentConfig, path: str | Path | None, name: str = "path") -> None:
    """Raise ValueError unless there is a file of weights just if the autoencoder needs one.

    Arguments: see ``build_autoencoder``; ``name``: what errors call ``path``.
    """
    given = None if path is None else str(path)
    if config.autoencoder == "pixels":
        check(given is None, name, given, "left out with latent.autoencoder 'pixels', which has no weights")
    else:
        need = f"the file of the weights (ae.safetensors) of latent.autoencoder {config.autoencoder!r}"
        check(given is not None, name, given, need)


def build_autoencoder(
    config: LatentConfig, path: str | Path | None = None, *, vae_config: dict[str, Any] | None = None
) -> PixelAutoencoder | FluxAutoencoder:
    """The autoencoder that ``config.autoencoder`` names.

    Args:
        config: the latent space.
        path: for ``flux``, the weights: ``ae.safetensors`` as FLUX and BAGEL publish it, or with diffusers' names.
        vae_config: other settings of diffusers' ``AutoencoderKL`` than FLUX's.

    Returns:
        A module with ``encode(pixels) -> latent`` and ``decode(latent) -> pixels``, frozen, on the CPU.

    Raises:
        ValueError: ``path`` is missing or superfluous, or the file is damaged or does not hold exactly the
            autoencoder's tensors.
        FileNotFoundError: there is no such file.
    """
    check_autoencoder(config, path)
    if path is None:
        return PixelAutoencoder(config)
    if not Path(path).is_file():
        raise FileNotFoundError(f"autoencoder weights {path} do not exist")
    return FluxAutoencoder(config, _load_flux(Path(path), vae_config))


def flux_on_meta() -> nn.Module:
    """diffusers' autoencoder of FLUX's sizes on the meta device: shapes without weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(json.loads(_FLUX_CONFIG.read_text(encoding="utf-8")))


def _load_flux(path: Path, vae_config: dict[str, Any] | None) -> nn.Module:
    """Every tensor must be there and fit; diffusers' own single-file loader ignores missing and unknown ones."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(vae_config or json.loads(_FLUX_CONFIG.read_text(encoding="utf-8")))
    levels = len(vae.config.block_out_channels)
    wanted = vae.state_dict()
    state = {}
    for name, tensor in read_tensors(path).items():
        name = _diffusers_name(name, levels)
        # FLUX stores the attention's projections as 1×1 convolutions, diffusers as linears.
        is_projection = name in wanted and tensor.ndim == 4 and wanted[name].ndim == 2
        state[name] = tensor[:, :, 0, 0] if is_projection else tensor
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown or wrong:
        raise ValueError(
            f"{path} does not hold this autoencoder: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    vae.load_state_dict(state)
    return vae


_RENAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def _diffusers_name(name: str, levels: int) -> str:
    """diffusers' name of a tensor that FLUX calls ``name``; a name that is diffusers' own stays as it is."""
    flux_up = re.match(r"decoder\.up\.(\d+)\.", name)
    if flux_up:  # FLUX counts the decoder's levels from the finest, diffusers from the coarsest
        name = f"decoder.up.{levels - 1 - int(flux_up[1])}." + name[flux_up.end() :]
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_image(name: str, image: Tensor, channels: int, multiple: int) -> None:
    shape = list(image.shape)
    if len(shape) != 3 or shape[0] != channels or any(edge == 0 or edge % multiple for edge in shape[1:]):
        raise ValueError(f"{name} has shape {shape}; it must be [{channels}, {multiple}·h, {multiple}·w]")
