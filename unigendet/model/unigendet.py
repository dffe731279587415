"""UniGenDet: a decoder that reads text, ViT and latent tokens, writes text, denoises latents, tells real from fake.

The way of a pack: ``embed`` makes the residual stream's first rows out of words, ViT patches and latent tokens
(stream-major); ``decoder`` transforms them; heads read the rows they need: ``text_logits``, ``velocity``,
``class_logits``, and φ, ``align``. Sizes, names and maths: paper section 3; the published parameter names are known to
``checkpoint.py`` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

from unigendet.config import ModelConfig
from unigendet.layout import Layout, Readout
from unigendet.model.alignment import ConvProjector
from unigendet.model.cache import KVCache
from unigendet.model.embeddings import Mlp, TimestepEmbedding, sincos_table
from unigendet.model.idle import nothing_from
from unigendet.model.transformer import Decoder, StreamNorm
from unigendet.model.vision import VisionEncoder

if TYPE_CHECKING:
    from unigendet.packing import PackedBatch


@dataclass(frozen=True)
class ModelOutput:
    """``hidden`` [T, hidden], final norm applied, stream-major; ``captured``: layers asked for, before any norm.

    Where only a part was computed, ``hidden`` has the rows of ``readout``, in its order.
    """

    hidden: Tensor
    captured: dict[int, Tensor]
    readout: Readout | None = None

    def places(self, rows: Tensor) -> Tensor:
        """Where ``hidden`` has the given stream-major rows of the pack."""
        return rows if self.readout is None else self.readout.places.index_select(0, rows)


# FSDP looks for the tensors among a module's outputs, from which the backward pass begins.
register_pytree_node(
    ModelOutput,
    lambda output: ([output.hidden, output.captured], output.readout),
    lambda tensors, readout: ModelOutput(*tensors, readout),
)


class UniGenDet(nn.Module):
    """The model. Parameters are initialised for training from scratch; ``from_pretrained`` loads published weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.vision = VisionEncoder(config.vision)
        self.connector = Mlp(config.vision.hidden_size, hidden, hidden)
        self.vae2llm = nn.Linear(config.latent.token_dim, hidden)
        self.llm2vae = nn.Linear(hidden, config.latent.token_dim)
        self.time_embedding = TimestepEmbedding(hidden)
        for name, table in position_tables(config).items():
            self.register_buffer(name, table)
        self.class_head = _class_head(hidden) if config.class_head else None
        self.align_head = _align_head(config) if config.align_head else None
        self.backend = "auto"
        self.compute_dtype: torch.dtype | None = (
            None  # where it is not the parameters': they are copied to compute with
        )
        init_weights(self)
        self.scale_new_weights()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> UniGenDet:
        """Load weights and settings from a folder or file; options and errors: ``checkpoint.load_pretrained``."""
        from unigendet.model.checkpoint import load_pretrained

        return load_pretrained(path, **options)

    @torch.no_grad()
    def scale_new_weights(self) -> None:
        """After ``init_weights``, once: what the place of a module in the model changes about its weights."""
        # Each layer adds twice to the residual: keep its variance from growing with depth.
        for layer in self.decoder.layers:
            for projection in (layer.out, layer.down):
                for parameter in projection.parameters():
                    parameter.mul_((2 * self.config.num_layers) ** -0.5)
        nn.init.zeros_(self.llm2vae.weight)  # the velocity starts at zero

    @property
    def device(self) -> torch.device:
        """Where it computes; its parameters are there too, unless they are kept in host memory meanwhile."""
        return self.latent_table.device

    def new_cache(self, capacity: Sequence[int]) -> KVCache:
        """An empty cache, ``capacity[i]`` key rows for sample i, on the model's device, in the dtype of its keys."""
        dtype, device = self.compute_dtype or self.vae2llm.weight.dtype, self.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return KVCache(self.config, capacity, device=device, dtype=dtype)

    def forward(
        self,
        batch: PackedBatch,
        *,
        latent_tokens: Tensor | None = None,
        timesteps: Tensor | None = None,
        cache: KVCache | None = None,
        capture: Collection[int] = (),
        stop_after: int | None = None,
        only_read: bool = False,
        idle: Collection[str] = (),
    ) -> ModelOutput:
        """Embed a pack and run the decoder.

        Args:
            batch: on the model's device.
            latent_tokens: [Nl, patch²·channels], the (noised) latent tokens in the batch's order; needed if it has
                latents.
            timesteps: [latent images] in [0, 1], the time of each latent image (0 = clean).
            cache: keys and values of the tokens the batch has cached; new ones are written into it.
            capture: layers whose output is wanted, numbered from 1.
            stop_after: number of layers to run.
            only_read: the last layer may leave out the rows that no training loss reads.
            idle: inputs, of ``vit`` and ``latent``, whose modules are run for nothing if the batch has none of them,
                because another process's batch may (``idle.py``).

        Returns:
            ``ModelOutput``.
        """
        x = self.embed(batch, latent_tokens, timesteps, idle)
        whole = not only_read or (stop_after or self.config.num_layers) in capture
        readout = None if whole else batch.readout
        options = {"cache": cache, "capture": capture, "stop_after": stop_after, "backend": self.backend}
        hidden, captured = self.decoder(x, batch.layout, readout=readout, **options)
        return ModelOutput(hidden, captured, readout)

    def embed(
        self,
        batch: PackedBatch,
        latent_tokens: Tensor | None,
        timesteps: Tensor | None,
        idle: Collection[str] = (),
    ) -> Tensor:
        """The residual stream's first rows [T, hidden], stream-major."""
        parts = [F.embedding(batch.text_ids, self.embed_tokens.weight)]
        if batch.vit_layout is not None:
            features = self.vision(batch.vit_patches, batch.vit_positions, batch.vit_layout, self.backend)
            parts.append(self.connector(features) + self.vit_table[batch.vit_positions])
        if batch.latent_sizes:
            rows, images = batch.latent_positions.shape[0], len(batch.latent_sizes)
            if latent_tokens is None or latent_tokens.shape != (rows, self.config.latent.token_dim):
                have = None if latent_tokens is None else list(latent_tokens.shape)
                raise ValueError(
                    f"latent_tokens is {have}; it must be a tensor [{rows}, {self.config.latent.token_dim}]"
                )
            if timesteps is None or timesteps.shape != (images,):
                have = None if timesteps is None else list(timesteps.shape)
                raise ValueError(f"timesteps is {have}; it must be a tensor [{images}], one time per latent image")
            time = self.time_embedding(timesteps)[batch.latent_image]
            projected = self.vae2llm(latent_tokens.to(self.vae2llm.weight.dtype))
            parts.append(projected + time + self.latent_table[batch.latent_positions])
        dtype = parts[0].dtype
        rows = torch.cat([part.to(dtype) for part in parts]).index_select(0, batch.source_rows)
        if "vit" in idle and batch.vit_layout is None:
            rows = rows + self._seen_in_vain().to(dtype)
        if "latent" in idle and not batch.latent_sizes:
            rows = rows + nothing_from(self.vae2llm, self.time_embedding).to(dtype)
        return rows

    def _seen_in_vain(self) -> Tensor:
        """0, from the ViT's look at one black patch."""
        device = self.device
        patch = torch.zeros(1, self.config.vision.patch_dim, device=device)
        layout = Layout.from_splits([[(1, "full")]]).to(device)
        features = self.vision(patch, torch.zeros(1, dtype=torch.int64, device=device), layout, self.backend)
        return 0 * self.connector(features).sum()

    def text_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Next-token logits [rows, vocab] of the given stream-major rows."""
        return self.lm_head(hidden.index_select(0, rows))

    def velocity(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Predicted velocity [rows, patch²·channels] of the given stream-major rows (latent tokens)."""
        return self.llm2vae(hidden.index_select(0, rows))

    def class_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits [rows, 2] of (fake, real), read at the first token of an answer. Needs ``config.class_head``."""
        if self.class_head is None:
            raise ValueError("this model has no real/fake head; build it with class_head=True")
        return self.class_head(hidden.index_select(0, rows))

    def align(self, hidden: Tensor, rows: Tensor, sizes: Sequence[tuple[int, int]] = ()) -> Tensor:
        """φ, DIGA's projection [rows, hidden] of a layer's output at the given rows. Needs ``config.align_head``.

        ``sizes``: (rows, columns) of every image's tokens, in the order of ``rows``; a convolution needs them.
        """
        if self.align_head is None:
            raise ValueError("this model has no alignment head; build it with align_head=True")
        selected = hidden.index_select(0, rows)
        return self.align_head(selected, sizes) if self.config.align_projector == "conv" else self.align_head(selected)


def init_weights(module: nn.Module) -> None:
    """Initialise a module: normal weights, deviation 1/√fan_in (0.02 for tables), zero biases, fresh norms."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, nn.LayerNorm | StreamNorm):
            part.reset_parameters()


def position_tables(config: ModelConfig) -> dict[str, Tensor]:
    """The model's buffers by name: where a ViT patch, or a latent token, lies in its image."""
    sides = {"vit_table": config.vision.max_patches_per_side, "latent_table": config.latent.max_size}
    return {name: sincos_table(side, config.hidden_size) for name, side in sides.items()}


def latent_rows(batch: PackedBatch) -> Tensor:
    """Stream-major rows [Nl] of all latent tokens: the generation stream, in the order of the latent images."""
    first = batch.layout.stream_lengths[0].item()
    return torch.arange(first, first + batch.latent_positions.shape[0], device=batch.layout.device)


def _align_head(config: ModelConfig) -> nn.Module:
    hidden = config.hidden_size
    if config.align_projector == "conv":
        return ConvProjector(hidden)
    return Mlp(hidden, 4 * hidden, hidden, approximate="none")


def _class_head(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden, eps=1e-5), nn.Linear(hidden, hidden // 4), nn.ReLU(), nn.Linear(hidden // 4, 2)
    )
