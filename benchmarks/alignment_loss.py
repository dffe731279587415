"""The alignment loss against its peers: ``python -m benchmarks.alignment_loss``.

Forward and backward together, with the gradient of the student, as in a DIGA step: eight images whose teacher grids of
70×70 ViT patches are resized to the student's 64×64 latent tokens; on GPUs at BAGEL's width in bfloat16, on CPUs at
1024 in float32. Peers: PyTorch's resize and cosine as separate operations, eager and under torch.compile.

``pytest benchmarks/alignment_loss.py`` shows the same competitors with pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bandwidth import PLAIN, Case, compiled, main, ours, outputs_and_gradients
from benchmarks.harness import CannotRun
from unigendet.ops import ImageGrids, alignment_loss

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
        generator = torch.Generator(device).manual_seed(seed)
        make = lambda rows: torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)  # noqa: E731
        return make(grids.student_rows).requires_grad_(), make(grids.teacher_rows)

    peer = partial(eager, sizes=sizes)
    candidates = {PLAIN: lambda: peer, "torch.compile": compiled(peer)}
    for backend in BACKENDS:
        function = partial(alignment_loss, grids=grids, backend=backend)
        candidates[backend] = ours(OP, backend, device, dtype, function)
    h, w, th, tw = sizes[0]
    return Case(
        op=OP,
        shape=f"{len(sizes)} images, {th}x{tw} to {h}x{w}, D {columns}",
        dtype=dtype,
        inputs=inputs,
        # The student is read and its gradient written; the teacher is read.
        work={"both": dtype.itemsize * columns * (2 * grids.student_rows + grids.teacher_rows)},
        candidates=candidates,
        peers=frozenset({PLAIN, "torch.compile"}),
        exact=lambda student, teacher: alignment_loss(student, teacher, grids, backend="torch"),
    )


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """The shapes of the targets."""
    if tiny:
        yield case(device, torch.float32, [(4, 4, 5, 5)] * 2, 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, [SIZE] * IMAGES, 3584)
    else:
        yield case(device, torch.float32, [SIZE] * IMAGES, 1024)
        yield case(device, torch.bfloat16, [SIZE] * IMAGES, 1024)


@pytest.mark.parametrize("backend", [PLAIN, "torch.compile", *BACKENDS])
def test_forward_and_backward(benchmark, backend):  # noqa: D103
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = next(cases(device, tiny=False))
    benchmark.group = f"{chosen.shape}, {chosen.dtype}"
    try:
        function = chosen.candidates[backend]()
    except CannotRun as error:
        pytest.skip(str(error))
    inputs = chosen.inputs(0)

    def call() -> None:
        outputs_and_gradients(function, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


if __name__ == "__main__":
    raise SystemExit(main(OP, __doc__.partition("\n")[0], cases))
