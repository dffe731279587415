"""The layers of the baseline ``published``: what a pack is to it, the decoder layer, the ViT."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unigendet.config import ModelConfig
from unigendet.model.transformer import DecoderLayer, StreamLinear, StreamNorm
from unigendet.model.vision import VisionEncoder, VisionLayer
from unigendet.ops import rope_table
from unigendet.packing import PackedBatch

STREAMS = ("und", "gen")

# Shapes: T rows in sequence order; Nt texts and delimiters, Nv ViT patches, Nl latent tokens, M of them noised.


def dense_masks(splits: Sequence[Sequence[tuple[int, str]]], dtype: torch.dtype) -> list[Tensor]:
    """Every sample's additive mask [n, n] on the CPU: 0 where the row's token sees the column's, else −inf."""
    masks = []
    for sample in splits:
        ends = torch.tensor([0, *(tokens for tokens, _ in sample)]).cumsum(0).tolist()
        visible = torch.ones(ends[-1], ends[-1], dtype=torch.bool).tril_()
        for (begin, end), (_, mode) in zip(pairwise(ends), sample, strict=True):
            if mode == "noise":
                visible[:, begin:end] = False
            if mode != "causal":
                visible[begin:end, begin:end] = True
        masks.append(torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf")))
    return masks


@dataclass(frozen=True, eq=False)
class PublishedPack:
    """A pack in sequence order: contents, for every kind of token the rows that hold it, and the samples' masks."""

    streams: dict[str, Tensor]  # int64: rows of each stream
    positions: Tensor  # int64 [T]: for RoPE
    max_position: int
    lengths: list[int]  # tokens per sample
    masks: list[Tensor]  # [n, n] per sample
    text_ids: Tensor  # int64 [Nt]
    text_rows: Tensor  # int64 [Nt]
    vit_patches: Tensor  # [Nv, patch_dim]
    vit_positions: Tensor  # int64 [Nv]
    vit_rows: Tensor  # int64 [Nv]
    vit_sizes: tuple[tuple[int, int], ...]
    latents: Tensor  # [ΣC·H·W], as in ``PackedBatch``
    latent_positions: Tensor  # int64 [Nl]
    latent_image: Tensor  # int64 [Nl]
    latent_rows: Tensor  # int64 [Nl]
    latent_sizes: tuple[tuple[int, int], ...]
    noised_tokens: Tensor  # int64 [M]: latent tokens with the flow-matching loss
    noised_rows: Tensor  # int64 [M]: their rows
    target_rows: Tensor  # int64: rows that predict a token
    targets: Tensor  # int64
    label_rows: Tensor  # int64: first token of each labelled answer
    labels: Tensor  # int64

    @classmethod
    def of(cls, batch: PackedBatch, splits: Sequence[Sequence[tuple[int, str]]], dtype: torch.dtype) -> PublishedPack:
        """Index tensors and masks (of ``dtype``) for a pack with these splits, on the batch's device.

        Raises ValueError unless the splits' samples have the lengths of the batch's.
        """
        lengths = [sum(tokens for tokens, _ in sample) for sample in splits]
        have = batch.layout.cu_seqlens_q.diff().tolist()
        if lengths != have:
            raise ValueError(f"splits make samples of {lengths} tokens; the batch has samples of {have}")
        sequence = batch.layout.stream_to_sequence
        rows = torch.empty_like(sequence)  # of the text, ViT and latent tokens, one kind after another
        rows[batch.source_rows] = sequence
        kinds = [x.shape[0] for x in (batch.text_ids, batch.vit_positions, batch.latent_positions)]
        text_rows, vit_rows, latent_rows = rows.split(kinds)
        same = ("text_ids", "vit_patches", "vit_positions", "vit_sizes", "latents", "latent_positions")
        same += ("latent_image", "latent_sizes", "noised_tokens", "targets", "labels")
        return cls(
            streams=dict(zip(STREAMS, sequence.split(batch.layout.stream_lengths.tolist()), strict=True)),
            positions=batch.layout.positions,
            max_position=batch.layout.max_position,
            lengths=lengths,
            masks=[mask.to(batch.layout.device) for mask in dense_masks(splits, dtype)],
            text_rows=text_rows,
            vit_rows=vit_rows,
            latent_rows=latent_rows,
            noised_rows=latent_rows[batch.noised_tokens],
            target_rows=sequence[batch.target_rows],
            label_rows=sequence[batch.label_rows],
            **{name: getattr(batch, name) for name in same},
        )

    def to(self, device: torch.device | str) -> PublishedPack:
        """The same pack on ``device``."""
        return PublishedPack(**{f.name: _moved(getattr(self, f.name), device) for f in dataclasses.fields(self)})


def _moved(value: object, device: torch.device | str) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: item.to(device) for key, item in value.items()}
    return [x.to(device) if isinstance(x, Tensor) else x for x in value] if isinstance(value, list) else value


