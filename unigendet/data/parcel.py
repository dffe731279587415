"""Batches on their way from a data worker: all tensors of one in a single block of shared memory.

Between processes PyTorch hands over every tensor by a file descriptor of its own, for which the receiver connects to
the sender; a pack has about fifty tensors, and the training process would wait for them one by one.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Parcel:
    """An object, pickled without its tensors, and their contents one after another.

    ``places``: offset in ``block``, dtype and shape of each tensor.
    """

    pickled: bytes
    block: Tensor
    places: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, value: Any) -> Parcel:
        """Pack ``value``, which holds CPU tensors anywhere inside; the contents are copied."""
        stream = io.BytesIO()
        pickler = _Pickler(stream, pickle.HIGHEST_PROTOCOL)
        pickler.dump(value)
        places, end = [], 0
        for tensor in pickler.tensors:
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        block = torch.empty(end, dtype=torch.uint8).share_memory_()
        parcel = cls(stream.getvalue(), block, tuple(places))
        for i, tensor in enumerate(pickler.tensors):
            parcel._tensor(i).copy_(tensor)
        return parcel

    def open(self) -> Any:
        """The object; its tensors lie in ``block``."""
        return _Unpickler(io.BytesIO(self.pickled), self._tensor).load()

    def pin_memory(self) -> Parcel:
        """The same parcel in page-locked memory, as DataLoader asks for it."""
        return Parcel(self.pickled, self.block.pin_memory(), self.places)

    def _tensor(self, i: int) -> Tensor:
        offset, dtype, shape = self.places[i]
        return self.block[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Leaves tensors out: each is a number, under which it is in ``tensors``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor; the same one for the same tensor."""
        if type(value) is not Tensor:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensor: Any) -> None:
        super().__init__(stream)
        self._tensor, self._made = tensor, {}

    def persistent_load(self, number: int) -> Tensor:
        """The tensor of that number, one object however often it occurs."""
        if number not in self._made:
            self._made[number] = self._tensor(number)
        return self._made[number]
