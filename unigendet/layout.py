"""Layout: everything about a pack that does not depend on activations.

A pack is many samples laid end to end; a sample is a list of splits (runs of tokens with one masking mode). From the
split lengths alone, ``Layout`` derives, in O(splits + tokens):

* the mask, as two integers per key. The queries that see key k form one interval [query_begin[k], query_end[k]) of
  query rows: for a ``causal`` key [k, sample end), for a key of a ``full`` split [a, b) it is [a, sample end), for a
  ``noise`` split [a, b). ``visible`` is that predicate, and the only place in Python that states it;
* the two token orders and the maps between them. *Sequence order* is the order of the pack; *stream-major* order holds
  all understanding tokens first, then all generation tokens, each in sequence order;
* the RoPE positions.

Cached decoding is the same thing: with ``cached``, the leading tokens of a sample are keys only; with ``capacity``, a
sample's key rows go on after its tokens with spare rows that nobody sees (their interval is empty).

Source: the attention of the paper, section 3.2 (symbiotic multimodal self-attention), and BAGEL's packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODES = ("causal", "full", "noise")
CAUSAL, FULL, NOISE = range(3)

# Columns of ``Layout.splits``, the flat int64 table that identifies a mask.
SPLIT_FIELDS = (
    "mode",  # CAUSAL, FULL or NOISE
    "key_begin",  # first key row of the split
    "key_end",
    "sample_key_begin",  # first key row of its sample
    "sample_key_end",  # one past the last token of its sample (spare rows lie beyond)
    "query_begin",  # first query row of the split
    "query_end",
)


def visible(query: Tensor, query_begin: Tensor, query_end: Tensor) -> Tensor:
    """The mask: whether query row ``query`` sees the key of ``query_begin``, ``query_end`` (broadcasts, bool)."""
    return (query_begin <= query) & (query < query_end)


class Layout:
    """Splits, mask, orders and positions of one pack. Immutable. Build it with :meth:`from_splits`.

    With T query rows and K key rows (K = T without cache):

    ============================ ======== ======= ==================================================================
    attribute                    dtype    shape   meaning
    ============================ ======== ======= ==================================================================
    ``query_begin, query_end``   int32    [K]     query row q sees key row k iff query_begin[k] <= q < query_end[k]
    ``key_rows``                 int64    [T]     the key row of each query's own token
    ``stream_to_sequence``       int64    [T]     sequence row of each stream-major row
    ``sequence_to_stream``       int64    [T]     stream-major row of each sequence row
    ``positions``                int64    [T]     RoPE position, in sequence order
    ``cu_seqlens_q``             int32    [S+1]   first query row of each sample, and T
    ``cu_seqlens_k``             int32    [S+1]   first key row of each sample (spare rows included), and K
    ``stream_lengths``           int64    [2]     tokens per stream (understanding, generation); always on the CPU
    ``splits``                   int64    [7 n]   the n splits, ``SPLIT_FIELDS`` each, flat; always on the CPU
    ============================ ======== ======= ==================================================================

    The two tables on the CPU are what launchers read on the host, so that no device has to be waited for.
    """

    query_begin: Tensor
    query_end: Tensor
    key_rows: Tensor
    stream_to_sequence: Tensor
    sequence_to_stream: Tensor
    positions: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    stream_lengths: Tensor
    splits: Tensor
    num_queries: int
    num_keys: int
    num_samples: int
    max_position: int

    _DEVICE = (
        "query_begin",
        "query_end",
        "key_rows",
        "stream_to_sequence",
        "sequence_to_stream",
        "positions",
        "cu_seqlens_q",
        "cu_seqlens_k",
    )
    _HOST = ("stream_lengths", "splits", "num_queries", "num_keys", "num_samples", "max_position")

    def __init__(self, **fields: Any) -> None:
        for name in self._DEVICE + self._HOST:
            object.__setattr__(self, name, fields.pop(name))
        if fields:
            raise TypeError(f"Layout has no fields {sorted(fields)}; build one with Layout.from_splits")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Layout is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Layout is immutable: {name} cannot be deleted")

    def __repr__(self) -> str:
        und, gen = self.stream_lengths.tolist()
        splits = self.splits.numel() // len(SPLIT_FIELDS)
        return (
            f"Layout({self.num_samples} samples, {splits} splits, {self.num_queries} queries "
            f"({und} understanding, {gen} generation), {self.num_keys} keys, {self.device})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({name: getattr(self, name) for name in self._DEVICE + self._HOST},)

    @property
    def device(self) -> torch.device:
        """Where the per-token tensors are."""
        return self.query_begin.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Layout:
        """The same layout on ``device`` (itself if it is there already). The two host tables stay on the CPU."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in self._DEVICE}
        return Layout(**moved, **{name: getattr(self, name) for name in self._HOST})

    def pin_memory(self) -> Layout:
        """The same layout in page-locked memory, so that ``to(device, non_blocking=True)`` overlaps with work."""
        pinned = {name: getattr(self, name).pin_memory() for name in self._DEVICE}
        return Layout(**pinned, **{name: getattr(self, name) for name in self._HOST})

    def dense_mask(self) -> Tensor:
        """The mask as a bool tensor [T, K]: quadratic memory, for references and tests."""
        query = torch.arange(self.num_queries, device=self.device)
        return visible(query[:, None], self.query_begin[None, :], self.query_end[None, :])

    def visible_pairs(self) -> int:
        """Number of visible (query, key) pairs, from ``splits``: what an attention over this pack has to compute."""
        mode, key_begin, key_end, sample_begin, _, first, last = (
            self.splits.unflatten(0, (-1, len(SPLIT_FIELDS))).numpy().T
        )
        queries, keys = last - first, key_end - key_begin
        visible_later = np.where(mode == NOISE, 0, keys)
        before = _exclusive_cumsum(visible_later)
        before = before - before[np.searchsorted(sample_begin, sample_begin)]  # in the split's own sample
        hidden = np.where(mode == CAUSAL, queries * (queries - 1) // 2, 0)  # the triangle after each query's own key
        return int((queries * (before + keys) - hidden).sum())

    @classmethod
    def from_splits(
        cls,
        samples: Sequence[Sequence[tuple[int, str]]],
        *,
        streams: Tensor | np.ndarray | Sequence[int] | None = None,
        positions: Tensor | np.ndarray | Sequence[int] | None = None,
        cached: Sequence[int] | None = None,
        capacity: Sequence[int] | None = None,
    ) -> Layout:
        """Layout of a pack, on the CPU.

        Args:
            samples: per sample, its splits in order, each (number of tokens, ``"causal"`` | ``"full"`` | ``"noise"``).
            streams: [T], 0 = understanding, 1 = generation, in sequence order. Default: all understanding.
            positions: [T] RoPE positions in sequence order. Default: text advances by its length, ``full`` by 1,
                ``noise`` by 0, starting at 0 in each sample; all tokens of an image share one position.
            cached: per sample, how many of its leading tokens are keys only (k and v come from a cache). Default: 0.
            capacity: per sample, its number of key rows, tokens included. Default: its number of tokens.

        Raises:
            ValueError: an argument is empty, of another length, or out of range; the message says which and where.
        """
        modes, lengths, counts = _check_samples(samples)
        tokens = np.add.reduceat(lengths, _starts(counts))  # per sample
        n_cached = _per_sample("cached", cached, np.zeros_like(tokens), 0, tokens, "its tokens")
        rows = _per_sample("capacity", capacity, tokens, tokens, None, "")

        sample = np.repeat(np.arange(len(counts)), counts)  # of each split
        key_base, query_base = _exclusive_cumsum(rows), _exclusive_cumsum(tokens - n_cached)
        begin = _exclusive_cumsum(lengths) - _exclusive_cumsum(tokens)[sample]  # of each split, inside its sample
        end = begin + lengths

        # Query row of the token at offset o of its sample; cached tokens map to the sample's first query.
        query_of = query_base[sample] - n_cached[sample]
        first_query = np.maximum(begin, n_cached[sample]) + query_of
        last_query = np.maximum(end, n_cached[sample]) + query_of
        sample_last = tokens[sample] + query_of
        table = np.stack(
            [
                modes,
                begin + key_base[sample],
                end + key_base[sample],
                key_base[sample],
                key_base[sample] + tokens[sample],
                first_query,
                last_query,
            ],
            axis=1,
        )

        offset = np.arange(lengths.sum()) - np.repeat(_exclusive_cumsum(lengths), lengths) + np.repeat(begin, lengths)
        of_sample, of_split = np.repeat(sample, lengths), np.repeat(np.arange(len(lengths)), lengths)
        is_query = offset >= n_cached[of_sample]
        key_row = offset + key_base[of_sample]
        own_query = np.maximum(offset, n_cached[of_sample]) + query_of[of_split]
        causal, noise = modes[of_split] == CAUSAL, modes[of_split] == NOISE
        query_begin, query_end = np.zeros(rows.sum(), np.int32), np.zeros(rows.sum(), np.int32)
        query_begin[key_row] = np.where(causal, own_query, first_query[of_split])
        query_end[key_row] = np.where(noise, last_query[of_split], sample_last[of_split])

        num_queries = int((tokens - n_cached).sum())
        if num_queries == 0:
            raise ValueError("cached covers every token of every sample; a layout needs at least one query")
        if positions is None:
            positions = _default_positions(modes, lengths, begin, sample, offset, of_split)[is_query]
        positions = _per_query("positions", positions, num_queries, None)
        streams = _per_query("streams", np.zeros(num_queries, np.int64) if streams is None else streams, num_queries, 2)
        stream_to_sequence = np.argsort(streams, kind="stable")
        sequence_to_stream = np.empty_like(stream_to_sequence)
        sequence_to_stream[stream_to_sequence] = np.arange(num_queries)
        generation = int(streams.sum())
        return cls(
            query_begin=torch.from_numpy(query_begin),
            query_end=torch.from_numpy(query_end),
            key_rows=torch.from_numpy(key_row[is_query]),
            stream_to_sequence=torch.from_numpy(stream_to_sequence),
            sequence_to_stream=torch.from_numpy(sequence_to_stream),
            positions=torch.from_numpy(positions),
            cu_seqlens_q=torch.from_numpy(np.append(query_base, num_queries).astype(np.int32)),
            cu_seqlens_k=torch.from_numpy(np.append(key_base, rows.sum()).astype(np.int32)),
            stream_lengths=torch.tensor([num_queries - generation, generation]),
            splits=torch.from_numpy(table.reshape(-1)),
            num_queries=num_queries,
            num_keys=int(rows.sum()),
            num_samples=len(counts),
            max_position=int(positions.max()),
        )


@dataclass(frozen=True, eq=False)
class Readout:
    """The part of a pack that the heads read: what the last decoder layer has to compute, R of the T tokens.

    In each sample they are the tokens from the first split on that is read; all tokens before them are keys only.
    """

    layout: Layout  # R queries, T keys
    query_rows: Tensor  # int64 [R]: the pack's sequence rows that are its queries
    stream_rows: Tensor  # int64 [R]: the pack's stream-major rows, in its own stream-major order
    places: Tensor  # int64 [T]: the inverse, own stream-major row of each of the pack's; -1 where there is none

    @classmethod
    def of(cls, layout: Layout, rows: np.ndarray) -> Readout | None:
        """The readout of a pack without cache, on the CPU, of which the sequence ``rows`` (int64) are read.

        None if nothing is read, or if the part is the whole.
        """
        splits = layout.splits.view(-1, len(SPLIT_FIELDS)).numpy()
        mode, length, begin = splits[:, 0], splits[:, 6] - splits[:, 5], splits[:, 5]
        first, sample = np.unique(splits[:, 3], return_inverse=True)  # of each sample; of each split
        tokens = np.diff(layout.cu_seqlens_q.numpy())
        unread = tokens.astype(np.int64)
        read = np.searchsorted(begin, rows, side="right") - 1  # splits
        np.minimum.at(unread, sample[read], begin[read] - first[sample[read]])
        if unread.sum() in (0, layout.num_queries):
            return None
        query_rows = np.flatnonzero(np.arange(layout.num_queries) >= np.repeat(first + unread, tokens))
        lists = [[] for _ in first]
        for i, n, m in zip(sample.tolist(), length.tolist(), mode.tolist(), strict=True):
            lists[i].append((n, MODES[m]))
        stream_row = layout.sequence_to_stream.numpy()[query_rows]
        part = Layout.from_splits(
            lists,
            streams=stream_row >= layout.stream_lengths[0].item(),
            positions=layout.positions.numpy()[query_rows],
            cached=unread,
        )
        stream_rows = stream_row[part.stream_to_sequence.numpy()]
        places = np.full(layout.num_queries, -1)
        places[stream_rows] = np.arange(len(stream_rows))
        return cls(part, *(torch.from_numpy(x) for x in (query_rows, stream_rows, places)))

    def _map(self, move: Callable[[Any], Any]) -> Readout:
        return Readout(*(move(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Readout:
        """The same on ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Readout:
        """The same in page-locked memory."""
        return self._map(lambda value: value.pin_memory())


def _rebuild(fields: dict[str, Any]) -> Layout:
    return Layout(**fields)


def _exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values) - values


_starts = _exclusive_cumsum


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_samples(samples: Sequence[Sequence[tuple[int, str]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mode and length of every split, and the number of splits of every sample."""
    if len(samples) == 0:
        raise ValueError("samples is empty; it must hold at least one sample")
    modes, lengths, counts = [], [], []
    for i, splits in enumerate(samples):
        if not _is_list(splits):
            raise ValueError(f"samples[{i}] is {splits!r}; it must be a list of (tokens, mode)")
        if len(splits) == 0:
            raise ValueError(f"samples[{i}] is empty; a sample needs at least one split")
        counts.append(len(splits))
        for j, split in enumerate(splits):
            if not _is_list(split) or len(split) != 2 or not isinstance(split[0], Real):
                raise ValueError(f"samples[{i}][{j}] is {split!r}; it must be (tokens, mode)")
            length, mode = split
            if mode not in MODES:
                raise ValueError(f"samples[{i}][{j}] has mode {mode!r}; it must be one of {MODES}")
            if length < 1:
                raise ValueError(f"samples[{i}][{j}] has {length} tokens; it must have at least one")
            if length != int(length):
                raise ValueError(f"samples[{i}][{j}] has {length} tokens; it must have a whole number of them")
            modes.append(MODES.index(mode))
            lengths.append(int(length))
    return np.array(modes), np.array(lengths), np.array(counts)


def _integers(name: str, values: Any) -> np.ndarray:
    """A copy of ``values`` as int64; only whole-number (or bool) dtypes, so that nothing is rounded."""
    array = np.asarray(values)
    if array.dtype.kind not in "biu":
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold integers")
    return array.astype(np.int64)


def _per_sample(
    name: str, values: Sequence[int] | None, default: np.ndarray, low: Any, high: np.ndarray | None, what: str
) -> np.ndarray:
    if values is None:
        return default
    array = _integers(name, values)
    if array.shape != default.shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must have one entry per sample: [{len(default)}]")
    low = np.broadcast_to(low, array.shape)
    for i in np.flatnonzero((array < low) | (array > (array if high is None else high))):
        bound = f"in [{low[i]}, {high[i]}] ({what})" if high is not None else f"at least {low[i]}, the sample's tokens"
        raise ValueError(f"{name}[{i}] is {array[i]}; it must be {bound}")
    return array


def _per_query(name: str, values: Any, num_queries: int, below: int | None) -> np.ndarray:
    array = _integers(name, values)
    if array.shape != (num_queries,):
        raise ValueError(f"{name} has shape {list(array.shape)}; it must have one entry per query: [{num_queries}]")
    if array.min() < 0 or (below is not None and array.max() >= below):
        raise ValueError(
            f"{name} holds values in [{array.min()}, {array.max()}]; they must be "
            + ("non-negative" if below is None else f"in [0, {below - 1}]")
        )
    return array


def _default_positions(
    modes: np.ndarray,
    lengths: np.ndarray,
    begin: np.ndarray,
    sample: np.ndarray,
    offset: np.ndarray,
    of_split: np.ndarray,
) -> np.ndarray:
    """RoPE positions of all tokens: text runs on, an image is one step (none if noised)."""
    advance = np.where(modes == CAUSAL, lengths, np.where(modes == FULL, 1, 0))
    start = _exclusive_cumsum(advance)
    first_split = np.searchsorted(sample, sample)
    start = start - start[first_split]
    return start[of_split] + np.where(modes[of_split] == CAUSAL, offset - begin[of_split], 0)
