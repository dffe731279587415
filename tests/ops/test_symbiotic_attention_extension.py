"""unigendet._C's functions of attention, called directly: wrong arguments raise, none reaches other memory."""

import itertools

import pytest
import torch
from attention_cases import arguments, layout_of, plain
from op_checks import assert_same, misaligned, randn

from unigendet.layout import SPLIT_FIELDS, Layout
from unigendet.ops.backends import extension_backends, extension_facts

pytestmark = pytest.mark.skipif("cpp" not in extension_backends(), reason="unigendet._C is not built")

FORWARD, BACKWARD = "attention_cpu", "attention_backward_cpu"
FUNCTIONS = (FORWARD, BACKWARD)
SHARED = ("q", "k", "v", "query_begin", "query_end", "splits", "out_rows", "out", "lse")
TENSORS = {FORWARD: SHARED, BACKWARD: (*SHARED, "dout", "dlse", "dq", "dk", "dv")}
OUTPUTS = {FORWARD: ("out", "lse"), BACKWARD: ("dq", "dk", "dv")}


def direct(function, layout=None, head_dim=8):
    """Right arguments: 4 query heads and 2 key heads, of a pack with cached keys and spare rows."""
    layout = layout_of("cached") if layout is None else layout
    q, k, v = (x.detach() for x in arguments(layout, head_dim=head_dim))
    values = {
        "q": q, "k": k, "v": v, "query_begin": layout.query_begin, "query_end": layout.query_end,
        "splits": layout.splits, "out_rows": layout.sequence_to_stream, "scale": 0.3, "num_threads": 2,
    }  # fmt: skip
    out, lse = torch.zeros(q.shape), torch.zeros(q.shape[1], q.shape[0])
    if function == FORWARD:
        return values | {"out": out, "lse": lse}
    call(FORWARD, values | {"out": out, "lse": lse})
    values |= {"dout": randn(*q.shape, grad=False), "dlse": randn(*lse.shape, grad=False), "out": out, "lse": lse}
    return values | {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}


def call(function, values):
    from unigendet import _C

    getattr(_C, function)(**values)


EACH = [(function, name) for function, names in TENSORS.items() for name in names]


def wrong_tensors(good):
    """What is no tensor, or one of another dtype, shape, device or kind than ``good``."""
    gone = torch.zeros_like(good)
    gone.untyped_storage().resize_(0)
    yield from (1.0, "q", [good], good.double() if good.dtype != torch.float64 else good.float(), good.bool())
    yield from (good.to("meta"), gone, misaligned(good), good.to_sparse())
    yield from (good[:-1], good[None], good.flatten()[0], torch.cat((good, good)))
    yield good.int() if good.dtype == torch.int64 else good.long()
    yield torch.stack((good, good), -1)[..., 0]  # every other number
    if good.dim() > 1:
        yield from (good[..., :-1], good[:, :-1], good.flatten(), torch.cat((good, good), 1))


@pytest.mark.parametrize(("function", "name"), EACH)
def test_wrong_tensors(function, name):
    """The message names the tensor; of q and k, whose sizes are those of the others, it may be another that differs."""
    values = direct(function)
    call(function, values)
    optional = name in ("out_rows", "dlse")
    for wrong in [*wrong_tensors(values[name]), *([] if optional else [None])]:
        names = "|".join(TENSORS[function]) if name in ("q", "k") else name
        with pytest.raises(ValueError, match=rf"^({names}) is .*; it must be "):
            call(function, values | {name: wrong})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["out_rows", "dlse"])
