"""The published way of computing UniGenDet, as a baseline: the same numbers by other means.

What it does otherwise than the package, and what a comparison so measures:

- the residual stream stays in sequence order. Every norm, projection and MLP gathers the rows of each stream by index,
  works on them, and scatters the results into a freshly zeroed buffer, eight buffers a layer;
- q, k and v are three projections, gate and up two;
- keys and values are repeated up to the number of query heads;
- attention is one call of ``scaled_dot_product_attention`` per sample, under a dense additive mask of the sample, which
  is built on the host, once per step (``dense_masks``);
- the alignment loss resizes the teacher's features image by image, and stores them.

Where the published code is slow for no reason of method, the baseline has the benefit of the doubt: the real/fake head
gathers its rows by index (published: a Python loop that looks for them in a CUDA tensor), the masks already have the
activations' dtype, and a time is embedded once per image. The published alignment loss never reaches the optimiser, and
its teacher drifts; here both do what they are meant to (docs/model.md §7).

Parameters have the package's names, but for those that are not fused here (``counterparts``).
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unigendet.config import ModelConfig
from unigendet.model.losses import NoisedLatents
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import patchify

from .published_layers import (
    PublishedLayer,
    PublishedPack,
    PublishedVision,
    dense_masks,
    per_stream,
    plain_norm,
    rope_of,
    stream_norm,
)

__all__ = [
    "PublishedAlignment",
    "PublishedLayer",
    "PublishedModel",
    "PublishedPack",
    "counterparts",
    "dense_masks",
    "plain_norm",
    "rope_of",
]

_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_SAME = ("embed_tokens", "lm_head", "connector", "vae2llm", "llm2vae", "time_embedding", "class_head", "align_head")
_HEADS = ("lm_head", "llm2vae", "class_head", "align_head")
_ALIGNMENT = ("align_head.", "vae2llm.", "llm2vae.", "time_embedding.")


def counterparts(name: str) -> tuple[str, ...]:
    """Names of the parameters here that, one below the other, are the package's parameter ``name``."""
    path = name.split(".")
    for fused, parts in _FUSED.items():
        if fused in path:
            return tuple(".".join(part if step == fused else step for step in path) for part in parts)
    return (name,)


class PublishedDecoder(nn.Module):
    """Decoder layers and final norm, in sequence order. ``recompute``: layers run again in the backward pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False

    @classmethod
    def of(cls, model: UniGenDet) -> PublishedDecoder:
        """With copies of the weights of ``model``'s decoder."""
        own = cls(model.config)
        own.layers = nn.ModuleList(PublishedLayer.of(layer, model.config) for layer in model.decoder.layers)
        own.norm = copy.deepcopy(model.decoder.norm)
        return own

    def forward(
        self, x: Tensor, pack: PublishedPack, capture: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """[T, hidden] after the final norm, and the output of the layers in ``capture``, numbered from 1."""
        rope = rope_of(pack, self.config, x.dtype)
        captured = {}
        for number, layer in enumerate(self.layers, start=1):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, pack, rope, use_reentrant=False)
            else:
                x = layer(x, pack, rope)
            if number in capture:
                captured[number] = x
        return per_stream(x, pack, stream_norm(self.norm, self.config.rms_norm_eps))[0], captured


