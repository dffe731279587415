"""The torch backend works on blocks of rows; where they end must not show. Other tests' inputs fit into one block."""

import pytest
import torch
from op_checks import outputs_and_gradients, randn

from unigendet import ops
from unigendet.layout import Layout
from unigendet.ops import _blocks

LAYOUT = Layout.from_splits(
    [[(9, "causal"), (8, "noise")], [(7, "full"), (5, "causal")]], streams=[0, 1, 1] * 9 + [0, 1]
)
T, ROPE = LAYOUT.num_queries, ops.rope_table(20, 4, 1e4)


def norm(x, residual, *weights):
    return ops.rms_norm(x, weights, LAYOUT, residual=residual, backend="torch")


def rope(x, *weights):
    heads = {"num_heads": 4, "num_kv_heads": 2, "backend": "torch"}
    return ops.qk_norm_rope(x, weights[:2], weights[2:], *ROPE, LAYOUT, **heads)


CASES = {
    "rms_norm": (norm, [(T, 6), (T, 6), (6,), (6,)]),
    "swiglu": (lambda x: ops.swiglu(x, backend="torch"), [(T, 10)]),
    "qk_norm_rope": (rope, [(T, 32), (4,), (4,), (4,), (4,)]),
}


@pytest.mark.parametrize("numbers", [1, 40, 100])
@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_show(case, numbers, monkeypatch):
    """Blocks of a row each, and such as do not divide the streams' rows."""
    function, shapes = CASES[case]
    inputs = [randn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    whole = outputs_and_gradients(function, inputs)
    monkeypatch.setattr(_blocks, "BLOCK", numbers)
    for name, value in outputs_and_gradients(function, inputs).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 5, 12])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_every_row_once(rows, n, monkeypatch):
    n = min(n, rows)
    monkeypatch.setattr(_blocks, "BLOCK", 7)
    blocks = list(_blocks.stream_blocks(n, rows, 2, torch.device("cpu")))
    assert [i for _, block in blocks for i in range(rows)[block]] == list(range(rows))
    assert all((block.stop <= n) == (stream == 0) and 0 < block.stop - block.start <= 3 for stream, block in blocks)
    whole = list(_blocks.stream_blocks(n, rows, 2, torch.device("meta")))
    assert len(whole) == (n > 0) + (rows > n)