def test_what_may_be_left_out(function, name):
    values = direct(function)
    if name in values:
        call(function, values | {name: None})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(18, 0, 8)}, r"q is .*\[18, 0, 8\].*with a head and head_dim from 1 to 128"),
        ({"q": torch.zeros(18, 4, 0)}, "q is .*with a head and head_dim from 1 to 128"),
        ({"q": torch.zeros(18, 4, 129)}, "q is .*with a head and head_dim from 1 to 128"),
        ({"q": torch.zeros(18, 3, 8)}, "k is .*with q's head_dim and a number of heads that divides q's"),
        ({"q": torch.zeros(18, 4, 9)}, "k is .*with q's head_dim"),
        ({"k": torch.zeros(53, 0, 8)}, "k is .*a number of heads that divides q's"),
        ({"num_threads": 0}, "num_threads is 0; it must be from 1 to 4096"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"num_threads": 4097}, "num_threads is 4097"),
        ({"num_threads": 2**40}, "num_threads is 1099511627776"),
        ({"isa": "x86-64-v9"}, "isa is x86-64-v9; it must be one that is built"),
        ({"isa": ""}, "isa is ; it must be one that is built"),
    ],
)
def test_wrong_sizes(function, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(function, direct(function) | change)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_isa_levels(function):
    facts = extension_facts()
    for level in facts["isa_levels"]:
        if level in facts["usable_isa_levels"]:
            call(function, direct(function) | {"isa": level})
        else:
            with pytest.raises(ValueError, match=f"^isa is {level}; it must be one that this processor has"):
                call(function, direct(function) | {"isa": level})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [-1, 18, 2**31, 2**62, -(2**63)])
def test_rows_out_of_range(function, bad):
    values = direct(function)
    rows = torch.where(torch.arange(18) == 3, bad, values["out_rows"])
    with pytest.raises(ValueError, match=f"^out_rows is one with {bad}; it must be of numbers from 0 to 17"):
        call(function, values | {"out_rows": rows})


def wrong_splits():
    """Of the pack's table: cut, without a split, in another order, and with any one number changed."""
    good = layout_of("cached").splits
    table = good.view(-1, len(SPLIT_FIELDS))
    n = len(table)
    yield from (good[:0], good[:-1], good[1:], torch.cat((good, good[:1])), torch.cat((good, good)))
    for i in range(n):
        yield torch.cat((table[: i + 1], table[i:])).flatten()
    for i in range(n - 1):  # without the last one, which has no queries, its keys are spare
        yield torch.cat((table[:i], table[i + 1 :])).flatten()
        order = torch.arange(n)
        order[i], order[i + 1] = i + 1, i
        yield table[order].flatten()
    for i, field in itertools.product(range(n), range(1, len(SPLIT_FIELDS))):
        value = int(table[i, field])
        for other in (value - 1, value + 1, value + 1000, -value - 1, 2**31, 2**62, 2**63 - 1, -(2**63)):
            changed = table.clone()
            changed[i, field] = other
            yield changed.flatten()
    for first, last in ((1, 2), (3, 4), (5, 6)):  # ranges that end before they begin
        changed = table.clone()
        changed[:, [first, last]] = table[:, [last, first]]
        yield changed.flatten()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tables_that_do_not_fit(function):
    values = direct(function)
    for splits in wrong_splits():
        with pytest.raises(
            ValueError, match=r"^splits is a table that does not fit 18 queries and 53 keys; it must be"
        ):
            call(function, values | {"splits": splits})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_table_of_fewer_rows_or_more(function):
    values = direct(function)
    for samples in ([[(18, "causal")]], [[(17, "causal")]], [[(60, "causal")]], [[(1, "full")], [(17, "full")]]):
        layout = Layout.from_splits(samples)
        if layout.num_queries == 18:  # all of the queries, and 18 of the 53 keys: others may be spare
            call(function, values | {"splits": layout.splits})
            continue
        with pytest.raises(ValueError, match=r"^splits is a table that does not fit 18 queries and 53 keys"):
            call(function, values | {"splits": layout.splits})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_outputs_that_share_memory_are_refused(function):
    values = direct(function)
    for output, other in itertools.product(OUTPUTS[function], TENSORS[function]):
        if output == other:
            continue
        shared = torch.zeros(8192, dtype=torch.uint8)
        for start in (0, values[output].numel() * 4 - 8):  # all of it, or its last numbers
            pair = {}
            for name, offset in ((output, 0), (other, start)):
                x = values[name]
                memory = shared[offset : offset + x.numel() * x.element_size()]
                pair[name] = memory.view(x.dtype).view(x.shape).copy_(x)
            with pytest.raises(
                ValueError, match=f"^({output}|{other}) is in the memory of ({output}|{other}); it must be"
            ):
                call(function, values | pair)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_queries_and_no_keys(function):
    """Layouts have at least one query; without any there is nothing to do."""
    values = direct(function)
    tensors = {name: values[name] for name in TENSORS[function]}
    empty = {
        name: torch.zeros((x.shape[0], 0) if x.dim() == 2 else (0, *x.shape[1:]), dtype=x.dtype)
        for name, x in tensors.items()
    }
    call(function, values | empty)
    keys = {name: values[name] for name in ("k", "v", "dk", "dv", "query_begin", "query_end") if name in values}
    results = {name: x.fill_(float("nan")) for name, x in keys.items() if name in ("dk", "dv")}
    call(function, values | empty | keys)
    assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_mask_stays_in_its_memory(function):
    """query_begin and query_end may hold anything: what is around the outputs is left alone."""
    values = direct(function, Layout.from_splits([[(70, "causal"), (80, "full")], [(9, "noise")]]))
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-5, 164), (-(2**20), 2**20), (-(2**31), 2**31), (159, 400), (-9, 0)):
        mask = [torch.randint(low, high, (159,), generator=generator, dtype=torch.int64).int() for _ in range(2)]
        guarded = {name: torch.full((values[name].numel() + 512,), 7.0) for name in OUTPUTS[function]}
        inner = {name: x[256:-256].view(values[name].shape) for name, x in guarded.items()}
        call(function, values | inner | dict(zip(("query_begin", "query_end"), mask, strict=True)))
        for name, x in guarded.items():
            assert (x[:256] == 7).all(), name
            assert (x[-256:] == 7).all(), name


