"""Flow matching against plain PyTorch: noising, target, patchify, and the per-token squared error."""

import numpy as np
import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import BACKENDS, assert_same, check_checkpoints, check_compiles_once, check_writes_everything, randn

from unigendet.ops import LatentGrids, flow_matching, flow_matching_loss

PATCH, CHANNELS = 2, 3
SIZES = [[(2, 3)], [(1, 1), (2, 3), (2, 3), (3, 2)], [(4, 1), (1, 4)]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TESTED = [*BACKENDS, "triton"]
COMBINATIONS = [(b, d) for b in TESTED for d in DTYPES if b != "triton" or d != torch.float64]


def arguments(sizes, patch=PATCH, channels=CHANNELS, *, dtype=torch.float32, time_dtype=None):
    """Latents, noise and timesteps."""
    rows, features = sum(h * w for h, w in sizes), patch * patch * channels
    times = torch.sigmoid(randn(len(sizes), dtype=time_dtype or dtype, grad=False)).requires_grad_()
    return [randn(rows * features, dtype=dtype), randn(rows, features, dtype=dtype), times]


def op(grids, backend="auto", patch=PATCH, channels=CHANNELS):
    def call(latents, noise, timesteps):
        return flow_matching(latents, noise, timesteps, grids, patch_size=patch, channels=channels, backend=backend)

    return call


def plain(sizes, patch=PATCH, channels=CHANNELS):
    def call(latents, noise, timesteps):
        tokens, times, start = [], [], 0
        for i, (h, w) in enumerate(sizes):
            image = latents[start : start + h * w * noise.shape[1]].view(channels, h, patch, w, patch)
            tokens.append(torch.einsum("chpwq->hwpqc", image).reshape(h * w, -1))
            times.append(timesteps[i].to(latents.dtype).expand(h * w, 1))
            start += h * w * noise.shape[1]
        z, t = torch.cat(tokens), torch.cat(times)
        return (1 - t) * z + t * noise, noise - z

    return call


def plain_loss(prediction, target):
    wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return (prediction.to(wide) - target.to(wide)).square().mean(-1)


@pytest.mark.parametrize("backend", TESTED)
def test_operator_contract(backend):
    inputs = arguments(SIZES[1])
    table = LatentGrids.from_sizes(SIZES[1]).table
    torch.library.opcheck(torch.ops.unigendet.flow_matching.default, (*inputs, table, PATCH, CHANNELS, backend))
    noise, times = (t.detach() for t in inputs[1:])
    for mask in ([True, True, True], [False, True, False]):
        target = noise.clone() if mask[2] else None
        torch.library.opcheck(
            torch.ops.unigendet.flow_matching_backward.default,
            (noise, noise.clone(), times, target, table, PATCH, CHANNELS, mask, backend),
        )
    prediction, target = randn(5, 6), randn(5, 6, seed=1)
    torch.library.opcheck(torch.ops.unigendet.flow_matching_loss.default, (prediction, target, backend))
    detached = (randn(5, grad=False), prediction.detach(), target.detach())
    for mask in ([True, False], [True, True]):
        torch.library.opcheck(torch.ops.unigendet.flow_matching_loss_backward.default, (*detached, mask, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(backend, sizes):
    inputs = arguments(sizes, dtype=torch.float64)
    assert torch.autograd.gradcheck(op(LatentGrids.from_sizes(sizes), backend), inputs, fast_mode=True)
    pair = [randn(3, 4, dtype=torch.float64), randn(3, 4, dtype=torch.float64, seed=1)]
    assert torch.autograd.gradcheck(lambda p, t: flow_matching_loss(p, t, backend=backend), pair)


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_accuracy(backend, dtype, sizes):
    grids = LatentGrids.from_sizes(sizes)
    for time_dtype in (dtype, torch.float32):
        inputs = arguments(sizes, dtype=dtype, time_dtype=time_dtype)
        assert_accurate(op(grids, backend), plain(sizes), plain(sizes), inputs)


@pytest.mark.parametrize("backend", TESTED)
def test_features_are_in_row_column_channel_order(backend):
    """Pixel (row r, column c) of channel k of a 2 x 4 latent is 100 k + 10 r + c."""
    latent = torch.tensor([[[100.0 * k + 10 * r + c for c in range(4)] for r in range(2)] for k in range(CHANNELS)])
    noise = torch.zeros(2, PATCH * PATCH * CHANNELS)
    noised, target = op(LatentGrids.from_sizes([(1, 2)]), backend)(latent.flatten(), noise, torch.zeros(1))
    assert noised[0].tolist() == [0, 100, 200, 1, 101, 201, 10, 110, 210, 11, 111, 211]
    assert noised[1].tolist() == [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213]
    assert torch.equal(target, -noised)


@pytest.mark.parametrize("backend", TESTED)
def test_clean_and_pure_noise_are_exact(backend):
    sizes = [(2, 3), (2, 3)]
    latents, noise, _ = (t.detach() for t in arguments(sizes))
    noised, target = op(LatentGrids.from_sizes(sizes), backend)(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noised[6:], noise[6:])
    assert torch.equal(noised[:6], plain(sizes)(latents, noise, torch.zeros(2))[0][:6])
    assert torch.equal(target, plain(sizes)(latents, noise, torch.zeros(2))[1])


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("trained", range(1, 8))
def test_frozen_inputs_strides_and_unwritten_memory(backend, trained, monkeypatch):
    sizes = SIZES[1]
    latents, noise, times = (t.detach() for t in arguments(sizes))
    strided = [torch.stack((latents, latents), 1)[:, 0], noise.T.contiguous().T, torch.stack((times, times), 1)[:, 1]]
    inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(strided)]
    grids = LatentGrids.from_sizes(sizes)
    assert_accurate(op(grids, backend), lambda z, *rest: plain(sizes)(z.contiguous(), *rest), plain(sizes), inputs)
    check_writes_everything(monkeypatch, op(grids, backend), inputs)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_loss(backend, dtypes, rows, monkeypatch):
    def loss(prediction, target):
        return flow_matching_loss(prediction, target, backend=backend)

    inputs = [randn(rows, 12, dtype=dtypes[0]), randn(rows, 12, dtype=dtypes[1], seed=1)]
    assert_accurate(loss, plain_loss, plain_loss, inputs)
    inputs[1] = randn(12, rows, dtype=dtypes[1]).detach().T
    assert_accurate(loss, plain_loss, plain_loss, inputs)
    check_writes_everything(monkeypatch, loss, inputs)


def test_autocast_keeps_the_dtype():
    grids = LatentGrids.from_sizes(SIZES[1])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = arguments(SIZES[1], dtype=dtype)
        expected = outputs_and_gradients(op(grids), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(outputs_and_gradients(op(grids), inputs), expected)


def test_checkpointing_and_compilation():
    check_checkpoints(op(LatentGrids.from_sizes(SIZES[1])), arguments(SIZES[1]))

    def call(latents, noise, timesteps, grids):
        noised, target = op(grids)(latents, noise, timesteps)
        return noised, flow_matching_loss(noised * 2, target)

    packs = [[(2, 3), (3, 2)], [(2, 2), (4, 3), (1, 2)], [(1, 2)] * 5, [(5, 4), (2, 2)]]
    check_compiles_once(call, [[*arguments(sizes), LatentGrids.from_sizes(sizes)] for sizes in packs])


def test_grids():
    grids = LatentGrids.from_sizes([(2, 3), (1, 4)])
    assert grids.table.tolist() == [2, 3, 1, 4]
    assert grids.table.dtype == torch.int64
    assert grids.rows == 10
    with pytest.raises(AttributeError):
        grids.rows = 3
    numpy = LatentGrids.from_sizes([(np.int64(2), 3), np.array([1, 4], np.uint8)])
    assert (numpy.table.tolist(), numpy.rows) == (grids.table.tolist(), 10)
    large = LatentGrids.from_sizes(np.array([[200, 200]], np.uint8))
    assert (large.rows, type(large.rows)) == (40_000, int)


@pytest.mark.parametrize(
    "sizes",
    [[], [(2, 0)], [(2, -1)], [(2.0, 1)], [(1, 2, 3)], [(True, 1)], [("2", 1)], [(np.float64(2), 1)], (2, 3), None],
)
def test_bad_grids(sizes):
    with pytest.raises(ValueError, match=r"sizes is .*; it must be a non-empty list of \(h, w\)"):
        LatentGrids.from_sizes(sizes)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(6, 12), "latents is a torch.float32"),
        (0, torch.zeros(71), "latents has 71 values; it must have 72: 12 for each of the 6 tokens"),
        (0, torch.zeros(72, device="meta"), "flow_matching: its tensors are on meta, cpu, cpu"),
        (1, torch.zeros(6, 10), r"noise is .*\[N, 12\]"),
        (1, torch.zeros(6, 12).double(), r"noise is .*a torch.float32 tensor"),
        (1, torch.zeros(7, 12), "noise has 7 rows; it must have 6, the latent tokens of grids"),
        (2, torch.zeros(1, 1), r"timesteps is .*\[images\]"),
        (2, torch.zeros(2), "timesteps has 2 values; it must have 1, one per image of grids"),
    ],
)
def test_bad_inputs(index, value, message):
    inputs = arguments([(2, 3)])
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        op(LatentGrids.from_sizes([(2, 3)]))(*inputs)


def test_other_bad_arguments():
    inputs = arguments([(2, 3)])
    with pytest.raises(ValueError, match="grids is a list; it must be a LatentGrids"):
        op([(2, 3)])(*inputs)
    with pytest.raises(ValueError, match="patch_size is 0; it must be positive"):
        flow_matching(*inputs, LatentGrids.from_sizes([(2, 3)]), patch_size=0, channels=3)
    with pytest.raises(ValueError, match=r"target is .*\[3, 4\]"):
        flow_matching_loss(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"prediction is .*\[3, 0\].* with at least 1 column"):
        flow_matching_loss(torch.zeros(3, 0), torch.zeros(3, 0))
