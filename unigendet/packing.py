"""Samples and packs: from segments to one row of tokens.

A sample is an ordered list of segments. Each segment becomes one split of the pack (BAGEL's packing, section 3.1):

* ``Text`` with ids x1..xn: ``[bos, x1..xn, eos]``, causal. With loss, the first n+1 tokens predict ``[x1..xn, eos]``.
* ``VitImage``: ``[start_of_image, patches row by row, end_of_image]``, full.
* ``LatentImage``: ``[start_of_image, latent tokens row by row, end_of_image]``, full if clean, noise if noised. The
  latent tokens are the generation stream; everything else, the delimiters included, is the understanding stream.

RoPE positions: text runs on; all tokens of an image share one position, and the next segment goes on one further,
except after a noised image. A dropped text vanishes; a dropped image vanishes but still advances the position.

Detection sample: ``[LatentImage clean] [VitImage] [Text question] [Text answer, loss]``; its order is what makes the
attention symbiotic: the detector's ViT and text tokens see the generator's latent tokens. Generation sample:
``[Text caption, droppable] [LatentImage noised]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigendet.config import ConditionDropout, ModelConfig
from unigendet.layout import Layout, Readout


@dataclass(frozen=True)
class Text:
    """Token ids without bos and eos. ``eos=False`` leaves the end open: an answer that is being decoded."""

    ids: Sequence[int]
    loss: bool = False
    droppable: bool = False
    eos: bool = True


@dataclass(frozen=True)
class VitImage:
    """A normalised image for the ViT: ``pixels`` float [channels, H, W], sides multiples of the ViT's patch size."""

    pixels: Tensor
    droppable: bool = False


@dataclass(frozen=True)
class LatentImage:
    """``latent`` float [C, H, W], sides multiples of the latent patch size. ``noised``: has the flow-matching loss."""

    latent: Tensor
    noised: bool = False
    droppable: bool = False


Segment = Text | VitImage | LatentImage


