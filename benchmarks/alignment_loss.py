"""``alignment_loss``: resize and cosine distance, with the gradient of the student.

Forward and backward together, with the gradient of the student, as in a DIGA step: eight images whose teacher grids of
70×70 ViT patches are resized to the student's 64×64 latent tokens; on GPUs at BAGEL's width in bfloat16, on CPUs at
1024 in float32. Peers: PyTorch's resize and cosine as separate operations, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import ImageGrids, alignment_loss

from .contest import Case, Work
from .judge import whole
from .stream_case import candidates, random

OP = "alignment_loss"
BACKENDS = ("torch", "triton", "cuda", "cpp")
SIZE = (64, 64, 70, 70)  # student's grid, teacher's grid
IMAGES = 8


def eager(student: Tensor, teacher: Tensor, sizes: list[tuple[int, int, int, int]]) -> Tensor:
    """Resize each image's teacher grid, then the mean cosine distance, in the inputs' own precision."""
    resized, start = [], 0
    for h, w, th, tw in sizes:
        grid = teacher[start : start + th * tw].view(1, th, tw, -1).permute(0, 3, 1, 2)
        resized.append(F.interpolate(grid, (h, w), mode="bilinear", align_corners=False).flatten(2)[0].T)
        start += th * tw
    return (1 - F.cosine_similarity(torch.cat(resized), student, dim=-1, eps=1e-8)).mean()


def case(device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int, int, int]], columns: int) -> Case:
    """The student wants a gradient, the teacher does not."""
    grids = ImageGrids.from_sizes(sizes)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        make = random(device, dtype, seed)
        return make(grids.student_rows, columns).requires_grad_(), make(grids.teacher_rows, columns)

    h, w, th, tw = sizes[0]
    # The student is read and its gradient written; the teacher is read.
    size = dtype.itemsize * columns * (2 * grids.student_rows + grids.teacher_rows)
    own = partial(alignment_loss, grids=grids)
    return Case(
        OP,
        f"{len(sizes)} images, {th}x{tw} to {h}x{w}, D {columns}",
        dtype,
        inputs,
        work={"both": Work(bytes=size)},
        truth=whole(partial(own, backend="reference")),
        **candidates(OP, device, dtype, partial(eager, sizes=sizes), own, backends=BACKENDS),
    )


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """The shapes of the targets."""
    if size == "tiny":
        yield case(device, torch.float32, [(4, 4, 5, 5)] * 2, 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, [SIZE] * IMAGES, 3584)
    elif size == "quick":
        yield case(device, torch.float32, [SIZE] * 2, 1024)
    else:
        yield case(device, torch.float32, [SIZE] * IMAGES, 1024)
        yield case(device, torch.bfloat16, [SIZE] * IMAGES, 1024)
