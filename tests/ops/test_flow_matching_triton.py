"""The Triton kernels of flow_matching and flow_matching_loss: patches, channels, images, strides, masks, launches."""

import numpy as np
import pytest
import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import assert_same, check_writes_everything, randn
from test_flow_matching import arguments, plain, plain_loss
from test_flow_matching import op as portable_op

from unigendet.ops import LatentGrids, flow_matching_loss, flow_matching_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tiles that end inside rows, at their ends, and with the image; single rows and columns; a token alone.
SIZES = [(1, 1), (3, 5), (1, 9), (7, 1), (4, 8), (1, 1)]


def op(sizes, patch, channels, backend="triton"):
    return portable_op(LatentGrids.from_sizes(sizes), backend, patch, channels)


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_accuracy_over_patches_and_channels(patch, channels):
    for dtype in DTYPES if channels == 3 else DTYPES[:1]:
        expected = plain(SIZES, patch, channels)
        inputs = arguments(SIZES, patch, channels, dtype=dtype, time_dtype=torch.float32 if patch == 1 else dtype)
        assert_accurate(op(SIZES, patch, channels), expected, expected, inputs, seeds=1)


@pytest.mark.parametrize(("patch", "channels", "size"), [(2, 16, (9, 11)), (3, 3, (5, 7)), (1, 64, (1, 100))])
def test_accuracy_over_images_of_several_tiles(patch, channels, size):
    sizes = [size, size[::-1]]
    expected = plain(sizes, patch, channels)
    inputs = arguments(sizes, patch, channels)
    assert_accurate(op(sizes, patch, channels), expected, expected, inputs, seeds=1)


def test_accuracy_of_many_features():
    """64 columns by 64 rows by 3 channels, in one token more than one tile's numbers."""
    expected = plain([(1, 2)], 64, 3)
    assert_accurate(op([(1, 2)], 64, 3), expected, expected, arguments([(1, 2)], 64, 3), seeds=1)


@pytest.mark.parametrize(("patch", "channels"), [(2, 16), (3, 3)])
def test_backward_undoes_patchify(patch, channels):
    """Without noise, at t = 0, tokens that come in as gradients go out as the latents that they were cut from."""
    latents, noise, _ = arguments(SIZES, patch, channels)
    tokens = op(SIZES, patch, channels)(latents, torch.zeros_like(noise), torch.zeros(len(SIZES)))[0]
    (gradient,) = torch.autograd.grad(tokens, latents, tokens.detach())
    assert torch.equal(gradient, latents)


@pytest.mark.parametrize("trained", range(1, 8))
def test_every_mask_of_gradients_and_unwritten_memory(trained, monkeypatch):
    sizes = [(4, 9), (1, 1), (3, 3)]
    inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(arguments(sizes, 2, 16))]
    ours, theirs = (outputs_and_gradients(op(sizes, 2, 16, name), inputs) for name in ("triton", "reference"))
    assert ours.keys() == theirs.keys()
    for name, have in ours.items():
        torch.testing.assert_close(have, theirs[name])
    check_writes_everything(monkeypatch, op(sizes, 2, 16), inputs)


