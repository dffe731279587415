"""Parameters that lie one after another in memory are one matrix; others are concatenated, with the same results."""

import copy

import pytest
import torch
from torch import nn

from unigendet.integrations import fused


def parameters(dtypes=(torch.float32,) * 3):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(rows, 5, generator=generator).to(d)) for rows, d in zip((4, 2, 3), dtypes, strict=True)
    ]


def gradients(parts, concatenate):
    for part in parts:
        part.grad = None
    whole = concatenate(parts)
    (whole * torch.arange(45.0).view(9, 5)).sum().backward()
    return whole.detach().clone(), [part.grad for part in parts]


@pytest.mark.parametrize("apart", [False, True])
def test_values_and_gradients(apart):
    parts = parameters()
    values = [part.detach().clone() for part in parts]
    fused.fuse(parts)
    if apart:
        parts = copy.deepcopy(parts)
    assert (fused._whole(parts) is None) == apart
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True))
    whole, grads = gradients(parts, fused.concatenated)
    expected, expected_grads = gradients(parts, torch.cat)
    assert torch.equal(whole, expected)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, value)


def test_changes_are_seen():
    """Whatever an optimizer does in place, and what it does to .data."""
    parts = parameters()
    fused.fuse(parts)
    with torch.no_grad():
        parts[1].mul_(2)
    assert torch.equal(fused.concatenated(parts), torch.cat(parts))
    parts[1].data = torch.ones(2, 5)
    assert fused._whole(parts) is None
    assert torch.equal(fused.concatenated(parts), torch.cat(parts))


def test_fusing_twice_moves_nothing():
    parts = parameters()
    fused.fuse(parts)
    places = [part.data_ptr() for part in parts]
    fused.fuse(parts)
    assert places == [part.data_ptr() for part in parts]
    assert [place - places[0] for place in places] == [0, 80, 120]


@pytest.mark.parametrize("change", ["order", "gap", "transposed"])
def test_neighbours_that_are_no_matrix(change):
    memory = torch.arange(60.0)
    parts = [memory[:20].view(4, 5), memory[20:30].view(2, 5), memory[30:45].view(3, 5)]
    assert torch.equal(fused._whole(parts), memory[:45].view(9, 5))
    if change == "order":
        parts = [parts[1], parts[0], parts[2]]
    elif change == "gap":
        parts[2] = memory[35:50].view(3, 5)
    else:
        parts[0] = memory[:20].view(5, 4).T
    assert fused._whole(parts) is None
    assert torch.equal(fused.concatenated(parts), torch.cat(parts))


def test_unlike_parameters_are_left_alone():
    parts = parameters((torch.float32, torch.bfloat16, torch.float32))
    places = [part.data_ptr() for part in parts]
    fused.fuse(parts)
    assert places == [part.data_ptr() for part in parts]


def test_only_what_learns_gets_a_gradient():
    parts = parameters()
    parts[0].requires_grad_(False)
    _, grads = gradients(parts, fused.concatenated)
    assert [grad is None for grad in grads] == [True, False, False]
    for part in parts:
        part.requires_grad_(False)
    assert not fused.concatenated(parts).requires_grad
