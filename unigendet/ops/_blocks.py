"""Rows in blocks: what the ``torch`` backend's chains of elementwise operations work on.

On a CPU a tensor of a whole pack does not stay in cache from one operation of a chain to the next, and fresh memory for
it costs more than the arithmetic. A block's temporaries stay in cache, and their memory serves the next block. On other
devices a block is all rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 1 << 18  # numbers of a block


def row_blocks(begin: int, end: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Cut the rows from ``begin`` to ``end``, of ``columns`` numbers each, into blocks."""
    step = max(1, BLOCK // max(1, columns) if device.type == "cpu" else end - begin)
    for first in range(begin, end, step):
        yield slice(first, min(first + step, end))


def stream_blocks(n: int, rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, slice]]:
    """Cut stream-major rows, of which the first ``n`` are the understanding stream's; yield (stream, block)."""
    for stream, (begin, end) in enumerate(((0, n), (n, rows))):
        for block in row_blocks(begin, end, columns, device):
            yield stream, block
