"""What a training step keeps for its backward pass, in bytes, derived from what the ops save.

A decoder layer on T tokens, with H the hidden size, I the intermediate size, A = heads · head_dim, Q = A + 2 · kv_heads
· head_dim, c the bytes of a number that matrix products read and r those of one in the residual stream, saves

    the two norms' inputs        2 T H r + 8 T       (and a float32 statistic per row of each)
    their outputs                2 T H c             read by the matrix products
    qkv before and after RoPE    2 T Q c
    the attention's output, lse  T A c + 4 T heads
    gate and up, their product   3 T I c

A layer of the ViT on N patches, of width w and intermediate size m, saves N (2 w r + 6 w c + 2 m c + 4 heads + 16).
Layers that are computed again (``recompute``) keep their inputs: x and, in the decoder, the not yet added delta, T H (r
+ c); ``attention`` also keeps the attention's output and lse, ``selective`` the outputs of matrix products too.
The last decoder layer has the queries that a loss reads (``PackedBatch.readout``) and no others.

The text head keeps its input and the float32 log-probabilities of every predicted token, 4 · vocabulary bytes each, and
needs twice as much again while they are computed and differentiated.

Left out are index tensors, which are counted with the pack, and what the real/fake head keeps of a row per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from unigendet.config import ModelConfig
from unigendet.model.embeddings import TimestepEmbedding
from unigendet.packing import PackedBatch


@dataclass(frozen=True)
class Precision:
    """Bytes per number: ``compute`` in matrix products and attention, ``residual`` in the residual stream."""

    compute: int
    residual: int

    @classmethod
    def of(cls, precision: str, sharded: bool) -> Precision:
        """float32; bfloat16 copies of sharded weights; or autocast, which keeps the residual stream in float32."""
        if precision == "fp32":
            return cls(4, 4)
        return cls(2, 2 if sharded else 4)


@dataclass(frozen=True)
class Activations:
    """Bytes by part of the model.

    ``decoder``, ``vision`` (ViT and connector), ``heads``: kept from the forward pass to the backward pass.
    ``decoder_layer``, ``vision_layer``: what the backward pass of one layer needs besides, recomputed activations and
    gradients. ``text_head``: what the text loss needs besides while it is computed. ``teacher``: one layer of DIGA's
    teacher, whose pass keeps nothing.
    """

    decoder: int
    vision: int
    heads: int
    decoder_layer: int
    vision_layer: int
    text_head: int
    teacher: int = 0

    @property
    def kept(self) -> int:
        """All that is kept at the end of the forward pass."""
        return self.decoder + self.vision + self.heads


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer: ``saved`` without recomputing, ``kept`` with it, ``gradients`` at most at a time."""

    saved: int
    kept: int
    gradients: int

    @property
    def working(self) -> int:
        return self.saved - self.kept + self.gradients


def activations(
    model: ModelConfig,
    batch: PackedBatch,
    precision: Precision,
    recompute: str,
    *,
    captured: int | None = None,
    teacher: PackedBatch | None = None,
) -> Activations:
    """Activations of one forward and backward pass.

    Args:
        model: sizes.
        batch: the pack that learns.
        precision: bytes per number.
        recompute: ``none``, ``full``, ``attention`` or ``selective``, of the decoder's layers and the ViT's.
        captured: DIGA's student layer, numbered from 1.
        teacher: the pack of DIGA's teacher.
    """
    rows = batch.layout.num_queries
    read = rows if batch.readout is None or captured == model.num_layers else batch.readout.stream_rows.shape[0]
    whole, last = (_decoder_layer(model, rows, r, precision, recompute) for r in (rows, read))
    hidden, c, r = model.hidden_size, precision.compute, precision.residual
    decoder = (model.num_layers - 1) * whole.kept + last.kept + read * (hidden * r + 4)  # with the final norm's input
    if recompute in ("full", "attention"):  # the first layer, and the one after the captured one, have no delta
        decoder -= rows * hidden * c * (1 if captured in (None, model.num_layers) else 2)
    targets = batch.targets.shape[0]
    heads = targets * (hidden * c + 4 * model.vocab_size)
    heads += batch.noised_tokens.shape[0] * (hidden * c + model.latent.token_dim * (c + 4))
    heads += batch.latent_positions.shape[0] * model.latent.token_dim * c  # what vae2llm reads
    heads += len(batch.latent_sizes) * (TimestepEmbedding.features + 2 * hidden) * c
    if captured is not None:
        heads += batch.noised_tokens.shape[0] * hidden * c * (2 if model.align_projector == "conv" else 10)
    vision, vision_layer = _vision(model, batch.vit_patches.shape[0], precision, recompute)
    return Activations(
        decoder=decoder,
        vision=vision,
        heads=heads,
        decoder_layer=whole.working,
        vision_layer=vision_layer,
        text_head=targets * model.vocab_size * 8,
        teacher=0 if teacher is None else _passing(model, teacher.layout.num_queries, precision),
    )


def _decoder_layer(model: ModelConfig, rows: int, read: int, precision: Precision, recompute: str) -> _Layer:
    """A layer with ``rows`` keys, of which ``read`` go on as queries."""
    hidden, inner, c, r = model.hidden_size, model.intermediate_size, precision.compute, precision.residual
    attended, keys = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    attention = read * (attended * c + 4 * model.num_heads)
    saved = rows * (hidden * (r + c) + 4 + (attended + 2 * keys) * c) + read * attended * c + attention
    saved += read * (hidden * (r + c) + 4 + 3 * inner * c)
    kept = {
        "none": saved,
        "full": rows * hidden * (r + c),
        "attention": rows * hidden * (r + c) + attention,
        # The output of ``down`` is the next layer's delta: it is counted there, once.
        "selective": rows * (hidden * r + (attended + keys) * c) + attention + read * (2 * hidden + 2 * inner) * c,
    }[recompute]
    return _Layer(saved, kept, rows * (3 * inner * c + 2 * hidden * r))


def _vision(model: ModelConfig, patches: int, precision: Precision, recompute: str) -> tuple[int, int]:
    """ViT and connector: what is kept, and what the backward pass of a layer needs besides."""
    vision, c, r = model.vision, precision.compute, precision.residual
    width, inner = vision.hidden_size, vision.intermediate_size
    saved = patches * (2 * width * r + 6 * width * c + 2 * inner * c + 4 * vision.num_heads + 16)
    kept = {
        "none": saved,
        "full": patches * width * r,
        "attention": patches * (width * (r + c) + 4 * vision.num_heads),
        "selective": patches * (width * r + (6 * width + inner) * c + 4 * vision.num_heads),
    }[recompute]
    layer = _Layer(saved, kept, patches * (2 * inner * c + 2 * width * r))
    ends = patches * ((vision.patch_dim * c if c < 4 else 0) + width * (r + c) + 8 + 2 * model.hidden_size * c)
    return vision.num_layers * layer.kept + ends, layer.working if patches else 0


def _passing(model: ModelConfig, rows: int, precision: Precision) -> int:
    """The most that a decoder layer holds at a time when nothing is kept for a backward pass: in the MLP."""
    per_row = 3 * model.intermediate_size * precision.compute + model.hidden_size * (
        precision.compute + 2 * precision.residual
    )
    return rows * per_row
