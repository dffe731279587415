"""The C++ host build of the ops on rows: threads, instruction sets, widths, wrong arguments."""

import itertools

import pytest
import test_qk_norm_rope as qk
import test_rms_norm as rms
import torch
from numerics import assert_accurate
from op_checks import assert_same, at_level, outputs_and_gradients, randn, streams
from test_swiglu import plain as plain_swiglu

from unigendet.layout import Layout
from unigendet.ops import rows_extension, swiglu
from unigendet.ops.backends import available, extension_backends, extension_facts, resolve

pytestmark = pytest.mark.skipif("cpp" not in extension_backends(), reason="unigendet._C is not built")

OPS = ("qk_norm_rope", "rms_norm", "swiglu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def long_layout():
    return Layout.from_splits([[(150, "causal"), (161, "noise")]], streams=torch.arange(311) % 3 // 2)


def calls(dtype=torch.float32):
    """Of each op, some rows of more blocks than one: (call, plain version, inputs)."""
    layout = long_layout()
    lengths = streams(130, 181)
    return {
        "qk_norm_rope": (
            qk.op(layout, "cpp", head_dim=64), qk.plain(layout, head_dim=64),
            qk.arguments(layout, head_dim=64, dtype=dtype),
        ),
        "rms_norm": (rms.op(lengths, "cpp"), rms.plain(130), rms.arguments(311, dtype=dtype, columns=200)),
        "swiglu": (lambda x: swiglu(x, backend="cpp"), plain_swiglu, [randn(311, 300, dtype=dtype)]),
    }  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_it_for_the_dtypes_it_knows(op):
    for dtype in DTYPES:
        assert resolve(op, "auto", torch.zeros(1, dtype=dtype)) == "cpp"
    assert resolve(op, "auto", torch.zeros(1, dtype=torch.float64)) == "torch"
    assert "cpp" in available()[op]
    assert "cuda" not in available()[op]


@pytest.mark.parametrize("op", OPS)
def test_errors_of_a_backend_that_is_named(op):
    for backend, tensor, message in (
        ("cuda", torch.zeros(1), "no such kernel is built"),
        ("cpp", torch.zeros(1, device="meta"), "its tensors are on meta; they must be on the CPU"),
        ("cpp", torch.zeros(1, dtype=torch.float64), "the dtype is torch.float64; it must be one of"),
    ):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run {op}: {message}"):
            resolve(op, backend, tensor)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(op, dtype, monkeypatch):
    call, _, inputs = calls(dtype)[op]
    results = []
    for threads in (1, 1, 2, 5):
        monkeypatch.setattr(rows_extension, "threads", lambda n=threads: n)
        results.append(outputs_and_gradients(call, inputs))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(op, monkeypatch):
    for level, dtype in itertools.product(extension_facts()["usable_isa_levels"], DTYPES):
        call, plain, inputs = calls(dtype)[op]
        with monkeypatch.context() as patch:
            patch.setattr("unigendet._C", at_level(level))
            assert_accurate(call, plain, plain, inputs, seeds=1)


@pytest.mark.parametrize("head_dim", [2, 8, 32, 34, 64, 96, 128])
def test_widths_of_heads(head_dim):
    layout = qk.layout_of("mixed")
    for dtype in DTYPES:
        plain = qk.plain(layout, head_dim=head_dim)
        inputs = qk.arguments(layout, head_dim=head_dim, dtype=dtype)
        assert_accurate(qk.op(layout, "cpp", head_dim=head_dim), plain, plain, inputs, seeds=1)


def test_gradients_of_any_strides():
    """Of q, k and v: expanded, transposed, or slices of one tensor."""
    layout = qk.layout_of("mixed")
    inputs = qk.arguments(layout)
    outputs = qk.op(layout, "cpp")(*inputs)
    heads_first = [randn(*(x.shape[i] for i in (1, 0, 2)), grad=False).transpose(0, 1) for x in outputs]
    halves = [randn(*x.shape[:2], 16, grad=False)[..., ::2] for x in outputs]
    expanded = [torch.tensor(0.5).expand(x.shape) for x in outputs]
    for gradients in (heads_first, halves, expanded):
        have = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
        want = torch.autograd.grad(outputs, inputs, [g.contiguous() for g in gradients], retain_graph=True)
        for left, right in zip(have, want, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extreme_gates(dtype):
    """From where the gate is shut to where it is open; infinities and NaN become what PyTorch makes of them."""
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])))
    x = torch.stack((gate, torch.ones_like(gate)), 1).to(dtype)
    have, want = swiglu(x, backend="cpp"), swiglu(x, backend="reference")
    torch.testing.assert_close(have, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-36, equal_nan=True)


