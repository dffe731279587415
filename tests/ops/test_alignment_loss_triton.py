"""The Triton kernels of the alignment loss in the interpreter: widths, dtypes, sizes, what is read, launches."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, check_checkpoints, check_compiles_once, check_writes_everything, randn
from test_alignment_loss import FEW, arguments, op, plain

from unigendet.ops import ImageGrids, alignment_loss, alignment_loss_triton, backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [3, 8, 72, 100, 1032]


def check(sizes, *, seeds=1, **options):
    inputs = arguments(sizes, **options)
    assert_accurate(op(sizes, backend="triton"), plain(sizes), plain(sizes), inputs, seeds=seeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_widths(columns, dtype):
    check(FEW, dtype=dtype, columns=columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column(dtype):
    """Cosines are ±1 and gradients zero: differences of two terms κ u / n, each off by less than eight roundings."""
    sizes = [(5, 1, 2, 1), (1, 3, 1, 3)]
    inputs = arguments(sizes, columns=1, dtype=dtype)
    loss = op(sizes, backend="triton")(*inputs)
    expected = [x.detach().double().requires_grad_() for x in inputs]
    exact = plain(sizes)(*expected)
    assert abs(loss.double() - exact) <= 8 * torch.finfo(torch.float32).eps * exact
    shortest = min(x.detach().abs().min().item() for x in expected)
    for gradient in torch.autograd.grad(loss, inputs):
        assert gradient.abs().max() <= 16 * torch.finfo(torch.float32).eps / shortest


@pytest.mark.parametrize("columns", [8192, 16384])
def test_wide_rows(columns):
    check([(1, 2, 1, 1)], columns=columns, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(dtype, teacher_dtype):
    check([(2, 3, 2, 2)], dtype=dtype, teacher_dtype=teacher_dtype, columns=40)


SIZES = {
    "one teacher row": [(3, 4, 1, 1)],
    "upscaling": [(5, 7, 2, 3)],
    "downscaling": [(2, 1, 7, 5)],
    "both": [(2, 7, 5, 2)],
    "equal": [(3, 4, 3, 4)],
    "several images": [(1, 2, 2, 1), (2, 2, 2, 2), (3, 1, 1, 4), (1, 1, 1, 1)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes):
    check(sizes, columns=33)


def test_every_ratio():
    """All pairs of a few sizes along one side, those included whose sample positions fall on a row or the edge."""
    check([(n, 1, m, 1) for n in (1, 2, 3, 5, 7) for m in (1, 2, 3, 5)], columns=8)


@pytest.mark.parametrize(("columns", "shape"), [(1, (35, 30)), (600, (3, 7))])
def test_more_tokens_than_a_program_takes(columns, shape):
    """Tiles of several rows and of one, the last ones not full; more rows than one step of the sum has."""
    sizes = [(*shape, 1, 2), (1, 2, 1, 1)]
    student, teacher = arguments(sizes, columns=columns)
    options = {"return_image_means": True, "backend": "triton"}
    expected = plain(sizes, means=True)
    assert_accurate(op(sizes, **options), expected, expected, [student, teacher.detach()])


def test_more_images_than_one_step_of_the_sum():
    sizes = [(1, 1, 1, 1)] * 131
    student, teacher = arguments(sizes)
    assert_accurate(op(sizes, backend="triton"), plain(sizes), plain(sizes), [student, teacher.detach()])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_token_weights_and_image_means(dtype):
    u = randn(ImageGrids.from_sizes(FEW).student_rows, grad=False).abs().to(dtype)
    u[:2] = 0
    for options in ({"token_weights": u}, {"token_weights": u, "normalizer": 7, "weight": 0.5}):
        theirs = plain(FEW, means=True, **{k: v.float() if k == "token_weights" else v for k, v in options.items()})
        ours = op(FEW, backend="triton", return_image_means=True, **options)
        if dtype != torch.float64:
            assert_accurate(ours, theirs, theirs, arguments(FEW))
            continue
        for have, want in zip(ours(*arguments(FEW)), theirs(*arguments(FEW)), strict=True):
            torch.testing.assert_close(have, want)


def test_rows_of_zeros():
    """Finite gradients of clamped norms, and not a bit of any other row changes."""
    sizes = [(2, 3, 2, 3)]
    usual = [x.detach() for x in arguments(sizes)]
    zeroed = [x.clone() for x in usual]
    zeroed[0][1], zeroed[1][2], zeroed[0][4], zeroed[1][4] = 0, 0, 0, 0
    results = []
    for inputs in (usual, zeroed):
        leaves = [x.requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(op(sizes, backend="triton")(*leaves), leaves))
    assert_accurate(op(sizes, backend="triton"), plain(sizes), plain(sizes), zeroed)
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[[0, 3, 5]], after[[0, 3, 5]])
        assert not torch.equal(before[1], after[1])
    assert all((g[4] == 0).all() for g in results[1])


def gradients(sizes, student, teacher):
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    return torch.autograd.grad(op(sizes, backend="triton")(*leaves), leaves)


def test_equal_grids_read_no_other_row():
    sizes = [(3, 3, 3, 3)]
    student, teacher = (x.detach() for x in arguments(sizes))
    clean = gradients(sizes, student, teacher)
    teacher[4] = float("nan")
    others = [i for i in range(9) if i != 4]
    for before, after in zip(clean, gradients(sizes, student, teacher), strict=True):
        assert torch.equal(before[others], after[others])
        assert after[4].isnan().all()


def test_teacher_rows_that_nobody_reads():
    """Shrunk by 2.5, positions 0.75 and 3.25 leave out the middle row and column: it may hold NaN, and gets zeros."""
    sizes = [(2, 2, 5, 5)]
    student, teacher = (x.detach() for x in arguments(sizes))
    unread = torch.zeros(5, 5, dtype=torch.bool)
    unread[2], unread[:, 2] = True, True
    teacher[unread.flatten()] = float("nan")
    ds, dt = gradients(sizes, student, teacher)
    assert ds.isfinite().all()
    assert (dt[unread.flatten()] == 0).all()
    assert (dt[~unread.flatten()] != 0).any(1).all()


@pytest.mark.parametrize("strided", ["slice", "numbers", "transposed", "expanded"])
def test_strides(strided):
    student, teacher = (x.detach() for x in arguments(FEW, columns=20))
    make = {
        "slice": lambda x: torch.cat((x, x), 1)[:, 7:27],
        "numbers": lambda x: torch.stack((x, x), 2)[..., 1],
        "transposed": lambda x: x.T.contiguous().T,
        "expanded": lambda x: x[:1].expand(len(x), -1),
    }[strided]
    views = [make(x).detach().requires_grad_() for x in (student, teacher)]
    assert not views[0].is_contiguous()
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    have, want = (outputs_and_gradients(op(FEW, backend="triton"), x) for x in (views, copies))
    assert_same(have, want)


def test_unwritten_memory(monkeypatch):
    """Also where student rows are several to a tile, columns are padded, and teacher rows are not read."""
    sizes = [(1, 3, 1, 1), (1, 1, 4, 1)]
    for columns in (5, 520):
        check_writes_everything(monkeypatch, op(sizes, backend="triton"), arguments(sizes, columns=columns))


def test_checkpointing_and_compilation():
    check_checkpoints(op(FEW, backend="triton"), arguments(FEW))
    packs = [[(1, 2, 2, 1)], [(2, 2, 1, 3), (1, 1, 1, 2)], [(1, 1, 1, 1)] * 3]

    def call(student, teacher, grids):
        return alignment_loss(student, teacher, grids, weight=0.5, backend="triton")

    check_compiles_once(call, [[*arguments(sizes), ImageGrids.from_sizes(sizes)] for sizes in packs])


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='triton' cannot run alignment_loss: the dtype is torch\.float64"):
        op(FEW, backend="triton")(*arguments(FEW, teacher_dtype=torch.float64))
    sizes, columns = [(1, 1, 1, 1)], 16385
    with pytest.raises(ValueError, match="cannot run alignment_loss: rows are 16385 numbers wide; they must be"):
        op(sizes, backend="triton")(*arguments(sizes, columns=columns))
    monkeypatch.setattr(backends, "_compiles_triton", lambda _: True)  # as on a device
    assert backends.resolve("alignment_loss", "auto", *arguments(sizes, columns=columns)) in ("cpp", "torch")
    assert backends.resolve("alignment_loss", "auto", *arguments(sizes, columns=16384)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (37, 72), (9, 1100)])
def test_scaling(rows, columns, dtype):
    """Every element is rounded once, in place and not; a factor of 1 in place writes nothing."""
    gradient = randn(rows, columns, dtype=dtype, grad=False)
    for value in (1.0, 0.3, float("nan")):
        factor = torch.tensor(value)
        expected = (gradient.float() * value).to(dtype)
        scaled = torch.ops.unigendet.alignment_loss_backward(gradient, factor, "triton")
        in_place = gradient.clone()
        torch.ops.unigendet.alignment_loss_backward_(in_place, factor, "triton")
        for have in (scaled, in_place):
            torch.testing.assert_close(have, expected, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_in_place_writes_nothing():
    """The kernel that would write something else: its input is another tensor than its output."""
    from unigendet.kernels.alignment_loss import scale

    x, out = randn(4, 8, grad=False), torch.full((4, 8), 5.0)
    (launch,) = scale(x, torch.tensor(1.0), x)
    replace(launch, arguments=launch.arguments | {"out_ptr": out}).run()
    assert (out == 5).all()
    (launch,) = scale(x, torch.tensor(1.0), out)
    launch.run()
    assert torch.equal(out, x)


def test_few_programs_scale_many_tiles():
    from unigendet.kernels.alignment_loss import scale

    x, out = randn(50, 1030, grad=False), torch.zeros(50, 1030)
    (launch,) = scale(x, torch.tensor(2.0), out)
    assert launch.grid[0] > 3
    replace(launch, grid=(3,)).run()
    assert torch.equal(out, 2 * x)


def test_tables():
    """Tiles cover every image's rows in order, none crosses images, and a table that was seen is not made again."""
    grids = ImageGrids.from_sizes([(2, 5, 3, 3), (1, 1, 2, 1), (4, 2, 1, 1)])
    tables = alignment_loss_triton._tables(grids.table, 4, 2, torch.device("cpu"))
    tiles, images, teacher_tiles = (t.tolist() for t in tables)
    shared = [[0, 0, 2, 5, 3, 3], [10, 9, 1, 1, 2, 1], [11, 11, 4, 2, 1, 1]]
    spans = {0: [(0, 4), (4, 8), (8, 10)], 1: [(10, 11)], 2: [(11, 15), (15, 19)]}
    assert tiles == [[*span, *shared[i]] for i, each in spans.items() for span in each]
    assert images == [[0, 10, *shared[0]], [10, 11, *shared[1]], [11, 19, *shared[2]]]
    spans = {0: [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)], 1: [(9, 11)], 2: [(11, 12)]}
    assert teacher_tiles == [[*span, *shared[i]] for i, each in spans.items() for span in each]
    again = alignment_loss_triton._tables(grids.table.clone(), 4, 2, torch.device("cpu"))
    assert all(a is b for a, b in zip(tables, again, strict=True))