def rope_of(pack: PublishedPack, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, head_dim] of the pack's positions, for both halves of a head; once per step."""
    tables = rope_table(pack.max_position + 1, config.head_dim, config.rope_theta, device=pack.positions.device)
    cos, sin = (torch.cat((y, y), 1)[pack.positions, None].to(dtype) for y in tables)
    return cos, sin


def per_stream(x: Tensor, pack: PublishedPack, *functions: Callable[[Tensor, str], Tensor]) -> list[Tensor]:
    """Each stream's rows of x, gathered once; function(rows, stream) of them, scattered into a zeroed buffer each."""
    gathered = {stream: x[rows] for stream, rows in pack.streams.items()}
    results = []
    for function in functions:
        parts = {stream: function(rows, stream) for stream, rows in gathered.items()}
        out = x.new_zeros(x.shape[0], *parts["und"].shape[1:])
        for stream, part in parts.items():
            out[pack.streams[stream]] = part
        results.append(out)
    return results


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in at least float32, rounded to x's dtype before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def stream_norm(norm: StreamNorm, eps: float) -> Callable[[Tensor, str], Tensor]:
    """The norm as ``per_stream`` applies it."""
    return lambda rows, stream: plain_norm(rows, getattr(norm, stream), eps)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, half-split; x [T, heads, D], cosines and sines [T, 1, D]."""
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-second, first), -1) * rope[1]


def _sdpa_backend(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """On CUDA devices the memory-efficient kernel, which knows no float64; elsewhere PyTorch's choice."""
    if x.is_cuda and x.dtype != torch.float64:
        return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    return contextlib.nullcontext()


def _unfused(linear: nn.Linear, sizes: Sequence[int]) -> list[nn.Linear]:
    """The parts of a fused linear layer, each with parameters of its own."""
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.detach().split(list(sizes))
    parts = []
    for weight, bias in zip(linear.weight.detach().split(list(sizes)), biases, strict=True):
        part = nn.Linear(linear.in_features, weight.shape[0], bias is not None, device="meta")
        part.weight = nn.Parameter(weight.clone())
        if bias is not None:
            part.bias = nn.Parameter(bias.clone())
        parts.append(part)
    return parts


def _unfused_streams(pair: StreamLinear, sizes: Sequence[int]) -> list[nn.ModuleDict]:
    und, gen = _unfused(pair.und, sizes), _unfused(pair.gen, sizes)
    return [nn.ModuleDict({"und": u, "gen": g}) for u, g in zip(und, gen, strict=True)]


