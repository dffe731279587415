"""The kernels' rounding to a smaller dtype, which the interpreter needs help with."""

import torch
import triton
import triton.language as tl
from op_checks import randn
from unigendet.kernels.primitives import rounded


@triton.jit
def round_kernel(source_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(source_ptr + index)
    tl.store(out_ptr + index, rounded(x, out_ptr.dtype.element_ty))


def test_rounding_is_to_nearest_even():
    device = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
    ties = 1 + torch.arange(64).float() / 256  # bfloat16 has 7 bits behind the point
    powers = -(2 - 2.0**-20) * 2.0 ** torch.arange(-70, 58)  # these round up to the next power of two
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf")] * 16)
    x = torch.cat((ties, powers, special, randn(768, grad=False))).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty_like(x, dtype=dtype)
        round_kernel[(1,)](x, out, SIZE=len(x))
        assert torch.equal(out, x.to(dtype))