@dataclass(frozen=True)
class Sample:
    """A training example or request. ``label``: 1 real, 0 fake, None unlabelled; ``name`` appears in error messages."""

    segments: tuple[Segment, ...]
    label: int | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pack, ready for the model. T tokens with a query, Nt texts and delimiters, Nv ViT patches, Nl latent tokens.

    Rows called stream-major index the model's residual stream (see ``Layout``); latent token i is stream-major row
    ``stream_lengths[0] + i``.
    """

    layout: Layout
    text_ids: Tensor  # int64 [Nt]: text tokens and image delimiters, in sequence order
    vit_patches: Tensor  # float [Nv, patch_dim]: flattened (row in patch, column in patch, channel)
    vit_positions: Tensor  # int64 [Nv]: index into the position tables, row · max_patches_per_side + column
    vit_layout: Layout | None  # one full split per ViT image; None without ViT images
    vit_sizes: tuple[tuple[int, int], ...]  # (rows, columns) of patches per ViT image
    latents: Tensor  # float [ΣC·H·W]: the latent images one after another, as [C, H, W]
    latent_sizes: tuple[tuple[int, int], ...]  # (rows, columns) of tokens per latent image
    latent_positions: Tensor  # int64 [Nl]: row · max_size + column
    latent_image: Tensor  # int64 [Nl]: which latent image a latent token belongs to
    noised_images: Tensor  # bool [latent images]
    noised_tokens: Tensor  # int64 [M]: the latent tokens with the flow-matching loss
    source_rows: Tensor  # int64 [T]: for each stream-major row, its row in (text embeddings, ViT tokens, latent tokens)
    vit_rows: Tensor  # int64 [Nv]: stream-major row of each ViT patch
    target_rows: Tensor  # int64 [Nc]: stream-major rows that predict a token
    targets: Tensor  # int64 [Nc]: the tokens they predict
    label_rows: Tensor  # int64 [L]: stream-major row of the answer's first token, per labelled sample
    labels: Tensor  # int64 [L]: 1 = real, 0 = fake
    last_rows: Tensor  # int64 [S]: stream-major row of each sample's last token; −1 if the sample has no query
    readout: Readout | None  # what the training losses read; None if that is everything, or nothing, or with a cache
    names: tuple[str, ...]  # of the samples

    def _map(self, move: Any) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PackedBatch(**{k: move(v) if isinstance(v, Tensor | Layout | Readout) else v for k, v in values.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return self._map(lambda value: value.pin_memory())


def segment_length(segment: Segment, config: ModelConfig, where: str = "segment") -> int:
    """Number of tokens ``segment`` becomes; ``where`` is its name in error messages."""
    if isinstance(segment, Text):
        return len(segment.ids) + 1 + segment.eos
    rows, columns = _grid(segment, config, where)
    return rows * columns + 2


def sample_length(sample: Sample, config: ModelConfig) -> int:
    """Number of tokens ``sample`` becomes when nothing is dropped."""
    name = sample.name or "sample"
    return sum(segment_length(segment, config, f"{name}.segments[{i}]") for i, segment in enumerate(sample.segments))


def pack(
    samples: Sequence[Sample],
    config: ModelConfig,
    *,
    dropout: ConditionDropout | None = None,
    rng: np.random.Generator | None = None,
    cached: Sequence[int] | None = None,
    capacity: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay samples end to end.

    Args:
        samples: at least one sample.
        config: sizes and special tokens of the model.
        dropout: probabilities for droppable segments; None drops nothing. Needs ``rng``.
        rng: where the dropout's random numbers come from.
        cached: per sample, its number of leading tokens whose keys and values are already in a cache (whole image
            segments, any part of a text); they get no query and none of their contents is embedded.
        capacity: per sample, its number of key rows in the cache.

    Returns:
        A batch on the CPU.

    Raises:
        ValueError: an argument or a segment is malformed; the message names the sample and the segment.
    """
    if len(samples) == 0:
        raise ValueError("samples is empty; a pack needs at least one sample")
    if dropout is not None and rng is None:
        raise ValueError("rng is None; condition dropout needs a numpy Generator")
    cached = [0] * len(samples) if cached is None else list(cached)
    if len(cached) != len(samples):
        raise ValueError(f"cached has {len(cached)} entries; it must have one per sample: {len(samples)}")
    builder = _Builder(config)
    for i, sample in enumerate(samples):
        builder.add(sample, f"samples[{i}]" + (f" ({sample.name})" if sample.name else ""), cached[i], dropout, rng)
    return builder.finish(cached, capacity, tuple(s.name for s in samples))


def _grid(segment: VitImage | LatentImage, config: ModelConfig, where: str) -> tuple[int, int]:
    """Rows and columns of tokens of an image segment."""
    if isinstance(segment, VitImage):
        tensor, what, channels = segment.pixels, "pixels", config.vision.num_channels
        patch, most = config.vision.patch_size, config.vision.max_patches_per_side
    else:
        tensor, what, channels = segment.latent, "latent", config.latent.channels
        patch, most = config.latent.patch_size, config.latent.max_size
    shape = list(tensor.shape)
    if not tensor.is_floating_point():
        raise ValueError(f"{where}.{what} has dtype {tensor.dtype}; it must be floating-point, normalised")
    if len(shape) != 3 or shape[0] != channels or shape[1] % patch or shape[2] % patch or not shape[1] or not shape[2]:
        raise ValueError(f"{where}.{what} has shape {shape}; it must be [{channels}, {patch}·rows, {patch}·columns]")
    rows, columns = shape[1] // patch, shape[2] // patch
    if max(rows, columns) > most:
        raise ValueError(f"{where}.{what} has {rows}×{columns} patches; the model's position table holds {most} a side")
    return rows, columns