class PublishedLayer(nn.Module):
    """A decoder layer; x [T, hidden] in sequence order → the same. Build it with :meth:`of`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.head_dim = config.rms_norm_eps, config.head_dim
        self.groups = config.num_heads // config.num_kv_heads

    @classmethod
    def of(cls, layer: DecoderLayer, config: ModelConfig) -> PublishedLayer:
        """A layer with copies of ``layer``'s weights."""
        own = cls(config)
        for name in ("norm1", "q_norm", "k_norm", "norm2"):
            setattr(own, name, copy.deepcopy(getattr(layer, name)))
        keys = config.num_kv_heads * config.head_dim
        own.q, own.k, own.v = _unfused_streams(layer.qkv, [config.num_heads * config.head_dim, keys, keys])
        own.gate, own.up = _unfused_streams(layer.gate_up, [config.intermediate_size] * 2)
        (own.out,) = _unfused_streams(layer.out, [config.hidden_size])
        (own.down,) = _unfused_streams(layer.down, [config.hidden_size])
        return own

    def forward(self, x: Tensor, pack: PublishedPack, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the layer; ``rope``: what ``rope_of`` gives for the pack."""
        (normed,) = per_stream(x, pack, stream_norm(self.norm1, self.eps))
        x = x + self._attend(normed, pack, rope)
        return x + per_stream(x, pack, self._mlp)[0]

    def _attend(self, x: Tensor, pack: PublishedPack, rope: tuple[Tensor, Tensor]) -> Tensor:
        project = [lambda rows, stream, pair=pair: pair[stream](rows) for pair in (self.q, self.k, self.v)]
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in per_stream(x, pack, *project))
        (q,) = per_stream(q, pack, stream_norm(self.q_norm, self.eps))
        (k,) = per_stream(k, pack, stream_norm(self.k_norm, self.eps))
        q, k = _rotate(q, rope), _rotate(k, rope)
        k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        parts = [y.transpose(0, 1).split(pack.lengths, 1) for y in (q, k, v)]  # [heads, n, head_dim] per sample
        with _sdpa_backend(x):
            outs = [
                F.scaled_dot_product_attention(*(y[None] for y in qkv), attn_mask=mask)[0]
                for *qkv, mask in zip(*parts, pack.masks, strict=True)
            ]
        attended = torch.cat(outs, 1).transpose(0, 1).flatten(1)
        return per_stream(attended, pack, lambda rows, stream: self.out[stream](rows))[0]

    def _mlp(self, rows: Tensor, stream: str) -> Tensor:
        m = plain_norm(rows, getattr(self.norm2, stream), self.eps)
        return self.down[stream](F.silu(self.gate[stream](m)) * self.up[stream](m))


class PublishedVisionLayer(nn.Module):
    """An encoder layer of the ViT; x [Nv, hidden] → the same. Build it with :meth:`of`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    @classmethod
    def of(cls, layer: VisionLayer) -> PublishedVisionLayer:
        """A layer with copies of ``layer``'s weights."""
        own = cls(layer.heads)
        for name in ("norm1", "out", "norm2", "mlp"):
            setattr(own, name, copy.deepcopy(getattr(layer, name)))
        own.q, own.k, own.v = _unfused(layer.qkv, [layer.out.out_features] * 3)
        return own

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Apply the layer to images of ``lengths`` patches."""
        n = self.norm1(x)
        qkv = [y(n).unflatten(1, (self.heads, -1)).transpose(0, 1)[None] for y in (self.q, self.k, self.v)]
        images = zip(*(y.split(list(lengths), 2) for y in qkv), strict=True)  # [1, heads, n, head_dim]
        attended = torch.cat([F.scaled_dot_product_attention(*image) for image in images], 2)
        x = x + self.out(attended[0].transpose(0, 1).flatten(1))
        return x + self.mlp(self.norm2(x))


class PublishedVision(nn.Module):
    """The ViT; patches [Nv, patch_dim] → features [Nv, hidden]. Build it with :meth:`of`."""

    @classmethod
    def of(cls, vision: VisionEncoder) -> PublishedVision:
        """A ViT with copies of ``vision``'s weights."""
        own = cls()
        for name in ("patch_embedding", "position_embedding", "norm"):
            setattr(own, name, copy.deepcopy(getattr(vision, name)))
        own.layers = nn.ModuleList(PublishedVisionLayer.of(layer) for layer in vision.layers)
        return own

    def forward(self, pack: PublishedPack) -> Tensor:
        """Encode the pack's ViT images."""
        x = self.patch_embedding(pack.vit_patches.to(self.patch_embedding.weight.dtype))
        x = x + self.position_embedding(pack.vit_positions)
        for layer in self.layers:
            x = layer(x, [rows * columns for rows, columns in pack.vit_sizes])
        return self.norm(x)
