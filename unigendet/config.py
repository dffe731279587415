"""Every setting of a model, a run or a generation, as frozen dataclasses that check themselves.

The YAML files under ``configs/`` and the command line's overrides are read into these classes; nothing else holds
settings. Sizes of the published model: BAGEL-7B-MoT with SigLIP so400m and the FLUX autoencoder (paper section 3).
"""

from __future__ import annotations

import dataclasses
import math
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
    """The packed ViT. ``num_layers`` 0 puts the patch embedding straight before the connector.

    ``num_positions``: rows of the learned position embedding; default max_patches_per_side².
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    patch_size: int = 14
    max_patches_per_side: int = 70
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    num_positions: int | None = None

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
        side = self.max_patches_per_side
        check(self.positions >= side**2, "vision.num_positions", self.num_positions, f"at least {side}² = {side**2}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def positions(self) -> int:
        """Rows of the learned position embedding."""
        return self.max_patches_per_side**2 if self.num_positions is None else self.num_positions

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

    ``align_head`` adds φ, the projection of DIGA, in the form that ``align_projector`` names: the published ``mlp``, or
    ``conv``, a convolution over each image's tokens. ``class_head`` adds the real/fake head of GDUF.
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
    align_projector: Literal["mlp", "conv"] = "mlp"
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
        check(self.align_projector in ("mlp", "conv"), "align_projector", self.align_projector, "'mlp' or 'conv'")
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


@dataclass(frozen=True)
class GuidanceConfig:
    """How a latent image is denoised: Euler steps and classifier-free guidance (published defaults).

    ``num_timesteps`` N gives N − 1 steps on times from 1 to 0, shifted by ``timestep_shift``. Guidance acts at times t
    with interval[0] < t <= interval[1], if ``text_scale`` > 1; the image step, if ``image_scale`` > 1 too. ``renorm``
    bounds the guided velocity's norm by the unguided one's: over the whole image (``global``), per token (``channel``),
    or per token and before the image step (``text_channel``); it shrinks by no more than ``renorm_min``.
    """

    num_timesteps: int = 50
    text_scale: float = 4.0
    image_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    timestep_shift: float = 3.0
    renorm: Literal["global", "channel", "text_channel"] = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        for name in ("text_scale", "image_scale", "timestep_shift", "renorm_min"):
            check(math.isfinite(getattr(self, name)), f"guidance.{name}", getattr(self, name), "finite")
        check(all(map(math.isfinite, self.interval)), "guidance.interval", self.interval, "finite at both ends")
        check(self.num_timesteps >= 2, "guidance.num_timesteps", self.num_timesteps, "at least 2 (one step)")
        check(self.timestep_shift > 0, "guidance.timestep_shift", self.timestep_shift, "positive")
        check(self.interval[0] <= self.interval[1], "guidance.interval", self.interval, "(low, high) with low <= high")
        check(
            self.renorm in ("global", "channel", "text_channel"),
            "guidance.renorm",
            self.renorm,
            "'global', 'channel' or 'text_channel'",
        )
        check(0 <= self.renorm_min <= 1, "guidance.renorm_min", self.renorm_min, "in [0, 1]")


@dataclass(frozen=True)
class ImageConfig:
    """How one view of an image is resized, in pixels.

    Shorter edge at least ``min_size``, longer edge at most ``max_size``, both multiples of ``stride``, at most
    ``max_pixels`` in all.
    """

    min_size: int
    max_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def __post_init__(self) -> None:
        check(self.stride > 0, "image.stride", self.stride, "positive")
        for name in ("min_size", "max_size"):
            size = getattr(self, name)
            check(size > 0 and size % self.stride == 0, f"image.{name}", size, f"a positive multiple of {self.stride}")
        check(self.max_size >= self.min_size, "image.max_size", self.max_size, f"at least min_size ({self.min_size})")
        check(self.max_pixels >= self.stride**2, "image.max_pixels", self.max_pixels, f"at least {self.stride**2}")


@dataclass(frozen=True)
class DataConfig:
    """From images and texts to samples. The defaults are the published views.

    ``question`` is what a detector is asked when nobody says otherwise; training data brings its own questions.
    ``teacher_prompt`` is what DIGA's teacher reads between its two views of the image; ``{caption}`` stands for the
    caption.
    """

    latent_view: ImageConfig = ImageConfig(min_size=512, max_size=1024, stride=16)
    vit_view: ImageConfig = ImageConfig(min_size=224, max_size=980, stride=14)
    question: str = "Is this image real or fake and why?"
    teacher_prompt: str = (
        "Examine this picture as an expert in image forensics would. It is meant to show: {caption}\n"
        "Name the two or three visual details that speak most strongly for its being a real photograph."
    )

    def __post_init__(self) -> None:
        prompt = self.teacher_prompt
        check("{caption}" in prompt, "teacher_prompt", prompt, "a text that contains {caption}")


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are drawn and packed. The defaults are GDUF's; DIGA's ``max_tokens`` is 23,000.

    A pack holds at most ``max_tokens`` tokens; a sample longer than ``max_sample_tokens`` is left out. ``lookahead``:
    samples that each worker may hold back until a pack has room for them, so that packs are fuller; 0: the first that
    does not fit ends its pack. ``max_broken``: broken images (missing, unreadable) that each process leaves out before
    it stops; 0: it stops at the first. ``prefetch`` packs per worker are made ahead. ``cache`` keeps every sample in
    memory once it is made (for small data).
    """

    max_tokens: int = 32768
    max_sample_tokens: int = 16384
    lookahead: int = 0
    max_broken: int = 100
    seed: int = 0
    shuffle: bool = True
    num_workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    cache: bool = False

    def __post_init__(self) -> None:
        check(self.max_tokens > 0, "loader.max_tokens", self.max_tokens, "positive")
        most = self.max_sample_tokens
        check(0 < most <= self.max_tokens, "loader.max_sample_tokens", most, f"in 1..max_tokens ({self.max_tokens})")
        for name in ("lookahead", "max_broken", "seed", "num_workers"):
            check(getattr(self, name) >= 0, f"loader.{name}", getattr(self, name), "at least 0")
        check(self.prefetch > 0, "loader.prefetch", self.prefetch, "positive")