def direct():
    """Right arguments of every function of the extension."""
    rows, n, wide = 6, 4, torch.randn(6, 32)
    rope = {
        "qkv": wide, "weights": torch.ones(4, 4), "cos": torch.ones(9, 2), "sin": torch.zeros(9, 2),
        "positions": torch.arange(6), "heads": (4, 2), "understanding": n, "eps": 1e-6,
    }  # fmt: skip
    q, k, v = torch.zeros(6, 4, 4), torch.zeros(6, 2, 4), torch.zeros(6, 2, 4)
    backward = {"weights": torch.ones(2, 32), "needs_weights": (True, True), "understanding": n}
    named = {
        "qk_norm_rope_cpu": rope | {"to_stream": torch.arange(6), "q": q, "k": k, "v": v},
        "qk_norm_rope_backward_cpu": rope
        | {"to_sequence": torch.arange(6), "dq": q, "dk": k, "dv": v, "dqkv": torch.zeros(6, 32)}
        | {"dweights": torch.zeros(4, 4), "needs_weights": (True, True)},
        "rms_norm_cpu": {"x": wide, "residual": wide.clone(), "weights": torch.ones(2, 32), "understanding": n}
        | {"normed": torch.zeros(6, 32), "summed": torch.zeros(6, 32), "rstd": torch.zeros(rows), "eps": 1e-6},
        "rms_norm_backward_cpu": backward
        | {"dy": wide, "dsummed": wide.clone(), "summed": wide.clone(), "rstd": torch.ones(rows)}
        | {"ds": torch.zeros(6, 32), "dweights": torch.zeros(2, 32)},
        "swiglu_cpu": {"gate_up": wide, "out": torch.zeros(6, 16)},
        "swiglu_backward_cpu": {"gate_up": wide, "dy": torch.zeros(6, 16), "gradient": torch.zeros(6, 32)},
    }
    return {name: values | {"num_threads": 2} for name, values in named.items()}


INDICES = ("to_stream", "to_sequence", "positions")
NUMBERS = {
    "understanding": (-1, 7, 2**40, None),
    "heads": ((0, 2), (4, 0), (-4, 2), (5, 2), (2**62, 2**62), (4,)),
    "num_threads": (0, -1, 2**40),
    "needs_weights": (None, (True,)),
}


@pytest.mark.parametrize("function", direct())
def test_wrong_arguments_of_the_extension(function):
    from unigendet import _C

    getattr(_C, function)(**direct()[function])
    for name, good in direct()[function].items():
        values = list(NUMBERS.get(name, ()))
        if isinstance(good, torch.Tensor):
            gone = torch.zeros_like(good)
            gone.untyped_storage().resize_(0)
            values += [good[:-1], good[..., :-1], good[None], good.double(), good.to("meta"), good.bool(), gone, 1.0]
            values += [torch.cat((good, good), -1)[..., ::2].T.contiguous().T if good.dim() == 2 else good[None, ::2]]
        if name in INDICES:
            values += [torch.where(good == 3, bad, good) for bad in (-1, 10, 2**62, -(2**63))]
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                getattr(_C, function)(**direct()[function] | {name: value})


@pytest.mark.parametrize("function", direct())
def test_outputs_that_share_memory_are_refused(function):
    from unigendet import _C

    memory = torch.zeros(1000)
    shaped = {
        name: x for name, x in direct()[function].items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    outputs = {"q", "k", "v", "dqkv", "dweights", "normed", "summed", "rstd", "ds", "out", "gradient"} & shaped.keys()
    if function == "rms_norm_backward_cpu":
        outputs -= {"summed", "rstd"}
    for output, other in itertools.product(outputs, shaped):
        if output == other:
            continue
        pair = {name: memory[: shaped[name].numel()].view(shaped[name].shape) for name in (output, other)}
        with pytest.raises(ValueError, match="in the memory of"):
            getattr(_C, function)(**direct()[function] | pair)
