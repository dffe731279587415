"""What a decoder layer launches on a GPU, by the profiler: matrix products, our kernels, and nothing else."""

import re
from collections import Counter

import pytest
import torch
from op_checks import randn
from torch.profiler import ProfilerActivity, profile

from unigendet.config import quickstart
from unigendet.layout import Layout
from unigendet.model.transformer import DecoderLayer
from unigendet.ops import rope_table

# cuBLAS and CUTLASS call their kernels so, those that add up split products included. PyTorch sums a bias's gradient.
MATRIX_PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitK|cublas|wgmma", re.IGNORECASE)
REDUCTION = re.compile(r"\breduce_kernel")
OURS = re.compile(r"^(attention_|qk_norm_rope_|rms_norm_|swiglu_)")


def launched(call):
    """Names of the kernels, copies and fills on the device during ``call``, counted."""
    call()  # compiles, and uploads the tables of the pack
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = (event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return Counter(event.name for event in events)


def matching(kernels, pattern):
    return sum(n for name, n in kernels.items() if pattern.search(name))


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [[0] * 60 + [1] * 50, [0, 1] * 55])
def test_kernels_of_a_layer(streams):
    """No elementwise kernel, copy or fill stands between the ops and the products, forward or backward."""
    config = quickstart()
    layer = DecoderLayer(config).to("cuda", torch.bfloat16)
    layout = Layout.from_splits([[(50, "causal"), (60, "noise")]], streams=streams).to("cuda")
    rope = rope_table(128, config.head_dim, config.rope_theta, device="cuda")
    x, delta = (randn(110, config.hidden_size, seed=i).detach().to("cuda", torch.bfloat16) for i in range(2))
    leaves = [x.requires_grad_(), delta.requires_grad_(), *layer.parameters()]
    incoming = [torch.ones_like(x) for _ in range(2)]

    def forward():
        return layer(x, delta, layout, rope)

    outputs = forward()
    for name, call, products, reductions in (
        ("forward", forward, 8, 0),  # four linear layers, two streams
        ("backward", lambda: torch.autograd.grad(outputs, leaves, incoming, retain_graph=True), 16, 2),
    ):
        kernels = launched(call)
        ours = matching(kernels, OURS)
        known = (OURS, MATRIX_PRODUCT, REDUCTION)
        others = {kernel: n for kernel, n in kernels.items() if not any(p.search(kernel) for p in known)}
        assert others == {}, name
        assert ours >= 5, name
        assert matching(kernels, MATRIX_PRODUCT) >= products, name
        assert matching(kernels, REDUCTION) <= reductions, name
