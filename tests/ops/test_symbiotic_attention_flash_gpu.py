"""The flash backend with a real library: needs a CUDA device, and nothing installed but what the package needs."""

import pytest
import torch
from attention_cases import PACKS, arguments, layout_of, plain
from numerics import assert_accurate, outputs_and_gradients

from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
from unigendet.ops import symbiotic_attention_flash as flash

pytestmark = pytest.mark.gpu

MEDIUM = {
    "detection": [[(514, "full"), (300, "full"), (37, "causal"), (90, "causal")], [(258, "full"), (130, "causal")]],
    "generation": [[(60, "causal"), (800, "noise")], [(12, "causal"), (600, "noise"), (300, "full"), (200, "causal")]],
    "vit": [[(529, "full")], [(64, "full")], [(1, "full")]],
    "text": [[(700, "causal"), (33, "causal")], [(200, "causal")]],
}


def on_gpu(layout, dtype, **options):
    inputs = [x.detach().cuda().requires_grad_() for x in arguments(layout, dtype=dtype, **options)]
    return layout.to("cuda"), inputs


def check(layout, dtype, *, out_order="sequence", **options):
    layout, inputs = on_gpu(layout, dtype, **options)

    def run(backend):
        def call(q, k, v):
            out, lse = symbiotic_attention(q, k, v, layout, backend=backend, out_order=out_order, return_lse=True)
            return out, lse.detach()

        return call

    def usual(q, k, v):
        out, lse = plain(layout, out_order=out_order)(q, k, v)
        return out, lse.detach()

    assert_accurate(run("flash"), usual, run("reference"), inputs, factor=4, seeds=2)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("out_order", ["sequence", "stream"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_packs(pack, out_order, dtype):
    check(layout_of(pack), dtype, out_order=out_order, head_dim=64)


@pytest.mark.parametrize("pack", MEDIUM)
@pytest.mark.parametrize(("heads", "head_dim"), [((28, 4), 128), ((16, 16), 72), ((4, 1), 64)])
def test_medium_packs(pack, heads, head_dim):
    check(Layout.from_splits(MEDIUM[pack]), torch.bfloat16, heads=heads, head_dim=head_dim)


def test_one_query_per_sample():
    """Decoding: single queries against cached keys, for which the libraries take another path."""
    samples = [[(300 + 7 * i, "causal")] for i in range(5)]
    layout = Layout.from_splits(samples, cached=[s[0][0] - 1 for s in samples], capacity=[400] * 5)
    check(layout, torch.bfloat16, heads=(28, 4), head_dim=128)


def test_deterministic_when_asked():
    layout, inputs = on_gpu(Layout.from_splits(MEDIUM["detection"]), torch.bfloat16, heads=(8, 2), head_dim=64)
    call = lambda q, k, v: symbiotic_attention(q, k, v, layout, backend="flash")  # noqa: E731
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_gradients(call, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_library_has_a_name():
    assert flash.library(torch.device("cuda", torch.cuda.current_device())).name
