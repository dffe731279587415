"""The C++ host build of the alignment loss: all kinds of shapes and strides, instruction sets, wrong arguments."""

import itertools
import random
from collections import Counter

import pytest
import torch
from numerics import assert_accurate
from op_checks import assert_same, check_writes_everything, misaligned, outputs_and_gradients
from test_alignment_loss import SIZES, arguments, op, plain

from unigendet.ops import ImageGrids
from unigendet.ops.backends import available, extension_backends, extension_facts, resolve

pytestmark = pytest.mark.skipif("cpp" not in extension_backends(), reason="unigendet._C is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "one teacher token": [(5, 7, 1, 1)],
    "upscaled": [(9, 7, 2, 3), (8, 1, 3, 1)],
    "downscaled by more than 2": [(2, 3, 9, 8), (1, 1, 6, 5)],
    "equal": [(4, 5, 4, 5)],
    "lines longer than a chunk": [(2, 600, 3, 70)],
    "many images": [(1 + i % 3, 1 + i % 5, 1 + i % 4, 1 + i % 2) for i in range(90)],
}


def at_level(level):
    """The backend's forward pass with the kernels of one instruction set."""
    from unigendet import _C

    class Module:
        @staticmethod
        def alignment_loss_cpu(**arguments):
            _C.alignment_loss_cpu(**arguments, isa=level)

        scale_cpu = _C.scale_cpu

    return Module


def test_auto_takes_it_for_the_dtypes_it_knows():
    narrow, wide = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert resolve("alignment_loss", "auto", narrow) == "cpp"
    assert resolve("alignment_loss", "auto", wide) == "torch"
    assert resolve("stream_linear", "auto", narrow) == "torch"
    assert "cpp" in available()["alignment_loss"]
    assert "cpp" not in available()["stream_linear"]


def test_errors_of_a_backend_that_is_named(monkeypatch):
    meta = [torch.zeros(6, 6, device="meta"), torch.zeros(15, 6, device="meta")]
    with pytest.raises(
        ValueError, match=r"backend='cpp' cannot run alignment_loss: its tensors are on meta; .* the CPU"
    ):
        op([(2, 3, 3, 5)], backend="cpp")(*meta)
    for facts, message in (
        ({"problem": "not built: no compiler"}, "not built: no compiler"),
        ({"cuda_archs": []}, "built without CUDA: .* with nvcc"),
    ):
        monkeypatch.setattr("unigendet.ops.backends.extension_facts", lambda f=facts: f)
        with pytest.raises(ValueError, match=f"backend='cuda' cannot run alignment_loss: unigendet._C is .*{message}"):
            resolve("alignment_loss", "cuda", torch.zeros(1))
    monkeypatch.setattr("unigendet.ops.backends.extension_backends", lambda: ("cpp", "cuda"))
    with pytest.raises(ValueError, match="its tensors are on cpu; they must be on a CUDA device"):
        resolve("alignment_loss", "cuda", torch.zeros(1))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_widths(dtypes):
    for columns in (3, 7, 8, 31, 72):
        inputs = arguments(dtype=dtypes[0], teacher_dtype=dtypes[1], columns=columns)
        assert_accurate(op(backend="cpp"), plain(), plain(), inputs)


def test_one_column():
    """Cosines of 1 and -1, gradients of nothing but roundings: the same as with a second column of zeros."""
    for dtype in DTYPES:
        narrow = arguments(dtype=dtype, columns=1)
        wide = [torch.cat((x.detach(), torch.zeros_like(x)), 1).requires_grad_() for x in narrow]
        results = outputs_and_gradients(op(backend="cpp"), narrow)
        expected = outputs_and_gradients(op(backend="cpp"), wide)
        assert_same(results, {name: x[:, :1] if x.dim() else x for name, x in expected.items()})


@pytest.mark.parametrize("columns", [1000, 8192, 8193])
def test_long_rows(columns):
    sizes = [(2, 3, 3, 2)]
    for dtype in DTYPES:
        assert_accurate(
            op(sizes, backend="cpp"), plain(sizes), plain(sizes), arguments(sizes, dtype=dtype, columns=columns)
        )


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(sizes, monkeypatch):
    inputs = arguments(sizes, columns=24)
    assert_accurate(op(sizes, backend="cpp"), plain(sizes), plain(sizes), inputs)
    check_writes_everything(monkeypatch, op(sizes, backend="cpp"), inputs)


