"""The CUDA build of the alignment loss: the same contract as the others, on a device."""

import itertools

import pytest
import torch
from numerics import assert_accurate
from op_checks import assert_same, check_writes_everything, outputs_and_gradients, randn
from test_alignment_loss import SIZES, op, plain

from unigendet.ops import ImageGrids
from unigendet.ops.backends import extension_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in extension_backends(), reason="unigendet._C is built without CUDA"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below, at and above what a warp or a team of warps keeps in registers; odd ones take single numbers.
COLUMNS = (7, 72, 256, 264, 1000, 1024, 1032, 4096, 4104, 1025)


def arguments(sizes=SIZES, *, dtype=torch.float32, teacher_dtype=None, columns=64):
    grids = ImageGrids.from_sizes(sizes)
    inputs = (
        randn(grids.student_rows, columns, dtype=dtype, grad=False),
        randn(grids.teacher_rows, columns, dtype=teacher_dtype or dtype, grad=False, seed=1),
    )
    return [x.cuda().requires_grad_() for x in inputs]


def on_device(sizes=SIZES, **options):
    """The oracle; its default of token weights is made on the inputs' device."""
    rows = ImageGrids.from_sizes(sizes).student_rows
    options.setdefault("token_weights", torch.ones(rows, device="cuda"))
    return plain(sizes, **options)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_accuracy(dtypes):
    for columns in (33, 64, 520):
        inputs = arguments(dtype=dtypes[0], teacher_dtype=dtypes[1], columns=columns)
        assert_accurate(op(backend="cuda"), on_device(), on_device(), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_widths(columns, dtype):
    sizes = [(5, 9, 7, 4), (3, 3, 3, 3)]
    inputs = arguments(sizes, dtype=dtype, columns=columns)
    assert_accurate(op(sizes, backend="cuda"), on_device(sizes), on_device(sizes), inputs)


def test_one_column():
    narrow = arguments(columns=1)
    wide = [torch.cat((x.detach(), torch.zeros_like(x)), 1).requires_grad_() for x in narrow]
    results = outputs_and_gradients(op(backend="cuda"), narrow)
    expected = outputs_and_gradients(op(backend="cuda"), wide)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value[:, :1] if value.dim() else value)


@pytest.mark.parametrize("sizes", [[(64, 64, 70, 70)], [(9, 7, 2, 3)], [(2, 3, 9, 8)], [(8, 9, 1, 1)], SIZES * 20])
def test_shapes_and_unwritten_memory(sizes, monkeypatch):
    inputs = arguments(sizes)
    assert_accurate(op(sizes, backend="cuda"), on_device(sizes), on_device(sizes), inputs)
    check_writes_everything(monkeypatch, op(sizes, backend="cuda"), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype):
    rows = ImageGrids.from_sizes(SIZES).student_rows
    u = randn(rows, grad=False).abs().cuda()
    u[:5] = 0
    for options in ({"token_weights": u}, {"token_weights": u, "normalizer": torch.tensor(7.0, device="cuda")}):
        ours = op(backend="cuda", return_image_means=True, weight=0.5, **options)
        theirs = plain(means=True, weight=0.5, **options)
        assert_accurate(ours, theirs, theirs, arguments(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned_and_strides(dtype):
    student, teacher = (x.detach() for x in arguments(dtype=dtype))
    expected = outputs_and_gradients(op(backend="cuda"), [student.requires_grad_(), teacher.requires_grad_()])
    for offset in (1, 2, 8):
        views = []
        for x in (student.detach(), teacher.detach()):
            wide = torch.full((len(x), x.shape[1] + 16), float("nan"), dtype=dtype, device="cuda")
            wide[:, offset : offset + x.shape[1]] = x
            views.append(wide[:, offset : offset + x.shape[1]].requires_grad_())
        results = outputs_and_gradients(op(backend="cuda"), views)
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value)
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (student, teacher)]
    assert_same(outputs_and_gradients(op(backend="cuda"), transposed), expected)


def test_rows_of_zeros():
    student, teacher = (x.detach() for x in arguments())
    student[::7], teacher[::5], teacher[-10:] = 0, 0, 0
    inputs = [student.requires_grad_(), teacher.requires_grad_()]
    assert_accurate(op(backend="cuda"), on_device(), on_device(), inputs)


def test_the_same_bits_in_every_run():
    sizes = [(64, 64, 70, 70), (17, 33, 8, 50)]
    for columns in (136, 1024, 2048):
        inputs = arguments(sizes, dtype=torch.bfloat16, columns=columns)
        first = outputs_and_gradients(op(sizes, backend="cuda", return_image_means=True), inputs)
        for _ in range(3):
            assert_same(outputs_and_gradients(op(sizes, backend="cuda", return_image_means=True), inputs), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (64, 64), (0, 8)])
def test_scale(shape, dtype):
    gradient = randn(*shape, dtype=dtype, grad=False).cuda()
    before = gradient.clone()
    for factor in (1.0, 0.3):
        by = torch.tensor(factor, device="cuda")
        scaled = torch.ops.unigendet.alignment_loss_backward(gradient, by, "cuda")
        assert torch.equal(scaled, (before.float() * by).to(dtype))
        assert torch.equal(gradient, before)
    unaligned = torch.zeros(before.numel() + 1, dtype=dtype, device="cuda")[1:].view(shape)
    unaligned.copy_(before)
    for target in (gradient, unaligned):
        torch.ops.unigendet.alignment_loss_backward_(target, torch.tensor(1.0, device="cuda"), "cuda")
        assert torch.equal(target, before)
        torch.ops.unigendet.alignment_loss_backward_(target, torch.tensor(0.3, device="cuda"), "cuda")
        assert torch.equal(target, (before.float() * torch.tensor(0.3, device="cuda")).to(dtype))


def test_the_current_stream_is_used():
    """What is enqueued on a stream before the op is seen by it; its plan was made for another stream before."""
    sizes = [(64, 64, 70, 70)]
    inputs = arguments(sizes, columns=1024)
    expected = outputs_and_gradients(op(sizes, backend="cuda"), inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [(x.detach() * 1).requires_grad_() for x in inputs]
        results = outputs_and_gradients(op(sizes, backend="cuda"), late)
    torch.cuda.synchronize()
    assert_same(results, expected)


def test_float64_is_refused():
    inputs = arguments(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run alignment_loss: the dtype is torch.float64;"):
        op(backend="cuda")(*inputs)


def test_cuda_graphs_are_refused(monkeypatch):
    """A graph would keep the address of a plan that the cache lets go."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="alignment_loss cannot be part of a CUDA graph with backend='cuda'"):
        op(backend="cuda")(*(x.detach() for x in arguments()))


def test_rows_of_any_width():
    """Wider than Triton's kernels take: these read such a row twice."""
    sizes = [(2, 3, 3, 2)]
    inputs = arguments(sizes, columns=20000)
    assert_accurate(op(sizes, backend="cuda"), on_device(sizes), on_device(sizes), inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_another_than_the_current_device():
    inputs = arguments()
    expected = outputs_and_gradients(op(backend="cuda"), inputs)
    other = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    results = outputs_and_gradients(op(backend="cuda"), other)
    assert all(value.device.index == 1 for value in results.values())
    assert_same({name: value.to("cuda:0") for name, value in results.items()}, expected)