def test_inputs_and_gradients_of_any_strides():
    """Strided latents and timesteps, rows of a wider matrix; incoming gradients that are expanded or transposed."""
    latents, noise, times = (t.detach() for t in arguments(SIZES, 2, 3))
    wide = torch.cat((noise, noise), 1)[:, 12:]
    inputs = [torch.stack((latents, latents), 1)[:, 0], wide, torch.stack((times, times), 1)[:, 1]]
    weight = randn(*noise.T.shape, grad=False)
    for weigh in (torch.sum, lambda y: y[:, 0].sum(), lambda y: (y.T * weight).sum()):
        results = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in inputs]
            outputs = op(SIZES, 2, 3, backend)(*leaves)
            results.append(torch.autograd.grad(sum(weigh(y) for y in outputs), leaves))
        for have, want in zip(*results, strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_every_token_is_in_one_tile(tokens):
    table = LatentGrids.from_sizes(SIZES).table
    tiles, first_tiles = (t.numpy() for t in flow_matching_triton._tiles(table, tokens, torch.device("cpu")))
    assert tiles.dtype == first_tiles.dtype == np.int32
    covered, start = [], 0
    for image, (h, w) in enumerate(SIZES):
        for tile in tiles[first_tiles[image] : first_tiles[image + 1]]:
            assert tile[:4].tolist() == [image, start, h * w, w]
            covered += range(start + tile[4], start + min(tile[4] + tokens, h * w))
        start += h * w
    assert covered == list(range(start))
    assert first_tiles[-1] == len(tiles)


def test_tables_are_made_once_per_pack():
    first, again = (LatentGrids.from_sizes([(5, 6)]).table for _ in range(2))
    device = torch.device("cpu")
    tables = flow_matching_triton._tiles(first, 4, device)
    assert flow_matching_triton._tiles(again, 4, device)[0] is tables[0]
    assert flow_matching_triton._tiles(first, 8, device)[0] is not tables[0]


def test_a_cuda_graph_is_refused(monkeypatch):
    """It would keep addresses of tables that the cache lets go."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = LatentGrids.from_sizes([(5, 7)]).table
    with pytest.raises(ValueError, match="flow_matching cannot be part of a CUDA graph with backend='triton'"):
        flow_matching_triton._tiles(table, 4, torch.device("cuda"))


def loss(prediction, target, backend="triton"):
    return flow_matching_loss(prediction, target, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features"), [(9, 1), (9, 3), (70, 64), (9, 72), (9, 100), (5, 1032)])
def test_loss_over_widths(rows, features, dtype):
    inputs = [randn(rows, features, dtype=dtype), randn(rows, features, seed=1)]
    assert_accurate(loss, plain_loss, plain_loss, inputs, seeds=1)


@pytest.mark.parametrize("trained", range(1, 4))
@pytest.mark.parametrize("features", [12, 8200])
def test_loss_masks_strides_and_unwritten_memory(trained, features, monkeypatch):
    """The gradient of a sum over all rows is expanded; one of every other number of a longer vector is strided."""
    inputs = [randn(3, 2 * features, seed=i).detach()[:, ::2] if i else randn(features, 3).detach().T for i in range(2)]
    inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(inputs)]
    assert_accurate(loss, plain_loss, plain_loss, inputs, seeds=1)
    leaves = [t for t in inputs if t.requires_grad]
    for incoming in (torch.ones(1).expand(3), randn(6, grad=False)[::2]):
        ours, theirs = (torch.autograd.grad(loss(*inputs, name), leaves, incoming) for name in ("triton", "reference"))
        for have, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(have, want)
    check_writes_everything(monkeypatch, loss, inputs)


def test_what_the_kernels_cannot_run_is_refused():
    message = r"cannot run flow_matching: the dtype is torch\.float64"
    for inputs in (arguments([(1, 1)], 1, 4, dtype=torch.float64), arguments([(1, 1)], 1, 4, time_dtype=torch.float64)):
        with pytest.raises(ValueError, match=message):
            op([(1, 1)], 1, 4)(*inputs)
    with pytest.raises(ValueError, match="rows are 16400 numbers wide; they must be at most 16384"):
        op([(1, 1)], 5, 656)(*arguments([(1, 1)], 5, 656))
    with pytest.raises(ValueError, match=r"cannot run flow_matching_loss: the dtype is torch\.float64"):
        loss(randn(2, 4), randn(2, 4, dtype=torch.float64))


def test_no_launch_argument_that_is_specialised_depends_on_the_pack():
    """Packs of other lengths share their compiled kernels: Triton compiles again for 1 and for multiples of 16."""
    from unigendet.kernels import flow_matching as kernels
    from unigendet.kernels import flow_matching_loss as loss_kernels

    def integers(rows, images):
        latents, tokens, times = torch.empty(rows * 12), torch.empty(rows, 12), torch.empty(images)
        table, losses = torch.empty(images, 8, dtype=torch.int32), torch.empty(rows)
        inputs = (table, table, tokens, tokens, times, tokens)
        launches = (
            *kernels.forward(table, latents, tokens, times, tokens, tokens, 2, 3),
            *kernels.backward(*inputs, latents, tokens, times, losses, 2, 3),
            *loss_kernels.forward(tokens, tokens, losses),
            *loss_kernels.backward(losses, tokens, tokens, tokens, tokens),
        )
        return [
            {k: v for k, v in launch.arguments.items() if isinstance(v, int) and k != "total"} for launch in launches
        ]

    assert integers(64, 16) == integers(7, 1) == integers(1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("patch", "channels"), [(2, 16), (1, 16), (3, 3)])
def test_large_packs_on_a_device(patch, channels, dtype):
    """As accurate as the torch backend, and the same to the last bit in a second run."""
    sizes = [(64, 64), (32, 48), (1, 1), (40, 61), (64, 64)]
    leaves = [
        t.detach().cuda().requires_grad_()
        for t in arguments(sizes, patch, channels, dtype=dtype, time_dtype=torch.float32)
    ]
    ours, theirs = (op(sizes, patch, channels, backend) for backend in ("triton", "torch"))
    assert_same(outputs_and_gradients(ours, leaves), outputs_and_gradients(ours, leaves))
    assert_accurate(ours, theirs, plain(sizes, patch, channels), leaves, seeds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features"), [(20001, 64), (33, 16384)])
def test_large_losses_on_a_device(rows, features, dtype):
    leaves = [randn(rows, features, dtype=dtype, seed=i).detach().cuda().requires_grad_() for i in range(2)]
    assert_same(outputs_and_gradients(loss, leaves), outputs_and_gradients(loss, leaves))
    assert_accurate(loss, lambda p, t: loss(p, t, "torch"), plain_loss, leaves, seeds=1)