def test_rows_of_zeros():
    student, teacher = (x.detach() for x in arguments(columns=20))
    student[::7], teacher[::5], teacher[-10:] = 0, 0, 0
    inputs = [student.requires_grad_(), teacher.requires_grad_()]
    assert_accurate(op(backend="cpp"), plain(), plain(), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs(dtype):
    """Large gradients are written past the caches and on large pages, aligned or not."""
    sizes = [(48, 48, 20, 20)]
    for columns in (2048, 2040):
        student, teacher = (x.detach() for x in arguments(sizes, dtype=dtype, columns=columns))
        inputs = [student.requires_grad_(), teacher]
        assert_accurate(op(sizes, backend="cpp"), plain(sizes), plain(sizes), inputs, seeds=1)


def strided(x):
    """x and its gradient-free twins with other strides."""
    x = x.detach()
    padded = torch.full((x.shape[0], x.shape[1] + 3), float("nan"), dtype=x.dtype)
    padded[:, 1:-2] = x
    apart = torch.full((x.shape[0], 1 << 16), float("nan"), dtype=x.dtype)
    apart[:, : x.shape[1]] = x
    every_other = torch.stack((x, torch.full_like(x, float("nan"))), 2)[..., 0]
    return {
        "padded": padded[:, 1:-2],
        "far apart": apart[:, : x.shape[1]],
        "every other": every_other,
        "transposed": x.T.contiguous().T,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    student, teacher = arguments(dtype=dtype, columns=19)
    expected = outputs_and_gradients(op(backend="cpp"), [student, teacher])
    for s, t in itertools.product(strided(student).values(), strided(teacher).values()):
        assert_same(outputs_and_gradients(op(backend="cpp"), [s.requires_grad_(), t.requires_grad_()]), expected)


def test_inputs_that_share_memory():
    """Expanded rows, overlapping rows, student and teacher the same."""
    sizes = [(3, 4, 3, 4), (2, 2, 2, 2)]
    numbers = arguments([(40, 1, 40, 1)])[0].detach()
    views = [numbers[:1].expand(16, 6), numbers.flatten().as_strided((16, 6), (3, 1)), numbers[:16]]
    for student, teacher in itertools.product(views, views):
        inputs = [student.detach().requires_grad_(), teacher.detach().requires_grad_()]
        apart = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        results = [outputs_and_gradients(op(sizes, backend="cpp"), x) for x in (inputs, apart)]
        assert_same(*results)


def test_the_same_bits_in_every_run_and_for_any_number_of_threads():
    sizes = [(40, 41, 35, 36), (1, 700, 1, 300)]
    u = torch.rand(ImageGrids.from_sizes(sizes).student_rows)
    call = op(sizes, backend="cpp", token_weights=u, return_image_means=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(call, arguments(sizes, columns=40)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


def test_every_instruction_set(monkeypatch):
    levels = extension_facts()["usable_isa_levels"]
    assert levels[-1] == "baseline"
    for level, dtype in itertools.product(levels, DTYPES):
        with monkeypatch.context() as patch:
            patch.setattr("unigendet._C", at_level(level))
            for columns in (5, 64, 75):
                assert_accurate(op(backend="cpp"), plain(), plain(), arguments(dtype=dtype, columns=columns), seeds=1)


def test_conversions_are_those_of_torch():
    """Every bfloat16 and float16 there is, and floats of all exponents, through the scale kernel of each level."""
    from unigendet import _C

    floats = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for level, dtype in itertools.product(extension_facts()["usable_isa_levels"], (torch.bfloat16, torch.float16)):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        for numbers, factor in ((every, 1.0), (every, 0.3), (floats.view(torch.float32).to(dtype), 1e-3)):
            out = torch.empty_like(numbers)
            _C.scale_cpu(gradient=numbers, factor=torch.tensor(factor), out=out, num_threads=1, isa=level)
            torch.testing.assert_close(out, (numbers.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def direct(**changes):
    """Arguments of ``_C.alignment_loss_cpu``."""
    student, teacher = (x.detach() for x in arguments([(2, 3, 3, 5)]))
    values = {
        "student": student,
        "teacher": teacher,
        "table": torch.tensor([2, 3, 3, 5]),
        "normalizer": torch.tensor(2.0),
        "token_weights": torch.ones(6),
        "weight": 1.0,
        "loss": torch.zeros(()),
        "means": torch.zeros(1),
        "dstudent": torch.zeros(6, 6),
        "dteacher": torch.zeros(15, 6),
        "distances": torch.zeros(6),
        "coefficients": torch.zeros(12),
        "unit_gradients": (False, False),
        "num_threads": 1,
    }
    return values | changes


def test_the_direct_call_works():
    from unigendet import _C

    values = direct()
    _C.alignment_loss_cpu(**values)
    assert values["loss"] > 0
    assert values["dstudent"].abs().min() > 0


BIG = 2**62
WRONG = {
    "student": [torch.zeros(6), torch.zeros(6, 6, 1), torch.zeros(5, 6), torch.zeros(6, 0), torch.zeros(6, 12)[:, ::2]],
    "teacher": [torch.zeros(15, 7), torch.zeros(14, 6), torch.zeros(15, 1).expand(15, 6), torch.zeros(6, 15).T],
    "table": [torch.tensor(t) for t in ([], [2, 3, 3], [2, 3, 3, 6], [-2, -3, 3, 5], [0, 3, 3, 5], [BIG, 4, 3, 5])]
    + [torch.tensor([2, 3, 3, 5], dtype=torch.int32), torch.tensor([[2, 3, 3, 5]]), torch.arange(8)[::2], [2, 3, 3, 5]]
    + [torch.tensor([2**31, 2**31, 2**31, 2**31]), torch.tensor([2, 3, 3, 5, 1, 1, 1, 1])],
    "normalizer": [torch.ones(1), torch.ones((), dtype=torch.float64), 2.0],
    "token_weights": [torch.ones(5), torch.ones(12)[::2], torch.ones(1).expand(6), torch.ones(6).half()],
    "weight": ["1", None, torch.zeros(2)],
    "loss": [torch.zeros(1), torch.zeros((), dtype=torch.float64), None],
    "means": [torch.zeros(2), torch.zeros(()), torch.zeros(0)],
    "dstudent": [torch.zeros(5, 6), torch.zeros(6, 7)[:, :6], torch.zeros(6, 6).half(), torch.zeros(36)],
    "dteacher": [
        torch.zeros(15, 5),
        torch.zeros(6, 15).T,
        torch.zeros(15, 6).bfloat16(),
        torch.zeros(1, 6).expand(15, 6),
    ],
    "distances": [torch.zeros(5), torch.zeros(12)[::2], None],
    "coefficients": [torch.zeros(6), None, torch.zeros(6, 2)],
    "unit_gradients": [None, (True,), (1, 2, 3)],
    "num_threads": [0, -1, 2**40, 1.5, None],
    "isa": ["avx", "", 3],
}
TENSORS = ["student", "teacher", "table", "normalizer", "token_weights", "loss", "means", "dstudent", "dteacher",
           "distances", "coefficients"]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_the_extension(name):
    from unigendet import _C

    values = list(WRONG[name])
    if name in TENSORS:
        good = direct()[name]
        gone = torch.zeros_like(good)
        gone.untyped_storage().resize_(0)
        values += [good.to("meta"), good.to(torch.complex64), good.bool(), "tensor", object(), good.numpy(), gone]
        values += [good.to_sparse()] if good.dim() else []
        values += [torch._neg_view(good)] if good.is_floating_point() else []
    for value in values:
        with pytest.raises((ValueError, TypeError)):
            _C.alignment_loss_cpu(**direct(**{name: value}))


def test_outputs_that_share_memory_are_refused():
    from unigendet import _C

    memory = torch.zeros(1000)
    shaped = {name: value for name, value in direct().items() if name in TENSORS and name != "table"}
    outputs = TENSORS[TENSORS.index("loss") :]
    for output, other in itertools.product(outputs, shaped):
        if output == other:
            continue
        pair = {name: memory[: shaped[name].numel()].view(shaped[name].shape) for name in (output, other)}
        with pytest.raises(ValueError, match="in the memory of"):
            _C.alignment_loss_cpu(**direct(**pair))


def test_wrong_arguments_of_scale():
    from unigendet import _C

    x, factor = torch.ones(8), torch.tensor(2.0)
    wrong = [(x, factor, torch.ones(7)), (x, factor, torch.ones(8).half()), (x, torch.ones(1), x), (x, 2.0, x)]
    wrong += [(x[::2], factor, x[::2]), (x[:6], factor, x[1:7]), (x, x[0], x), (x.double(), factor, x.double())]
    wrong += [(x.to("meta"), factor, x.to("meta")), (None, factor, x), (x, factor, None)]
    for gradient, by, out in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - each has its own text
            _C.scale_cpu(gradient=gradient, factor=by, out=out, num_threads=1)
    empty = torch.zeros(0, 4)
    _C.scale_cpu(gradient=empty, factor=factor, out=empty.clone(), num_threads=1)


def unusual(chance, shape, dtype):
    """A tensor of this shape and dtype, most often, that is laid out in memory as few are, and the kind's name."""
    plain_one = torch.zeros(shape, dtype=dtype)
    kind = chance.choice(
        ["strided", "overlapping", "huge", "expanded", "shrunk", "misaligned", "meta", "flipped", "3-d"]
    )
    if not plain_one.numel():
        return plain_one, "empty"
    if kind in ("strided", "overlapping"):
        strides = [chance.choice([0, 1, 2, 6, 7] if kind == "overlapping" else [7, 20, 50]) for _ in shape]
        memory = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        start = chance.choice([0, 1, 3])
        return torch.zeros(memory + start, dtype=dtype).as_strided(shape, strides, start), kind
    if kind == "huge":  # strides of sizes of 1 may be any, others reach for memory that is not there
        strides = [chance.choice([2**31, 2**40, 2**61, 2**62, 2**63 - 1]) for _ in shape]
        ones = [1 if chance.random() < 0.8 else n for n in shape]
        memory = torch.zeros(1, dtype=dtype)
        if ones == [1] * len(ones):
            return memory.as_strided(ones, strides), kind
        return memory[:1].view([1] * len(shape)).expand([n if n > 1 else 2**33 for n in shape]), kind
    if kind == "shrunk":
        storage = plain_one.untyped_storage()
        storage.resize_(max(0, storage.nbytes() - chance.choice([1, 2, 4, 1000])))
        return plain_one, kind
    if kind == "misaligned":
        return misaligned(plain_one), kind
    makers = {
        "expanded": lambda: torch.zeros([1] * len(shape), dtype=dtype).expand(shape),
        "meta": lambda: plain_one.to("meta"),
        "flipped": lambda: torch.zeros(shape[::-1], dtype=dtype).permute(list(range(len(shape)))[::-1]),
        "3-d": lambda: plain_one[..., None] if chance.random() < 0.5 else plain_one[None],
    }
    return makers[kind](), kind


def test_random_arguments_never_crash():
    """Any mixture of right and wrong arguments is computed or refused."""
    from unigendet import _C

    chance = random.Random(0)
    outcomes = Counter()
    for _ in range(2500):
        h, w, th, tw = (chance.choice([1, 2, 3]) for _ in range(4))
        rows, teacher_rows, columns = h * w, th * tw, chance.choice([1, 5, 6, 16, 17])
        dtypes = [chance.choice(DTYPES) for _ in range(2)]
        student = torch.zeros(rows, columns, dtype=dtypes[0])
        teacher = torch.zeros(teacher_rows, columns, dtype=dtypes[1])
        values = direct(
            student=student,
            teacher=teacher,
            dstudent=chance.choice([torch.zeros_like(student), None]),
            dteacher=chance.choice([torch.zeros_like(teacher), None]),
            table=torch.tensor([h, w, th, tw]),
            token_weights=torch.ones(rows),
            distances=torch.zeros(rows),
            coefficients=torch.zeros(2 * rows),
            num_threads=chance.choice([1, 2, 3, 7]),
        )
        kinds = []
        for name in chance.sample(TENSORS, chance.choice([0, 1, 1, 2])):
            value, kind = values[name], chance.choice(["unusual", "unusual", "unusual", "other"])
            if kind == "other":
                value = chance.choice([None, 1, "x", [], object(), torch.zeros(rows), torch.zeros(()), student])
            elif value is not None:
                shape = list(value.shape)
                if shape and chance.random() < 0.15:
                    shape[chance.randrange(len(shape))] = chance.choice([0, 1, 4])
                others = [*DTYPES, torch.float64, torch.int64]
                dtype = value.dtype if chance.random() < 0.85 else chance.choice(others)
                value, kind = unusual(chance, shape, dtype)
            if name == "table" and isinstance(value, torch.Tensor) and chance.random() < 0.5:
                value = torch.tensor([chance.choice([1, 2, 3, 5, -1, 0, BIG]) for _ in range(chance.choice([3, 4, 8]))])
            values[name] = value
            kinds.append((name, kind))
        is_read = {name: name != "coefficients" or values["dteacher"] is not None for name, _ in kinds}
        kinds = [kind for name, kind in kinds if is_read[name]]
        try:
            _C.alignment_loss_cpu(**values)
            outcomes.update({(kind, "computed") for kind in kinds})
        except (ValueError, TypeError):
            outcomes.update({(kind, "refused") for kind in kinds})
    for kind in ("strided", "overlapping", "huge", "expanded", "flipped"):  # of student, teacher or one number
        assert outcomes[kind, "computed"] > 5, outcomes
        assert outcomes[kind, "refused"] > 5, outcomes
    for kind in ("shrunk", "misaligned", "meta"):
        assert outcomes[kind, "refused"] > 50, outcomes
        assert outcomes[kind, "computed"] == 0, outcomes


@pytest.mark.parametrize("name", TENSORS)
def test_misaligned_memory_is_refused_by_the_extension(name):
    from unigendet import _C

    with pytest.raises(ValueError, match=name):
        _C.alignment_loss_cpu(**direct(**{name: misaligned(direct()[name])}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory_is_copied_by_the_operator(dtype):
    student, teacher = arguments(dtype=dtype, columns=19)
    u, normalizer = torch.rand(len(student)), torch.tensor(3.0)
    expected = outputs_and_gradients(op(backend="cpp", token_weights=u, normalizer=normalizer), [student, teacher])
    inputs = [misaligned(x).requires_grad_() for x in (student, teacher)]
    call = op(backend="cpp", token_weights=misaligned(u), normalizer=misaligned(normalizer))
    assert_same(outputs_and_gradients(call, inputs), expected)


def test_plans_hold_the_table():
    """What the CUDA kernels read: each image's sizes and first rows, each tile's image and first token."""
    from unigendet import _C

    table = torch.tensor([5, 7, 2, 2, 2, 3, 1, 1])
    images, tiles = (torch.frombuffer(b, dtype=torch.int32) for b in _C.plan(table, 41, 5))
    assert images.view(-1, 6).tolist() == [[5, 7, 2, 2, 0, 0], [2, 3, 1, 1, 35, 4]]
    assert tiles.view(-1, 2).tolist() == [[0, 0], [0, 32], [1, 0]]
    with pytest.raises(ValueError, match="table is that of 41 student and 5 teacher rows"):
        _C.plan(table, 40, 5)


def allocated(function):
    """The sizes in bytes of all that ``function`` gets from PyTorch's allocator, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    del result  # kept so far: what is let go must not be mistaken for what is taken
    records = (e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return sorted((n for n in records if n > 0), reverse=True)


@pytest.mark.parametrize("needs", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_allocated_but_the_gradient(dtype, needs):
    """Besides its outputs, the operator asks PyTorch for one float per row, three with the teacher's gradient.

    The backward pass asks for numbers only: the incoming gradient and, where float16 has κ to multiply, the product.
    """
    student, teacher = (
        x.detach().requires_grad_(n) for x, n in zip(arguments(dtype=dtype, columns=64), needs, strict=True)
    )
    call, losses = op(backend="cpp"), []
    for _ in range(2):  # the first call imports what is kept
        sizes = allocated(lambda: losses.append(call(student, teacher)))
    rows = len(student)
    expected = [4 * rows, 4 * len(SIZES), 4]  # distances, means, loss
    expected += [x.numel() * x.element_size() for x in (student, teacher) if x.requires_grad]
    expected += [8 * rows] if needs[1] else []
    assert sizes == sorted(expected, reverse=True)
    if any(needs):
        losses[0].backward()
        sizes = allocated(losses[1].backward)
        assert sum(sizes) <= 64, sizes
