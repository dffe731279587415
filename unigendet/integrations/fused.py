"""Parameters that stay apart in a model, and are one matrix to a matrix product.

``q_proj``, ``k_proj`` and ``v_proj`` read the same rows; one product with their weights, one below the other, is
cheaper than three, and it is what ``qk_norm_rope`` reads. The parameters of somebody else's model must keep their
names, shapes and identity, though. So :func:`fuse` moves their numbers into one piece of memory, once, and
:func:`concatenated` uses that memory as the larger matrix, without a copy. Its gradient is cut into views, which
autograd keeps as the parameters' gradients: nothing is copied there either.

Memory can come apart again: ``deepcopy``, ``Module.to`` and sharding give every parameter memory of its own. That is
looked at in every call, and then the parts are copied together. The results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def fuse(parts: Sequence[nn.Parameter]) -> None:
    """Let ``parts``, [rows, ...] of one dtype on one device, lie one after another in memory; each stays itself.

    Parameters of other kinds (sharded, quantised) and mixed ones are left as they are.
    """
    first = parts[0]
    alike = all(type(p) is nn.Parameter and (p.dtype, p.device) == (first.dtype, first.device) for p in parts)
    if alike and _whole(parts) is None:
        with torch.no_grad():
            whole = torch.cat(list(parts))
        for part, own in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.data = own


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts)``, differentiable, and without a copy if they lie one after another in memory."""
    return parts[0] if len(parts) == 1 else _Concatenated.apply(*parts)


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """The memory of ``parts`` as one tensor, if they lie one after another in it."""
    first = parts[0]
    for part, following in pairwise(parts):
        after = part.storage_offset() + part.numel()
        if following.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if following.storage_offset() != after or following.dtype != first.dtype:
            return None
    if not all(part.is_contiguous() for part in parts):
        return None
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    # Not a view to autograd, which would tie it to the first part.
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(
        first.untyped_storage(), first.storage_offset(), shape, first.stride()
    )


class _Concatenated(torch.autograd.Function):
    """The parts as one tensor; each part's gradient is a view of the whole one."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        whole = _whole(parts)
        return torch.cat(parts) if whole is None else whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = grad.split(ctx.rows)
        return tuple(g if needed else None for g, needed in zip(pieces, ctx.needs_input_grad, strict=True))
