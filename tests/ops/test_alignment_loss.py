"""The alignment loss against F.interpolate and F.cosine_similarity under autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate, outputs_and_gradients
from op_checks import BACKENDS as PORTABLE
from op_checks import (
    Recorder,
    assert_same,
    check_checkpoints,
    check_compiles_once,
    check_writes_everything,
    randn,
)

from unigendet.ops import ImageGrids, alignment_loss
from unigendet.ops.backends import available

# "cpp" where it is built; it knows no float64. tests/test_build.py says where it must be.
BACKENDS = (*PORTABLE, *(name for name in available()["alignment_loss"] if name == "cpp"))
# student h, w, teacher h, w: smaller, larger, equal, one side equal, single rows and columns
SIZES = [(2, 3, 3, 5), (5, 4, 2, 3), (3, 3, 3, 3), (4, 2, 4, 5), (1, 1, 3, 2), (3, 2, 1, 1), (1, 5, 1, 2)]
FEW = [(2, 3, 2, 2), (1, 1, 3, 2)]  # for what does not depend on sizes: kernels are interpreted
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = [*BACKENDS, "triton"]


def arguments(sizes=SIZES, *, dtype=torch.float32, teacher_dtype=None, columns=6):
    """Student and teacher."""
    grids = ImageGrids.from_sizes(sizes)
    student = randn(grids.student_rows, columns, dtype=dtype)
    return [student, randn(grids.teacher_rows, columns, dtype=teacher_dtype or dtype, seed=1)]


def op(sizes=SIZES, **options):
    grids = ImageGrids.from_sizes(sizes)
    return lambda student, teacher: alignment_loss(student, teacher, grids, **options)


def widest(backend):
    """The dtype with the smallest rounding errors that ``backend`` computes in."""
    return torch.float64 if backend in PORTABLE else torch.float32


def refuses_float64(backend, inputs):
    """Whether these inputs are none for ``backend``; if so, checks that it says so."""
    if backend in PORTABLE or all(x.dtype != torch.float64 for x in inputs):
        return False
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run alignment_loss: the dtype is torch.float64;"):
        op(backend=backend)(*inputs)
    return True


def plain(sizes=SIZES, weight=1.0, normalizer=None, token_weights=None, means=False):
    def call(student, teacher):
        wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        u = torch.ones(len(student), device=student.device) if token_weights is None else token_weights
        total, start, teacher_start, each = 0.0, 0, 0, []
        for h, w, th, tw in sizes:
            grid = teacher[teacher_start : teacher_start + th * tw].to(wide).view(1, th, tw, -1).permute(0, 3, 1, 2)
            resized = F.interpolate(grid, (h, w), mode="bilinear", align_corners=False, antialias=False)
            resized = resized.flatten(2)[0].T
            cos = F.cosine_similarity(resized, student[start : start + h * w].to(wide), dim=-1, eps=1e-8)
            own = u[start : start + h * w].to(wide)
            total = total + (own * (1 - cos)).sum()
            each.append((own * (1 - cos)).sum().detach() / own.sum())
            start, teacher_start = start + h * w, teacher_start + th * tw
        loss = weight * total / (u.to(wide).sum() if normalizer is None else normalizer)
        return (loss, torch.stack(each)) if means else loss

    return call


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_operator_contract(backend, needs):
    student, teacher = (t.detach().requires_grad_(n) for t, n in zip(arguments(FEW), needs, strict=True))
    table = ImageGrids.from_sizes(FEW).table
    for normalizer, token_weights in ((None, None), (torch.tensor(9.0), torch.rand(len(student)))):
        arguments_ = (student, teacher, table, normalizer, token_weights, 0.5, *needs, backend)
        torch.library.opcheck(torch.ops.unigendet.alignment_loss.default, arguments_)
    for backward in ("alignment_loss_backward", "alignment_loss_backward_"):
        operator = getattr(torch.ops.unigendet, backward).default
        torch.library.opcheck(operator, (student.detach().clone(), torch.tensor(0.5), backend))


@pytest.mark.parametrize("backend", PORTABLE)
@pytest.mark.parametrize("size", SIZES)
def test_gradients(backend, size):
    inputs = arguments([size], dtype=torch.float64, columns=3)
    assert torch.autograd.gradcheck(op([size], backend=backend, weight=0.5, normalizer=7), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_accuracy(backend, dtype, teacher_dtype):
    inputs = arguments(dtype=dtype, teacher_dtype=teacher_dtype, columns=33)
    if not refuses_float64(backend, inputs):
        assert_accurate(op(backend=backend), plain(), plain(), inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_weight_and_normalizer(backend):
    inputs = arguments(FEW)
    for normalizer in (None, 50, 12.5):
        expected = plain(FEW, weight=0.5, normalizer=normalizer)
        assert_accurate(op(FEW, backend=backend, weight=0.5, normalizer=normalizer), expected, expected, inputs)
    for normalizer in (torch.tensor(12.5), torch.tensor(12)):
        expected = plain(FEW, weight=0.5, normalizer=float(normalizer))
        assert_accurate(op(FEW, backend=backend, weight=0.5, normalizer=normalizer), expected, expected, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_weights_and_image_means(backend, dtype):
    """Some tokens weigh nothing, one image has one token that counts; the means know no weight of the loss."""
    u = randn(ImageGrids.from_sizes(SIZES).student_rows, grad=False).abs().to(dtype)
    u[:5] = 0
    if refuses_float64(backend, arguments(dtype=dtype)):
        return
    for options in ({}, {"weight": 0.5, "normalizer": 7}, {"token_weights": u}, {"token_weights": u, "normalizer": 7}):
        ours = op(backend=backend, return_image_means=True, **options)
        theirs = plain(means=True, **options)
        assert_accurate(ours, theirs, theirs, arguments(dtype=dtype))


@pytest.mark.parametrize("backend", KERNELS)
def test_token_weights_that_are_all_zero(backend):
    """The mean of nothing is NaN, as in PyTorch's losses; with a normalizer there is a sum, and that is zero."""
    sizes = [(1, 2, 1, 1), (2, 2, 2, 2)]
    student, teacher = arguments(sizes)
    u = torch.zeros(6)
    loss, means = op(sizes, backend=backend, token_weights=u, return_image_means=True)(student, teacher)
    assert loss.isnan()
    assert means.isnan().all()
    loss = op(sizes, backend=backend, token_weights=u, normalizer=1)(student, teacher)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (student, teacher)))
    u[0] = 1
    means = op(sizes, backend=backend, token_weights=u, return_image_means=True)(student, teacher)[1]
    assert means.isnan().tolist() == [False, True]