def test_launch_options():
    from unigendet.kernels.alignment_loss import Config, configure

    assert configure(3584) == Config(rows=8, block_rows=1, teacher_rows=4, block_d=4096, num_warps=8)
    for columns in (1, 8, 72, 256, 257, 1024, 1152, 16384):
        config = configure(columns)
        assert config.block_d >= columns
        assert config.rows % config.block_rows == 0
        assert config.num_warps in (1, 2, 4, 8, 16, 32)
        assert config.block_rows * config.block_d <= max(1024, 2 * columns)


def test_no_launch_argument_that_is_specialised_depends_on_the_pack():
    """Packs of other lengths share their compiled kernels: Triton compiles again for 1 and for multiples of 16."""
    from unigendet.kernels import alignment_loss as kernels
    from unigendet.kernels.alignment_loss_teacher import teacher_gradient

    def integers(rows, teacher_rows, count):
        student, teacher, sums = torch.empty(rows, 24), torch.empty(teacher_rows, 24), torch.empty(count)
        tiles = torch.empty(count, 8, dtype=torch.int32)
        student, teacher = (x.as_strided(x.shape, (24 if len(x) > 1 else 96, 1)) for x in (student, teacher))
        scratch = (torch.empty(rows), sums, torch.empty(rows, 2))
        config = kernels.configure(24)
        outputs = (sums[0], sums, student)
        launches = (
            *kernels.forward(config, student, teacher, tiles, tiles, None, None, 0.5, (False, False), outputs, scratch),
            *teacher_gradient(config, student, teacher, tiles, scratch[2], teacher),
            *kernels.scale(student, sums[0], student),
        )
        varying = {"images", "rows"}
        return [
            {k: v for k, v in launch.arguments.items() if isinstance(v, int) and k not in varying}
            for launch in launches
        ]

    assert integers(64, 16, 16) == integers(7, 1, 1) == integers(1, 33, 3)


def test_normalizers_of_any_dtype():
    inputs = arguments(FEW)
    expected = outputs_and_gradients(op(FEW, backend="triton", normalizer=12), inputs)
    for dtype in (torch.int64, torch.int32, torch.float64, torch.bfloat16):
        normalizer = torch.tensor(12, dtype=dtype)
        assert_same(outputs_and_gradients(op(FEW, backend="triton", normalizer=normalizer), inputs), expected)
