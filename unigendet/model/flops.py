"""Floating-point operations of a layer and of a training step: what has to be computed, whoever computes it.

Counts are exact. They come from sizes and from the layout's tables on the host, so that counting a pack that lies on a
device waits for nothing.

Counted are matrix products and attention, a multiplication and an addition as two operations: linear layers by the rows
of each stream, attention by the visible pairs (docs/model.md §3), ``lm_head`` by the rows that predict a token, the
other heads by the rows that they read, the time embedding once per latent image. Of the last decoder layer counts
what the losses read (``PackedBatch.readout``): keys and values of all tokens, all else of the tokens that are read. The
teacher of DIGA counts whole.

Backward there is a product for the gradient of a layer's input, unless nothing that learns lies before it, and one for
that of its weights, if they learn. What comes before a layer is judged for the pack as a whole, as autograd does, not
row by row. Attention costs 4·head_dim·heads per pair forward and 8 backward; computing anything a second time is no
work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from unigendet.config import ModelConfig
from unigendet.layout import Layout
from unigendet.model.embeddings import TimestepEmbedding
from unigendet.packing import PackedBatch

STREAMS = ("und", "gen")


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the two directions."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepWork:
    """Work by part of the model."""

    parts: dict[str, Work]

    @property
    def forward(self) -> int:
        """Of all parts."""
        return sum(part.forward for part in self.parts.values())

    @property
    def backward(self) -> int:
        """Of all parts."""
        return sum(part.backward for part in self.parts.values())

    @property
    def total(self) -> int:
        """Of all parts, forward and backward."""
        return self.forward + self.backward


def decoder_layer(config: ModelConfig, layout: Layout, trained: Collection[str] = STREAMS) -> StepWork:
    """A decoder layer with the gradient of its input; ``trained``: the streams (``und``, ``gen``) whose weights learn.

    Parts: ``linear layers`` and ``attention``.
    """
    size, linear = layer_weights(config), Work()
    for stream, rows in zip(STREAMS, layout.stream_lengths.tolist(), strict=True):
        linear += _products(rows * size, weights=stream in trained)
    return StepWork(
        {
            "linear layers": linear,
            "attention": _attention(layout.visible_pairs(), config.num_heads * config.head_dim),
        }
    )


def gduf_step(config: ModelConfig, batch: PackedBatch) -> StepWork:
    """Forward and backward pass of GDUF, where everything learns but φ."""
    targets, labels = batch.targets.shape[0], batch.labels.shape[0]
    hidden = config.hidden_size
    head = hidden * (hidden // 4) + (hidden // 4) * 2
    return StepWork(
        {
            **_vision(config, batch, learns=True),
            "latent embedding": _latent_embedding(config, batch),
            **_decoder(config, batch, STREAMS),
            "text head": _products(targets * hidden * config.vocab_size),
            "real/fake head": _products(labels * head),
            "velocity head": _velocity_head(config, batch),
        }
    )


def diga_step(
    config: ModelConfig,
    batch: PackedBatch,
    teacher_batch: PackedBatch | None,
    *,
    align_layer: int = 8,
    teacher_layer: int = 8,
) -> StepWork:
    """Forward and backward pass of DIGA, where the generation stream, the latent projections and φ learn.

    The student is aligned after decoder layer ``align_layer``: if that is the last one, all of it is read. The teacher,
    up to layer ``teacher_layer``, has no backward pass and is one part. Raises ValueError if it has fewer layers.
    ``teacher_batch`` None: a step without alignment, in which neither the teacher nor φ runs.
    """
    if not 1 <= teacher_layer <= config.num_layers:
        raise ValueError(f"teacher_layer is {teacher_layer}; it must be in 1..{config.num_layers}")
    aligned = {}
    if teacher_batch is not None:
        if align_layer == config.num_layers:
            batch = dataclasses.replace(batch, readout=None)
        teacher = [
            *_vision(config, teacher_batch, learns=False).values(),
            _latent_embedding(config, teacher_batch),
            *_decoder(config, teacher_batch, (), layers=teacher_layer).values(),
        ]
        # φ: two layers with four times the features between them, or a 3×3 window, which counts whole at borders too.
        projector = {"mlp": 8, "conv": 9}[config.align_projector] * config.hidden_size**2
        aligned = {
            "alignment head": _products(batch.noised_tokens.shape[0] * projector),
            "teacher": Work(sum(part.forward for part in teacher)),
        }
    return StepWork(
        {
            **_vision(config, batch, learns=False),
            "latent embedding": _latent_embedding(config, batch),
            **_decoder(config, batch, ("gen",)),
            "velocity head": _velocity_head(config, batch),
            **aligned,
        }
    )


def layer_weights(config: ModelConfig) -> int:
    """Weights in the linear layers of one stream of a decoder layer."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def _products(size: int, *, inputs: bool = True, weights: bool = True) -> Work:
    """A linear layer; ``size``: rows · weights; the flags: of what there is a gradient."""
    return Work(2 * size, 2 * size * (inputs + weights))