class PublishedModel(nn.Module):
    """The model. Build it with :meth:`of`; it computes in its parameters' dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def of(cls, model: UniGenDet) -> PublishedModel:
        """A model with copies of ``model``'s weights, on its device, in its dtype; all parameters are trainable."""
        own = cls(model.config)
        for name in _SAME:
            setattr(own, name, copy.deepcopy(getattr(model, name)))
        for name in ("vit_table", "latent_table"):
            own.register_buffer(name, getattr(model, name).clone())
        own.vision = PublishedVision.of(model.vision)
        own.decoder = PublishedDecoder.of(model)
        return own.requires_grad_(True)

    def forward(
        self, pack: PublishedPack, tokens: Tensor | None, timesteps: Tensor | None, capture: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the decoder on a pack.

        Args:
            pack: on the model's device.
            tokens: [Nl, patch²·channels], the latent tokens, noised where they are to be; needed if the pack has any.
            timesteps: [latent images], 0 for clean ones.
            capture: layers whose output is wanted, numbered from 1.

        Returns:
            [T, hidden] after the final norm, and the captured outputs, in sequence order.
        """
        return self.decoder(self._embed(pack, tokens, timesteps), pack, capture)

    def _embed(self, pack: PublishedPack, tokens: Tensor | None, timesteps: Tensor | None) -> Tensor:
        weight = self.embed_tokens.weight
        x = weight.new_zeros(pack.positions.shape[0], self.config.hidden_size)
        x[pack.text_rows] = self.embed_tokens(pack.text_ids)
        if pack.vit_sizes:
            x[pack.vit_rows] = self.connector(self.vision(pack)) + self.vit_table[pack.vit_positions].to(x.dtype)
        if pack.latent_sizes:
            time = self.time_embedding(timesteps)[pack.latent_image]
            table = self.latent_table[pack.latent_positions].to(x.dtype)
            x[pack.latent_rows] = self.vae2llm(tokens.to(x.dtype)) + time + table
        return x

    def gduf_losses(self, pack: PublishedPack, latents: NoisedLatents) -> dict[str, Tensor]:
        """The terms ``mse``, ``ce`` and ``label`` of GDUF, unweighted, as far as the pack has something for them."""
        hidden, _ = self(pack, latents.tokens, latents.timesteps)
        losses = {}
        if pack.noised_tokens.shape[0]:
            losses["mse"] = self.velocity_loss(pack, hidden, latents)
        if pack.targets.shape[0]:
            losses["ce"] = _cross_entropy(self.lm_head(hidden[pack.target_rows]), pack.targets)
        if pack.labels.shape[0]:
            losses["label"] = _cross_entropy(self.class_head(hidden[pack.label_rows]), pack.labels)
        return losses

    def velocity_loss(self, pack: PublishedPack, hidden: Tensor, latents: NoisedLatents) -> Tensor:
        """Mean squared error of the velocity at the noised latent tokens."""
        error = _wide(self.llm2vae(hidden[pack.noised_rows])) - latents.target[pack.noised_tokens]
        return error.square().mean()


class PublishedAlignment:
    """The DIGA step of a model. Making it marks what learns and freezes the teacher, a copy of the lower layers.

    Args:
        model: it needs an alignment head.
        align_layer: the student's decoder layer whose output is aligned, numbered from 1.
        teacher_layer: the teacher's last decoder layer.
    """

    def __init__(self, model: PublishedModel, *, align_layer: int = 8, teacher_layer: int = 8) -> None:
        layers = model.config.num_layers
        for what, layer in (("align_layer", align_layer), ("teacher_layer", teacher_layer)):
            if not 1 <= layer <= layers:
                raise ValueError(f"{what} is {layer}; it must be in 1..{layers}, the model's decoder layers")
        if model.align_head is None:
            raise ValueError("the model has no alignment head; DIGA needs one built with align_head=True")
        self.model, self.align_layer = model, align_layer
        for name, parameter in model.named_parameters():
            in_generation = name.startswith("decoder.") and ".gen" in name
            parameter.requires_grad_(in_generation or name.startswith(_ALIGNMENT))
        self.teacher = _frozen(model, teacher_layer)

    def losses(self, pack: PublishedPack, latents: NoisedLatents, teacher_pack: PublishedPack) -> dict[str, Tensor]:
        """The terms ``mse`` and ``diga``, unweighted.

        Args:
            pack: generation samples; all latent images are noised.
            latents: of ``pack``.
            teacher_pack: the teacher's samples of the same images, in the same order.
        """
        hidden, captured = self.model(pack, latents.tokens, latents.timesteps, (self.align_layer,))
        teacher = self._features(teacher_pack)
        images = teacher.split([rows * columns for rows, columns in teacher_pack.vit_sizes])
        resized = []
        for image, size, target in zip(images, teacher_pack.vit_sizes, pack.latent_sizes, strict=True):
            grid = image.T.unflatten(1, size)[None]  # [1, hidden, rows, columns]
            resized.append(F.interpolate(grid, target, mode="bilinear", align_corners=False)[0].flatten(1).T)
        projected = self.model.align_head(captured[self.align_layer][pack.noised_rows])
        cosine = F.cosine_similarity(torch.cat(resized), projected, dim=1, eps=1e-8)
        return {"mse": self.model.velocity_loss(pack, hidden, latents), "diga": 1 - cosine.mean()}

    @torch.no_grad()
    def _features(self, pack: PublishedPack) -> Tensor:
        """The teacher's features [Nv, hidden] of the ViT patches; its latent images are clean."""
        latent, tokens = self.model.config.latent, []
        values = pack.latents.split([rows * columns * latent.token_dim for rows, columns in pack.latent_sizes])
        for image, (rows, columns) in zip(values, pack.latent_sizes, strict=True):
            shape = (latent.channels, rows * latent.patch_size, columns * latent.patch_size)
            tokens.append(patchify(image.view(shape), latent.patch_size))
        times = torch.zeros(len(tokens), device=pack.latents.device)
        return self.teacher(pack, torch.cat(tokens), times)[0][pack.vit_rows]


def _frozen(model: PublishedModel, layers: int) -> PublishedModel:
    """A frozen model up to decoder layer ``layers``, without heads; it shares what is frozen in ``model``."""
    dropped = [*model.decoder.layers[layers:], *(head for name in _HEADS if (head := getattr(model, name)) is not None)]
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers(), *dropped]
    teacher = copy.deepcopy(model, {id(thing): thing for thing in shared})
    teacher.decoder.layers = teacher.decoder.layers[:layers]
    for name in _HEADS:
        setattr(teacher, name, None)
    return teacher.requires_grad_(False)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_wide(logits), targets, reduction="none").mean()


def _wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