def test_queries_that_see_only_some_keys():
    """Any mask that leaves each query a key of its sample is a right one, though no layout makes it."""
    layout = Layout.from_splits([[(70, "causal"), (80, "full")], [(40, "noise")]])
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(190)
    begin = (own - torch.randint(0, 60, (190,), generator=generator)).int()
    end = (own + 1 + torch.randint(0, 60, (190,), generator=generator)).int()
    same_sample = (own[:, None] < 150) == (own[None, :] < 150)
    mask = (begin <= own[:, None]) & (own[:, None] < end) & same_sample

    class Masked:
        num_queries = 190

        @staticmethod
        def dense_mask():
            return mask

    values = direct(FORWARD, layout)
    call(FORWARD, values | {"query_begin": begin, "query_end": end, "out_rows": None})
    out, lse = plain(Masked, 0.3)(*(values[name].double() for name in "qkv"))
    torch.testing.assert_close(values["out"].double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["lse"].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_of_any_strides(function):
    """Rows and heads may lie anywhere, also on each other; results are those of dense tensors."""
    values = direct(function)
    call(function, values)
    expected = {name: values[name].clone() for name in OUTPUTS[function]}
    for name in TENSORS[function]:
        x = values[name]
        if x.dim() != 3 or name in OUTPUTS[function]:
            continue
        apart = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3), float("nan"))[:, 1:-1, 2:-1].copy_(x)
        heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
        for strided in (apart, heads_first):
            call(function, values | {name: strided})
            assert_same({n: values[n] for n in OUTPUTS[function]}, expected)
        expanded = x[:1, :1].expand(x.shape)
        call(function, values | {name: expanded.contiguous()})
        dense = {n: values[n].clone() for n in OUTPUTS[function]}
        call(function, values | {name: expanded})
        for n, want in dense.items():
            torch.testing.assert_close(values[n], want, rtol=0, atol=0, equal_nan=True)