def _attention(pairs: int, width: int) -> Work:
    return Work(4 * width * pairs, 8 * width * pairs)


def _decoder(
    config: ModelConfig, batch: PackedBatch, trained: Collection[str], layers: int | None = None
) -> dict[str, Work]:
    layers = config.num_layers if layers is None else layers
    parts = decoder_layer(config, batch.layout, trained).parts
    found = {name: Work(layers * w.forward, layers * w.backward) for name, w in parts.items()}
    for name, unread in _unread(config, batch, trained).items():
        found[name] = Work(found[name].forward - unread.forward, found[name].backward - unread.backward)
    return {f"decoder {name}": w for name, w in found.items()}


def _unread(config: ModelConfig, batch: PackedBatch, trained: Collection[str]) -> dict[str, Work]:
    """What the last layer need not compute, since no loss reads it: but for keys and values, which all tokens have."""
    if batch.readout is None:
        return {}
    size, linear = layer_weights(config) - config.hidden_size * 2 * config.num_kv_heads * config.head_dim, Work()
    rows = (batch.layout.stream_lengths - batch.readout.layout.stream_lengths).tolist()
    for stream, unread in zip(STREAMS, rows, strict=True):
        linear += _products(unread * size, weights=stream in trained)
    pairs = batch.layout.visible_pairs() - batch.readout.layout.visible_pairs()
    return {"linear layers": linear, "attention": _attention(pairs, config.num_heads * config.head_dim)}


def _vision(config: ModelConfig, batch: PackedBatch, *, learns: bool) -> dict[str, Work]:
    """The ViT and the connector: all of it learns, or nothing does and there is no backward pass."""
    vision, rows = config.vision, batch.vit_positions.shape[0]
    hidden, layers = vision.hidden_size, vision.num_layers
    size = layers * hidden * (4 * hidden + 2 * vision.intermediate_size)
    pairs = sum((h * w) ** 2 for h, w in batch.vit_sizes)
    parts = {
        "ViT linear layers": _products(rows * vision.patch_dim * hidden, inputs=False) + _products(rows * size),
        "ViT attention": _attention(layers * pairs, hidden),
        "connector": _products(rows * config.hidden_size * (hidden + config.hidden_size)),
    }
    return parts if learns else {name: Work(part.forward) for name, part in parts.items()}


def _latent_embedding(config: ModelConfig, batch: PackedBatch) -> Work:
    """``vae2llm`` and the time embedding, which learn in both stages; their inputs have no gradient."""
    hidden, images = config.hidden_size, len(batch.latent_sizes)
    projection = _products(batch.latent_positions.shape[0] * config.latent.token_dim * hidden, inputs=False)
    first = _products(images * TimestepEmbedding.features * hidden, inputs=False)
    return projection + first + _products(images * hidden**2)


def _velocity_head(config: ModelConfig, batch: PackedBatch) -> Work:
    return _products(batch.noised_tokens.shape[0] * config.hidden_size * config.latent.token_dim)
