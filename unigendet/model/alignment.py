"""Options of DIGA's alignment that work on whole images: a convolution as φ, and a standardised teacher.

Both take the rows of a pack, image by image and row by row, and do the images of one size together. Maths:
docs/model.md §7; the ideas are those of iREPA (arXiv 2512.10794).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

STANDARD_EPS = 1e-6  # added to a feature's variance


def image_groups(
    sizes: Sequence[tuple[int, int]], device: torch.device | str
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The images of a pack by size, in the order of first appearance.

    Args:
        sizes: (rows, columns) of every image's grid, in the pack's order.
        device: of the indices.

    Yields:
        ((rows, columns), int64 [images of this size, rows · columns]: where their tokens lie in the pack).
    """
    starts: dict[tuple[int, int], list[int]] = {}
    start = 0
    for size in sizes:
        starts.setdefault(size, []).append(start)
        start += size[0] * size[1]
    for size, first in starts.items():
        within = torch.arange(size[0] * size[1], device=device)
        yield size, torch.tensor(first, device=device)[:, None] + within


def _check_rows(rows: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    tokens = sum(height * width for height, width in sizes)
    if rows.shape[0] != tokens:
        raise ValueError(f"rows has {rows.shape[0]} rows; it must have {tokens}, the tokens of sizes")


class ConvProjector(nn.Module):
    """φ as one 3×3 convolution over each image's grid of tokens, with zeros beyond its border and a bias per feature.

    A token's projection depends on its eight neighbours in its own image, never on another image of the pack.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)

    def forward(self, rows: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Project [Σ h·w, hidden] → [Σ h·w, hidden]; ``sizes``: (h, w) of every image, in the order of the rows.

        Raises ValueError unless the rows are the tokens of ``sizes``.
        """
        _check_rows(rows, sizes)
        parts, places = [], []
        for (height, width), index in image_groups(sizes, rows.device):
            grid = rows[index].unflatten(1, (height, width)).movedim(3, 1)  # [n, hidden, h, w]
            parts.append(self.conv(grid).movedim(1, 3).flatten(0, 2))
            places.append(index.flatten())
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.cat(places).argsort()]


def standardise_tokens(features: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Every feature with mean 0 and variance 1 over the tokens of its image: (x − mean) / √(variance + 1e-6).

    The variance is that of the population (divided by the number of tokens). Computed in float32, or float64 for
    float64 features, and given back in that dtype. What all tokens of an image have in common goes; the only token of
    an image becomes zero.

    Args:
        features: [Σ h·w, D], image by image.
        sizes: (h, w) of every image, in the order of the rows.

    Raises:
        ValueError: the rows are not the tokens of ``sizes``.
    """
    _check_rows(features, sizes)
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    result = torch.empty_like(values)
    for _, index in image_groups(sizes, features.device):
        images = values[index]  # [n, tokens, D]
        centred = images - images.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        result[index] = centred * (variance + STANDARD_EPS).rsqrt()
    return result