def patchify(image: Tensor, patch: int) -> Tensor:
    """[C, p·h, p·w] → [h·w, p·p·C], each row flattened in (row in patch, column in patch, channel) order."""
    channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    return (
        image.reshape(channels, rows, patch, columns, patch)
        .permute(1, 3, 2, 4, 0)
        .reshape(rows * columns, patch * patch * channels)
    )


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of ``patchify``: [rows·columns, p·p·C] → [C, p·rows, p·columns]."""
    image = tokens.reshape(rows, columns, patch, patch, -1).permute(4, 0, 2, 1, 3)
    return image.reshape(-1, rows * patch, columns * patch)


_TEXT, _VIT, _LATENT = range(3)  # kinds of token, in the order in which the model concatenates their embeddings


@dataclass
class _Builder:
    """Collects what ``pack`` needs, sample by sample; rows are sequence rows until ``finish``."""

    config: ModelConfig
    splits: list[list[tuple[int, str]]] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    kinds: list[np.ndarray] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    vit: list[Tensor] = field(default_factory=list)
    vit_sizes: list[tuple[int, int]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    latent_sizes: list[tuple[int, int]] = field(default_factory=list)
    noised: list[bool] = field(default_factory=list)
    target_rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    label_rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    last_rows: list[int] = field(default_factory=list)
    queries: int = 0

    def add(
        self, sample: Sample, where: str, cached: int, dropout: ConditionDropout | None, rng: np.random.Generator | None
    ) -> None:
        if sample.label not in (None, 0, 1):
            raise ValueError(f"{where}.label is {sample.label!r}; it must be 1 (real), 0 (fake) or None")
        splits: list[tuple[int, str]] = []
        position, offset, answer, first = 0, 0, None, self.queries
        for j, segment in enumerate(sample.segments):
            at = f"{where}.segments[{j}]"
            if not isinstance(segment, Segment):
                raise ValueError(f"{at} is a {type(segment).__name__}; it must be a Text, VitImage or LatentImage")
            is_text = isinstance(segment, Text)
            if dropout is not None and rng is not None and _dropped(segment, dropout, rng):
                position += 0 if is_text else 1
                continue
            skip = max(0, cached - offset)  # leading tokens of this segment that are keys only
            if is_text:
                if answer is None and segment.loss:
                    answer = self.queries
                    if sample.label is not None and skip:
                        raise ValueError(
                            f"cached ends {skip} tokens into {at}; the real/fake head of a labelled sample reads that "
                            "text's first token, which must be new"
                        )
                length = self._add_text(segment, position, skip, at)
                splits.append((length, "causal"))
                position += length
            else:
                length = self._add_image(segment, position, skip, at)
                noised = isinstance(segment, LatentImage) and segment.noised
                splits.append((length, "noise" if noised else "full"))
                position += 0 if noised else 1
            offset += length
        if not splits:
            raise ValueError(f"{where} has no segments left; a sample needs at least one")
        if sample.label is not None:
            if answer is None:
                raise ValueError(
                    f"{where} has a label but no text with loss; the real/fake head reads the answer's first token"
                )
            self.label_rows.append(answer)
            self.labels.append(sample.label)
        self.splits.append(splits)
        self.last_rows.append(self.queries - 1 if self.queries > first else -1)

    def _add_text(self, text: Text, position: int, skip: int, where: str) -> int:
        tokens = self.config.special_tokens
        ids = [tokens.bos, *map(int, text.ids)] + [tokens.eos] * text.eos
        bad = [i for i in (min(ids), max(ids)) if not 0 <= i < self.config.vocab_size]
        if bad:
            raise ValueError(f"{where} has the token id {bad[0]}; ids must be in [0, {self.config.vocab_size})")
        new = ids[skip:]
        if text.loss:
            predicting = max(0, len(new) - 1)
            self.target_rows.extend(range(self.queries, self.queries + predicting))
            self.targets.extend(new[1:])
        self.text_ids.extend(new)
        self._rows(np.full(len(new), _TEXT), np.arange(position + min(skip, len(ids)), position + len(ids)), where)
        return len(ids)

    def _add_image(self, image: VitImage | LatentImage, position: int, skip: int, where: str) -> int:
        rows, columns = _grid(image, self.config, where)
        length = rows * columns + 2
        if skip >= length:
            return length
        if skip > 0:
            raise ValueError(
                f"cached ends {skip} tokens into {where}; an image of {length} tokens is cached whole or not at all"
            )
        tokens = self.config.special_tokens
        self.text_ids.extend((tokens.start_of_image, tokens.end_of_image))
        if isinstance(image, VitImage):
            self.vit.append(patchify(image.pixels, self.config.vision.patch_size))
            self.vit_sizes.append((rows, columns))
            kind = _VIT
        else:
            self.latents.append(image.latent.reshape(-1))
            self.latent_sizes.append((rows, columns))
            self.noised.append(image.noised)
            kind = _LATENT
        kinds = np.full(length, kind)
        kinds[[0, -1]] = _TEXT
        self._rows(kinds, np.full(length, position), where)
        return length

    def _rows(self, kinds: np.ndarray, positions: np.ndarray, where: str) -> None:
        if len(positions) and positions[-1] >= self.config.max_position:
            most = self.config.max_position - 1
            raise ValueError(
                f"{where} reaches RoPE position {positions[-1]}; config.max_position allows {most}: its texts must be "
                "shorter"
            )
        self.kinds.append(kinds)
        self.positions.append(positions)
        self.queries += len(kinds)

    def finish(self, cached: list[int], capacity: Sequence[int] | None, names: tuple[str, ...]) -> PackedBatch:
        kinds = np.concatenate([np.empty(0, np.int64), *self.kinds])  # nothing at all: the layout says so
        layout = Layout.from_splits(
            self.splits,
            streams=kinds == _LATENT,
            positions=np.concatenate([np.empty(0, np.int64), *self.positions]),
            cached=cached,
            capacity=capacity,
        )
        to_sequence, to_stream = layout.stream_to_sequence.numpy(), layout.sequence_to_stream.numpy()
        source = np.empty(len(kinds), np.int64)
        first = 0
        for kind in (_TEXT, _VIT, _LATENT):
            where = np.flatnonzero(kinds == kind)
            source[where] = first + np.arange(len(where))
            first += len(where)
        config = self.config
        tokens_per_image = [rows * columns for rows, columns in self.latent_sizes]
        latent_image = np.repeat(np.arange(len(tokens_per_image)), tokens_per_image)
        noised = np.array(self.noised, bool)
        noised_tokens = np.flatnonzero(noised[latent_image])
        read = np.concatenate((self.target_rows, self.label_rows, np.flatnonzero(kinds == _LATENT)[noised_tokens]))
        rows_of = lambda rows: torch.from_numpy(to_stream[np.asarray(rows, np.int64)])  # noqa: E731
        return PackedBatch(
            layout=layout,
            text_ids=torch.tensor(self.text_ids, dtype=torch.int64),
            vit_patches=torch.cat(self.vit) if self.vit else torch.empty(0, config.vision.patch_dim),
            vit_positions=_table_positions(self.vit_sizes, config.vision.max_patches_per_side),
            vit_layout=Layout.from_splits([[(rows * columns, "full")] for rows, columns in self.vit_sizes])
            if self.vit
            else None,
            vit_sizes=tuple(self.vit_sizes),
            latents=torch.cat(self.latents) if self.latents else torch.empty(0),
            latent_sizes=tuple(self.latent_sizes),
            latent_positions=_table_positions(self.latent_sizes, config.latent.max_size),
            latent_image=torch.from_numpy(latent_image),
            noised_images=torch.from_numpy(noised),
            noised_tokens=torch.from_numpy(noised_tokens),
            source_rows=torch.from_numpy(source[to_sequence]),
            vit_rows=rows_of(np.flatnonzero(kinds == _VIT)),
            target_rows=rows_of(self.target_rows),
            targets=torch.tensor(self.targets, dtype=torch.int64),
            label_rows=rows_of(self.label_rows),
            labels=torch.tensor(self.labels, dtype=torch.int64),
            last_rows=torch.tensor([to_stream[row] if row >= 0 else -1 for row in self.last_rows]),
            readout=Readout.of(layout, read.astype(np.int64)) if layout.num_queries == layout.num_keys else None,
            names=names,
        )


def _dropped(segment: Segment, dropout: ConditionDropout, rng: np.random.Generator) -> bool:
    """Whether to leave out a segment. One with a loss is no condition, and stays."""
    if not segment.droppable:
        return False
    if isinstance(segment, Text):
        probability = 0.0 if segment.loss else dropout.text
    elif isinstance(segment, VitImage):
        probability = dropout.vit
    else:
        probability = 0.0 if segment.noised else dropout.latent
    return rng.random() < probability


def _table_positions(sizes: list[tuple[int, int]], side: int) -> Tensor:
    grids = [(np.arange(rows)[:, None] * side + np.arange(columns)).reshape(-1) for rows, columns in sizes]
    return torch.from_numpy(np.concatenate(grids) if grids else np.empty(0, np.int64))
