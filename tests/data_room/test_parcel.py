"""What a data worker sends is what arrives: any object with tensors inside, as one block of memory."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigendet.data.parcel import Parcel
from unigendet.packing import LatentImage, Sample, Text

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def sent(value):
    """As another process gets it: pickled, the block being memory that both see."""
    parcel = Parcel.of(value)
    return Parcel(*pickle.loads(pickle.dumps((parcel.pickled, parcel.block, parcel.places)))).open()


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_tensors_of_any_kind(kinds):
    tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in kinds]
    value = {"tensors": tuple(tensors), "more": [3, None, "text"]}
    again = sent(value)
    assert again["more"] == value["more"]
    assert isinstance(again["tensors"], tuple)
    for one, other in zip(tensors, again["tensors"], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)


def test_a_tensor_that_occurs_twice_is_one():
    latent = torch.randn(3, 4, 4).transpose(1, 2)  # not contiguous
    student = Sample((Text((1, 2)), LatentImage(latent, noised=True)), name="a")
    teacher = Sample((LatentImage(latent),), 1, "a")
    parcel = Parcel.of((student, teacher))
    assert parcel.block.nbytes == 192
    assert parcel.block.is_shared()
    one, two = parcel.open()
    assert one.segments[1].latent is two.segments[0].latent
    assert torch.equal(one.segments[1].latent, latent)
    assert (one.name, one.segments[0].ids, two.label) == ("a", (1, 2), 1)
    latent.zero_()  # the parcel has its own
    assert one.segments[1].latent.abs().sum() > 0


def test_pinned_as_a_whole(monkeypatch):
    parcel = Parcel.of([torch.arange(5), torch.ones(2, 2)])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    after = parcel.pin_memory()
    assert len(pinned) == 1
    assert pinned[0] is parcel.block
    assert torch.equal(after.open()[0], torch.arange(5))
    assert after.open()[0].untyped_storage().data_ptr() == after.block.untyped_storage().data_ptr()


@pytest.mark.gpu
def test_pinned_tensors_on_a_gpu_machine():
    first, second = Parcel.of([torch.arange(5), torch.ones(2, 2)]).pin_memory().open()
    assert first.is_pinned()
    assert second.is_pinned()
    assert torch.equal(first.to("cuda", non_blocking=True).cpu(), torch.arange(5))