@dataclass(frozen=True)
class ConditionDropout:
    """Probabilities with which a droppable segment is left out of a sample (published defaults)."""

    text: float = 0.1
    latent: float = 0.3
    vit: float = 0.3

    def __post_init__(self) -> None:
        for name in ("text", "latent", "vit"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"dropout.{name}", value, "a probability in [0, 1]")


_NESTED = {
    "vision": VisionConfig,
    "latent": LatentConfig,
    "special_tokens": SpecialTokens,
    "latent_view": ImageConfig,
    "vit_view": ImageConfig,
}


def guidance_from_dict(values: dict[str, Any]) -> GuidanceConfig:
    """The inverse of ``dataclasses.asdict`` for a GuidanceConfig. Raises ValueError naming every key that is none."""
    interval = values.get("interval", GuidanceConfig.interval)
    return _from_dict(GuidanceConfig, {**values, "interval": tuple(interval)})


def data_from_dict(values: dict[str, Any]) -> DataConfig:
    """The inverse of ``dataclasses.asdict`` for a DataConfig. Raises ValueError naming every unknown key."""
    return _from_dict(DataConfig, values)


def _from_dict(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown settings {[prefix + k for k in unknown]}; {cls.__name__} has {sorted(known)}")
    for name in _NESTED.keys() & values.keys():
        check(isinstance(values[name], dict), prefix + name, values[name], f"settings of {_NESTED[name].__name__}")
    nested = {k: _from_dict(_NESTED[k], v, f"{prefix}{k}.") if k in _NESTED else v for k, v in values.items()}
    return cls(**nested)


def bagel_7b() -> ModelConfig:
    """BAGEL-7B-MoT, the published size."""
    return ModelConfig()


def quickstart(vocab_size: int = 512, special_tokens: SpecialTokens | None = None) -> ModelConfig:
    """A model of about one million parameters for 8×8 grey images, trainable in minutes on two CPU cores."""
    return ModelConfig(
        hidden_size=128,
        intermediate_size=256,
        num_layers=3,
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