@pytest.mark.parametrize("backend", KERNELS)
def test_float16_gradients_survive_until_the_loss_scale_comes(backend):
    """κ = 1e-7 would round every element to zero; the scale of the loss brings them back into float16's range."""
    inputs = arguments(FEW, dtype=torch.float16, columns=64)
    kappa = {"weight": 0.5, "normalizer": torch.tensor(5e6)}
    scaled = torch.autograd.grad(65536.0 * op(FEW, backend=backend, **kappa)(*inputs), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for have, want in zip(scaled, torch.autograd.grad(65536.0 * plain(FEW, **kappa)(*exact), exact), strict=True):
        largest = want.abs().max().item()
        assert largest > 1e-4
        assert (have.double() - want).abs().max() <= torch.finfo(torch.float16).eps * largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend):
    """A row of zeros, student's or teacher's, has cosine 0 and the finite gradient of the clamped norm."""
    sizes = [(2, 2, 2, 2), (1, 2, 1, 2)]
    student, teacher = (t.detach() for t in arguments(sizes, dtype=widest(backend)))
    student[1], teacher[2], student[4], teacher[4] = 0, 0, 0, 0
    inputs = [student.requires_grad_(), teacher.requires_grad_()]
    assert_accurate(op(sizes, backend=backend), plain(sizes), plain(sizes), inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_norms_below_epsilon_are_clamped_one_by_one(backend):
    sizes = [(1, 3, 1, 3)]
    student = torch.tensor([[1e-9, 0.0], [1.0, 0.0], [1e-9, 0.0]])
    teacher = torch.tensor([[1e-9, 0.0], [1e-9, 0.0], [1e9, 0.0]])
    cosines = F.cosine_similarity(teacher, student, dim=-1)
    torch.testing.assert_close(cosines, torch.tensor([0.01, 0.1, 0.1]))
    torch.testing.assert_close(op(sizes, backend=backend)(student, teacher), (1 - cosines).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_clamped_norm_is_that_of_a_constant(backend):
    """Where a norm is below 1e-8 the cosine is linear in that vector: its gradient is the other's direction / 1e-8."""
    sizes = [(1, 1, 1, 1)]
    tiny, other = torch.tensor([[[1e-9, 2e-9]], [[3.0, 4.0]]], dtype=widest(backend))
    for inputs, i in (((tiny, other), 0), ((other, tiny), 1)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradient = torch.autograd.grad(op(sizes, backend=backend)(*leaves), leaves[i])[0]
        torch.testing.assert_close(gradient, -other / 5 / 1e-8)


@pytest.mark.parametrize("backend", KERNELS)
def test_incoming_scalar_and_second_backward(backend):
    """Backward only scales what forward computed, any number of times."""
    student, teacher = arguments(FEW)
    loss = op(FEW, backend=backend)(student, teacher)
    once = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
    scaled = torch.autograd.grad(loss * 4, (student, teacher), retain_graph=True)
    again = torch.autograd.grad(loss, (student, teacher))
    for a, b, c in zip(once, scaled, again, strict=True):
        assert torch.equal(4 * a, b)
        assert torch.equal(a, c)
    loss = op(FEW, backend=backend)(student, teacher)
    for a, b in zip(scaled, torch.autograd.grad(4 * loss, (student, teacher)), strict=True):
        assert torch.equal(a, b)  # in place: nobody will walk this graph again


@pytest.mark.parametrize("backend", KERNELS)
def test_the_last_backward_pass_needs_no_memory(backend):
    """The gradient that forward computed is the result, scaled or not; only a graph that is kept needs a copy."""
    student, teacher = (x.detach().requires_grad_() for x in arguments(FEW))
    for factor, keep, copies in ((1, False, 0), (4, False, 0), (1, True, 2)):
        loss = factor * op(FEW, backend=backend)(student, teacher)
        with Recorder() as backward:
            torch.autograd.grad(loss, (student, teacher), retain_graph=keep)
        assert backward.calls["unigendet.alignment_loss_backward"] == copies
        assert backward.calls["unigendet.alignment_loss_backward_"] == 2 - copies


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_that_nobody_needs_are_not_computed(backend, needs):
    inputs = [t.detach().requires_grad_(n) for t, n in zip(arguments(FEW), needs, strict=True)]
    assert_accurate(op(FEW, backend=backend), plain(FEW), plain(FEW), inputs)
    table = ImageGrids.from_sizes(FEW).table
    _, _, *gradients = torch.ops.unigendet.alignment_loss.default(*inputs, table, None, None, 1.0, *needs, backend)
    assert [g.numel() > 0 for g in gradients] == list(needs)
    with torch.no_grad():
        assert not op(FEW, backend=backend)(*inputs).requires_grad


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_input_and_unwritten_memory(backend, monkeypatch):
    strided = [torch.stack((t, t), 2)[..., 0].detach().requires_grad_() for t in arguments(FEW)]
    transposed = [t.detach().T.contiguous().T.requires_grad_() for t in arguments(FEW)]
    for inputs in (strided, transposed):
        assert not inputs[0].is_contiguous()
        assert_accurate(op(FEW, backend=backend), plain(FEW), plain(FEW), inputs)
        check_writes_everything(monkeypatch, op(FEW, backend=backend), inputs)


def test_the_teacher_is_resized_one_image_at_a_time(monkeypatch):
    """No call of the resize sees more than one image, and equal grids are not resized at all."""
    sizes, interpolate = [], F.interpolate

    def record(x, size, **options):
        sizes.append((*x.shape, *size))
        return interpolate(x, size, **options)

    monkeypatch.setattr(F, "interpolate", record)
    op(backend="torch")(*arguments())
    assert sizes == [(1, 6, th, tw, h, w) for h, w, th, tw in SIZES if (h, w) != (th, tw)]


def test_autocast_keeps_float32_arithmetic():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(dtype=dtype)
        for backend in BACKENDS:
            expected = outputs_and_gradients(op(backend=backend), inputs)
            with torch.autocast("cpu", torch.bfloat16):
                assert_same(outputs_and_gradients(op(backend=backend), inputs), expected)


def test_checkpointing_and_compilation():
    check_checkpoints(op(), arguments())
    packs = [[(2, 3, 3, 2)], [(2, 2, 4, 3), (4, 2, 1, 2)], [(1, 2, 3, 3)] * 5, [(5, 4, 2, 2), (2, 2, 3, 4)]]

    def call(student, teacher, grids, normalizer):
        return alignment_loss(student, teacher.detach(), grids, weight=0.5, normalizer=normalizer)

    for normalizers in ([torch.tensor(float(n)) for n in range(3, 7)], [None] * 4, [3.0] * 4):
        values = [[arguments(s)[0], arguments(s)[1].detach(), ImageGrids.from_sizes(s)] for s in packs]
        check_compiles_once(call, [[*v, n] for v, n in zip(values, normalizers, strict=True)])


def test_grids():
    grids = ImageGrids.from_sizes([(2, 3, 4, 5), (1, 1, 2, 2)])
    assert grids.table.tolist() == [2, 3, 4, 5, 1, 1, 2, 2]
    assert grids.table.dtype == torch.int64
    assert (grids.student_rows, grids.teacher_rows) == (7, 24)
    with pytest.raises(AttributeError):
        grids.table = None
    numpy = ImageGrids.from_sizes(np.array([[2, 3, 4, 5], [1, 1, 2, 2]], np.int32))
    assert (numpy.table.tolist(), numpy.student_rows, numpy.teacher_rows) == (grids.table.tolist(), 7, 24)


@pytest.mark.parametrize("sizes", [[], [(2, 3)], [(2, 0, 1, 1)], [(1, 1, 1, -1)], [(1, 1, True, 1)], [(1, 1, 1, "1")]])
def test_bad_grids(sizes):
    with pytest.raises(ValueError, match=r"sizes is .*; it must be a non-empty list of \(h, w, teacher_h, teacher_w\)"):
        ImageGrids.from_sizes(sizes)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(7), r"student is .*\[N, D\]"),
        (0, torch.zeros(6, 0), r"student is .*\[6, 0\].* with at least 1 column"),
        (0, torch.zeros(5, 6), "student has 5 rows; it must have 6, the student tokens of grids"),
        (1, torch.zeros(15, 7), r"teacher is .*\[M, 6\]"),
        (1, torch.zeros(14, 6), "teacher has 14 rows; it must have 15, the teacher tokens of grids"),
        (1, torch.zeros(15, 6).long(), "teacher is a torch.int64"),
        (1, torch.zeros(15, 6, device="meta"), "alignment_loss: its tensors are on cpu, meta"),
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_bad_inputs(index, value, message, backend):
    inputs = arguments([(2, 3, 3, 5)])
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        op([(2, 3, 3, 5)], backend=backend)(*inputs)


@pytest.mark.parametrize(
    "normalizer", [0, -1.0, float("nan"), True, "3", torch.ones(1), torch.tensor(2.0, requires_grad=True)]
)
def test_bad_normalizer(normalizer):
    with pytest.raises(ValueError, match="normalizer is"):
        op(normalizer=normalizer)(*arguments())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"token_weights is .*\[3\]"),
        ([1.0] * 55, r"token_weights is \[1.0"),
        (torch.ones(55).long(), "token_weights is a torch.int64"),
        (torch.ones(55, requires_grad=True), "token_weights is a tensor that requires a gradient"),
        (torch.ones(55, device="meta"), "alignment_loss: its tensors are on cpu, cpu, cpu, meta"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_token_weights(value, message, backend):
    with pytest.raises(ValueError, match=message):
        op(backend=backend, token_weights=value, normalizer=3)(*arguments())


@pytest.mark.parametrize("weight", ["0.5", True, None, torch.ones(())])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match=r"weight is .*; it must be a number"):
        op(weight=weight)(*arguments())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([2, 3, -1, 2]), "grids.table holds sizes that are not positive"),
        (torch.tensor([2, 3, 0, 2]), "grids.table holds sizes that are not positive"),
        (torch.tensor([2, 3, 1]), r"grids.table is .*\[3\].*shape \[4\*images\]"),
        (torch.tensor([]).long(), r"grids.table is .*\[0\]"),
        (torch.tensor([[2, 3, 3, 2]]), r"grids.table is .*\[1, 4\]"),
        (torch.tensor([2, 3, 3, 2]).int(), "grids.table is a torch.int32"),
        (torch.tensor([2, 9, 3, 9, 3, 9, 2, 9])[::2], "grids.table is .* it must be a contiguous int64"),
        ([2, 3, 3, 2], "grids.table is a list|grids.table is \\[2, 3"),
    ],
)
def test_bad_tables(table, message, backend):
    grids = ImageGrids(table, 6, 6)
    with pytest.raises(ValueError, match=message):
        alignment_loss(torch.ones(6, 4), torch.ones(6, 4), grids, backend=backend)


def test_dtypes_without_kernels_take_torch():
    """Eight-bit floats are floating-point tensors, too."""
    student, teacher = (x.detach() for x in arguments(FEW, columns=8))
    for dtypes in ((torch.float8_e4m3fn, torch.float32), (torch.float32, torch.float8_e5m2)):
        inputs = [x.to(dtype) for x, dtype in zip((student, teacher), dtypes, strict=True)]
        assert torch.equal(op(FEW)(*inputs), op(FEW, backend="torch")(*inputs))
        for backend in KERNELS[len(PORTABLE) :]:
            with pytest.raises(
                ValueError, match=f"backend='{backend}' cannot run alignment_loss: the dtype is torch.float8"
            ):
                op(FEW, backend=backend)(*inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_sparse_tensors_are_refused(backend):
    student, teacher = (x.detach() for x in arguments(FEW))
    with pytest.raises(ValueError, match=r"student is a torch.sparse_coo torch.float32 .* must be a dense floating"):
        op(FEW, backend=backend)(student.to_sparse(), teacher)
