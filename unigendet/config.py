"""Every setting of a model, a run or a generation, as frozen dataclasses that check themselves.

The YAML files under ``configs/`` and the command line's overrides are read into these classes; nothing else holds
settings. Sizes of the published model: BAGEL-7B-MoT with SigLIP so400m and the FLUX autoencoder (paper section 3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def check(condition: bool, name: str, value: object, need: str) -> None:
    """Raise ValueError ``{name} is {value}; it must be {need}`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {need}")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four tokens that delimit texts and images (defaults: Qwen2's, as BAGEL uses them)."""

    bos: int = 151644
    eos: int = 151645
    start_of_image: int = 151652
    end_of_image: int = 151653


@dataclass(frozen=True)
class VisionConfig:
    """The packed ViT. ``num_layers`` 0 puts the patch embedding straight before the connector."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    patch_size: int = 14
    max_patches_per_side: int = 70
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "patch_size",
            "max_patches_per_side",
            "num_channels",
        ):
            check(getattr(self, name) > 0, f"vision.{name}", getattr(self, name), "positive")
        check(
            self.hidden_size % self.num_heads == 0,
            "vision.hidden_size",
            self.hidden_size,
            f"a multiple of vision.num_heads ({self.num_heads})",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers per flattened patch: patch_size² · num_channels."""
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True)
class LatentConfig:
    """The latent space. One token covers ``downsample * patch_size`` pixels a side.

    ``autoencoder`` says what turns pixels into latents: ``flux`` (diffusers' AutoencoderKL with FLUX sizes) or
    ``pixels`` (the identity on ``channels`` = 1 grey or 3 RGB channels, ``downsample`` 1).
    """

    channels: int = 16
    downsample: int = 8
    patch_size: int = 2
    max_size: int = 64
    autoencoder: Literal["flux", "pixels"] = "flux"

    def __post_init__(self) -> None:
        for name in ("channels", "downsample", "patch_size", "max_size"):
            check(getattr(self, name) > 0, f"latent.{name}", getattr(self, name), "positive")
        check(self.autoencoder in ("flux", "pixels"), "latent.autoencoder", self.autoencoder, "'flux' or 'pixels'")
        if self.autoencoder == "pixels":
            check(self.downsample == 1, "latent.downsample", self.downsample, "1 with autoencoder 'pixels'")
            check(self.channels in (1, 3), "latent.channels", self.channels, "1 or 3 with autoencoder 'pixels'")

    @property
    def token_dim(self) -> int:
        """Numbers per latent token: patch_size² · channels."""
        return self.patch_size**2 * self.channels

    @property
    def stride(self) -> int:
        """Pixels per token and side."""
        return self.downsample * self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one UniGenDet. The defaults are BAGEL-7B-MoT's.

    ``align_head`` adds φ (``diga_mlp``), the projection of DIGA; ``class_head`` the real/fake head of GDUF.
    ``max_position`` bounds the RoPE positions of a sample.
    """

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    vocab_size: int = 152064
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position: int = 32768
    class_head: bool = True
    align_head: bool = True
    vision: VisionConfig = field(default_factory=VisionConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "vocab_size",
            "max_position",
        ):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        check(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_heads ({self.num_heads})",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        check(self.hidden_size % 4 == 0, "hidden_size", self.hidden_size, "a multiple of 4 (2-D position tables)")
        check(self.head_dim % 2 == 0, "hidden_size / num_heads", self.head_dim, "even (RoPE rotates pairs)")
        for name, token in dataclasses.asdict(self.special_tokens).items():
            check(
                0 <= token < self.vocab_size, f"special_tokens.{name}", token, f"in [0, vocab_size={self.vocab_size})"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain nested dicts, for ``config.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``. Raises ValueError naming every key that is not a setting."""
        return _from_dict(cls, values)


_NESTED = {"vision": VisionConfig, "latent": LatentConfig, "special_tokens": SpecialTokens}


def _from_dict(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown settings {[prefix + k for k in unknown]}; {cls.__name__} has {sorted(known)}")
    nested = {
        k: _from_dict(_NESTED[k], v, f"{prefix}{k}.") if k in _NESTED and isinstance(v, dict) else v
        for k, v in values.items()
    }
    return cls(**nested)


def bagel_7b() -> ModelConfig:
    """BAGEL-7B-MoT, the published size."""
    return ModelConfig()


def quickstart(vocab_size: int = 512, special_tokens: SpecialTokens | None = None) -> ModelConfig:
    """A model of about one million parameters for 8×8 grey images, trainable in minutes on two CPU cores."""
    return ModelConfig(
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=vocab_size,
        rope_theta=1e4,
        max_position=512,
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            patch_size=2,
            max_patches_per_side=4,
            num_channels=1,
        ),
        latent=LatentConfig(channels=1, downsample=1, patch_size=2, max_size=4, autoencoder="pixels"),
        special_tokens=special_tokens or SpecialTokens(bos=0, eos=1, start_of_image=2, end_of_image=3),
    )


PRESETS = {"bagel_7b": bagel_7b, "quickstart": quickstart}
