"""Triton's alignment loss compiled: needs a CUDA device, and nothing installed but what the package needs."""

import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same
from test_alignment_loss import arguments, op, plain

from unigendet.ops import ImageGrids

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# BAGEL's grids and width: 64 × 64 latent tokens, 70 × 70 patches; and what is cut off at the ends of tiles.
LARGE = [(64, 64, 70, 70), (40, 52, 44, 57), (33, 7, 33, 7), (3, 5, 41, 2)]
COLUMNS = 3584


def on_gpu(sizes, **options):
    return [x.detach().cuda().requires_grad_() for x in arguments(sizes, **options)]


def plain_on_gpu(sizes):
    rows = ImageGrids.from_sizes(sizes).student_rows
    return plain(sizes, normalizer=float(rows), token_weights=torch.ones(rows, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    inputs = on_gpu(LARGE, dtype=dtype, columns=COLUMNS)
    expected = plain_on_gpu(LARGE)
    assert_accurate(op(LARGE, backend="triton"), expected, expected, inputs, seeds=1)


@pytest.mark.parametrize("columns", [3, 8, 72, 100, 1032, 1152, 8192, 16384])
def test_other_widths(columns):
    sizes = LARGE[2:]
    expected = plain_on_gpu(sizes)
    inputs = on_gpu(sizes, dtype=torch.bfloat16, teacher_dtype=torch.float32, columns=columns)
    assert_accurate(op(sizes, backend="triton"), expected, expected, inputs, seeds=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_to_the_last_bit(dtype):
    inputs = on_gpu(LARGE, dtype=dtype, columns=COLUMNS)
    call = op(LARGE, backend="triton", return_image_means=True)
    first, *others = (outputs_and_gradients(call, inputs) for _ in range(3))
    for other in others:
        assert_same(other, first)


def test_auto_is_triton_up_to_its_widest_row():
    sizes = [(2, 3, 3, 2)]
    for columns, expected in ((64, "triton"), (16384, "triton"), (16392, "torch")):
        inputs = on_gpu(sizes, dtype=torch.bfloat16, columns=columns)
        auto, named = (outputs_and_gradients(op(sizes, backend=b), inputs) for b in ("auto", expected))
        assert_same(auto, named)


def test_equal_grids_read_no_other_row():
    sizes = [(8, 8, 8, 8)]
    student, teacher = (x.detach() for x in on_gpu(sizes, columns=COLUMNS, dtype=torch.bfloat16))
    teacher[9] = float("nan")
    leaves = [x.requires_grad_() for x in (student, teacher)]
    for gradient in torch.autograd.grad(op(sizes, backend="triton")(*leaves), leaves):
        assert gradient.isnan().any(1).nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling(dtype):
    """Rounded once, in place and not; by 1 in place the bits stay as they are."""
    gradient = torch.randn(4099, COLUMNS, device="cuda").to(dtype)
    for value in (1.0, 0.3, 4096.0):
        factor = torch.tensor(value, device="cuda")
        expected = (gradient.float() * factor).to(dtype)
        in_place = gradient.clone()
        torch.ops.unigendet.alignment_loss_backward_(in_place, factor, "triton")
        assert torch.equal(in_place, expected)
        assert torch.equal(torch.ops.unigendet.alignment_loss_backward(gradient, factor, "triton"), expected)


def packs_of_other_lengths():
    return [[(4, 4, 5, 5)], [(1, 1, 1, 1)], [(7, 3, 2, 9), (16, 16, 16, 16)], [(1, 17, 33, 1)] * 3]


def test_packs_of_other_lengths_share_their_kernels(monkeypatch):
    import triton

    compiled = []
    record = lambda **details: compiled.append(details["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", record)
    counts = []
    for sizes in packs_of_other_lengths():
        outputs_and_gradients(op(sizes, backend="triton"), on_gpu(sizes, columns=200, dtype=torch.bfloat16))
        counts.append(len(compiled))
    # Forward, the teacher's gradient, scaling; the two sums know no width and may have been compiled before.
    assert 3 <= counts[0] <= 5, compiled
    assert counts == [counts[0]] * len(counts), compiled


def test_nothing_waits_for_the_device():
    """Once kernels are compiled: also for a pack that was never seen, whose tables have to be made and copied."""
    normalizer = torch.tensor(100.0, device="cuda")
    prepared = [(sizes, on_gpu(sizes, columns=64)) for sizes in packs_of_other_lengths()]

    def run(sizes, inputs):
        torch.autograd.grad(op(sizes, backend="triton", normalizer=normalizer)(*inputs), inputs)

    run(*prepared[0])
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pack in prepared[1:]:
            run(*pack)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


def test_compiled_graphs():
    sizes = [(6, 5, 7, 4)]
    inputs = on_gpu(sizes, columns=256, dtype=torch.bfloat16)
    call = op(sizes, backend="triton", weight=0.5)
    expected = outputs_and_gradients(call, inputs)
    assert_same(outputs_and_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs), expected)
    torch._dynamo.reset()
