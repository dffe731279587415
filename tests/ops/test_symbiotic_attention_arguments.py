"""Bad arguments of attention: every backend refuses them with the same message."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import DTYPES, arguments, layout_of
from op_checks import BACKENDS, CPP_BACKENDS

from unigendet.ops import symbiotic_attention

NAMES = ("auto", *BACKENDS, *CPP_BACKENDS, "triton", "flash")

ROWS = (layout_of("cached").num_queries, layout_of("cached").num_keys)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(ROWS[0], 8)}, rf"q has shape \[{ROWS[0]}, 8\]; it must be \[tokens, heads, head_dim\]"),
        ({"v": torch.zeros(2)}, r"v has shape \[2\]; it must be \[tokens, heads, head_dim\]"),
        ({"q": torch.zeros(3, 4, 8)}, f"q has 3 rows; the layout has {ROWS[0]} queries"),
        ({"k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 8)}, f"k and v have 3 rows; the layout has {ROWS[1]} keys"),
        ({"k": torch.zeros(ROWS[1], 1, 8)}, r"k has shape .* and v .*; both must be \[keys, kv_heads, 8\]"),
        ({"q": torch.zeros(ROWS[0], 4, 6)}, r"both must be \[keys, kv_heads, 6\]"),
        ({"q": torch.zeros(ROWS[0], 3, 8)}, "q has 3 heads; it must be a multiple of the 2 heads of k and v"),
        ({"k": torch.zeros(ROWS[1], 0, 8), "v": torch.zeros(ROWS[1], 0, 8)}, "k has shape .* at least one head"),
        ({"q": torch.zeros(ROWS[0], 0, 8)}, "q has shape .* at least one head"),
        (
            {n: torch.zeros(r, 2, 0) for n, r in zip("qkv", (*ROWS, ROWS[1]), strict=True)},
            "q has .* head_dim from 1 to 128",
        ),
        (
            {n: torch.zeros(r, 2, 129) for n, r in zip("qkv", (*ROWS, ROWS[1]), strict=True)},
            r"q has shape \[18, 2, 129\]; it must be .* head_dim from 1 to 128",
        ),
        ({"k": None}, "k is a NoneType; it must be a tensor"),
        ({"layout": None}, "layout is a NoneType; it must be a Layout"),
        ({"v": torch.zeros(ROWS[1], 2, 8).half()}, "v has dtype torch.float16; q, k and v must share one floating"),
        ({"q": torch.zeros(ROWS[0], 4, 8).long()}, "q has dtype torch.int64"),
        ({"k": torch.zeros(ROWS[1], 2, 8, device="meta")}, "k is on meta; it must be on the layout's device, cpu"),
        ({"layout": layout_of("training")}, "q has 18 rows; the layout has 32 queries"),
        ({"out_order": "batch"}, "out_order is 'batch'; it must be 'sequence' or 'stream'"),
    ],
)
def test_bad_arguments(backend, change, message):
    layout = layout_of("cached")
    values = dict(zip("qkv", arguments(layout), strict=True)) | {"layout": layout} | change
    with pytest.raises(ValueError, match=message):
        symbiotic_attention(**values, backend=backend)


def test_bad_backend():
    layout = layout_of("training")
    with pytest.raises(ValueError, match="backend='cuda' cannot run symbiotic_attention"):
        symbiotic_attention(*arguments(layout), layout, backend="cuda")


def test_triton_refuses_float64():
    layout = layout_of("training")
    with pytest.raises(ValueError, match="backend='triton' cannot run symbiotic_attention: the dtype is"):
        symbiotic_attention(*arguments(layout, dtype=torch.float64), layout, backend="triton")
    for dtype in DTYPES:
        symbiotic_attention(*arguments(layout, dtype=dtype, heads=(1, 1)), layout, backend="triton")


def test_triton_refuses_the_cpu_without_its_interpreter():
    """Triton decides when a kernel is defined, so this takes a process of its own."""
    code = """
import torch
from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
x = torch.zeros(2, 1, 8)
try:
    symbiotic_attention(x, x, x, Layout.from_splits([[(2, "causal")]]), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "backend='triton' cannot run symbiotic_attention: its tensors are on cpu; they must be on" in result.stdout
