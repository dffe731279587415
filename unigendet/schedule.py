"""Tile schedules: which tiles of queries and keys a kernel has to visit, and in which of them it needs the mask.

Query rows and key rows are cut into tiles of ``block_m`` and ``block_n`` rows. A pair of tiles is *whole* if every
query of the one sees every key of the other, so that no mask arithmetic is needed; *edge* if some do; otherwise it is
not visited.

A key is seen by one interval of queries (``Layout``), and the intervals of consecutive keys touch. So one key tile is
visited by one interval of query tiles, its *active* interval, and is whole for one interval inside that. Both follow
from the split lengths: a key tile meets few splits, and inside a split the intervals' ends are known at both ends of
the piece. The work is proportional to the splits, the tiles and the length of the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unigendet.layout import CAUSAL, NOISE, SPLIT_FIELDS, Layout


@dataclass(frozen=True, eq=False)
class TileSchedule:
    """The tiles of one pack for tiles of block_m × block_n, for kernels over query tiles and over key tiles.

    Programs are started in the order of the entries, the longest first.

    ================ ============== ===============================================================================
    attribute        shape (int32)  meaning
    ================ ============== ===============================================================================
    ``query_tiles``  [⌈T/m⌉, 8]     tile, its [first, end) in whole_ranges, its [first, end) in edge_tiles, 0, 0, 0
    ``whole_ranges`` [·, 2]         ranges of key tiles that are whole for a query tile: first and end
    ``edge_tiles``   [·]            key tiles that are edge tiles for a query tile
    ``key_tiles``    [⌈K/n⌉, 8]     tile, its interval of active query tiles, its interval of whole ones, 0, 0, 0
    ================ ============== ===============================================================================

    ``holes``: whether key rows exist that no query sees. ``launched_pairs``: query-key pairs in all visited tiles.
    """

    query_tiles: Tensor
    whole_ranges: Tensor
    edge_tiles: Tensor
    key_tiles: Tensor
    block_m: int
    block_n: int
    holes: bool
    launched_pairs: int


def layout_schedule(layout: Layout, block_m: int, block_n: int) -> TileSchedule:
    """The schedule of ``layout``, on its device. Made once; see :func:`tile_schedule`."""
    return tile_schedule(layout.splits, layout.num_keys, block_m, block_n, layout.device)


def tile_schedule(splits: Tensor, num_keys: int, block_m: int, block_n: int, device: torch.device) -> TileSchedule:
    """The schedule of a pack, made once and kept for the last packs seen.

    Args:
        splits: ``Layout.splits``, on the CPU.
        num_keys: number of key rows.
        block_m: query rows per tile, at least 1.
        block_n: key rows per tile, at least 1.
        device: where the kernels run. The tables go there in one copy that the host does not wait for.

    Raises:
        ValueError: a CUDA graph is being captured. It would keep addresses of tables that the cache lets go.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a tile schedule cannot be part of a CUDA graph; run attention with backend='triton' outside"
            )
        # Tables belong to the stream that copies them: another one would not wait for the copy.
        stream = torch.cuda.current_stream(device).cuda_stream
    return _cached(splits.numpy().tobytes(), num_keys, block_m, block_n, device, stream)


@functools.lru_cache(maxsize=64)
def _cached(table: bytes, num_keys: int, block_m: int, block_n: int, device: torch.device, stream: int) -> TileSchedule:
    splits = np.frombuffer(table, np.int64).reshape(-1, len(SPLIT_FIELDS))
    num_queries = int(splits[-1, 6])
    tiles = _key_tiles(splits, num_queries, num_keys, block_m, block_n)
    whole_rows, whole_ranges = _whole_ranges(tiles)
    edge_rows, edge_tiles = _edge_tiles(tiles)
    count = -(-num_queries // block_m)
    whole_first, edge_first = (np.searchsorted(rows, np.arange(count + 1)) for rows in (whole_rows, edge_rows))
    lengths = np.concatenate(([0], np.cumsum(whole_ranges[:, 1] - whole_ranges[:, 0])))
    work = np.diff(lengths[whole_first]) + np.diff(edge_first)
    query_tiles = _by_work(work, np.arange(count), whole_first[:-1], whole_first[1:], edge_first[:-1], edge_first[1:])
    active = tiles.active_end - tiles.active_begin
    key_tiles = _by_work(
        active,
        np.arange(len(active)),
        tiles.active_begin,
        tiles.active_end,
        tiles.whole_begin,
        tiles.whole_end,
    )
    tables = _to_device([query_tiles, whole_ranges, edge_tiles, key_tiles], device)
    return TileSchedule(*tables, block_m, block_n, tiles.holes, int(active.sum()) * block_m * block_n)


@dataclass(frozen=True, eq=False)
class _KeyTiles:
    """Per key tile, intervals of query tiles; empty ones are [0, 0) or, for whole inside active, [begin, begin)."""

    active_begin: np.ndarray
    active_end: np.ndarray
    whole_begin: np.ndarray
    whole_end: np.ndarray
    holes: bool


def _key_tiles(splits: np.ndarray, num_queries: int, num_keys: int, block_m: int, block_n: int) -> _KeyTiles:
    mode, key_begin, key_end, sample, _, query_begin, query_end = splits.T
    last_of_sample = np.append(np.flatnonzero(np.diff(sample)), len(splits) - 1)
    sample_end = query_end[last_of_sample][np.searchsorted(sample[last_of_sample], sample)]
    end = np.where(mode == NOISE, query_end, sample_end)  # of the queries that see the split's keys
    seen = query_begin < end
    mode, key_begin, key_end, query_begin, query_end, end = (
        x[seen] for x in (mode, key_begin, key_end, query_begin, query_end, end)
    )
    # Pieces: the part of each split that lies in each tile it meets, in the order of the keys.
    first_tile = key_begin // block_n
    meets = (key_end - 1) // block_n - first_tile + 1
    split = np.repeat(np.arange(len(meets)), meets)
    tile = first_tile[split] + np.arange(len(split)) - np.repeat(np.cumsum(meets) - meets, meets)
    piece_begin = np.maximum(key_begin[split], tile * block_n)
    piece_end = np.minimum(key_end[split], (tile + 1) * block_n)
    # The first query that sees a key grows along a causal split, from its first key with a query on.
    own = lambda key: np.maximum(query_end[split] - (key_end[split] - key), query_begin[split])  # noqa: E731
    causal = mode[split] == CAUSAL
    least_begin = np.where(causal, own(piece_begin), query_begin[split])
    most_begin = np.where(causal, own(piece_end - 1), query_begin[split])

    count = -(-num_keys // block_n)
    groups = np.flatnonzero(np.diff(tile, prepend=-1))
    met = tile[groups]
    full = np.add.reduceat(piece_end - piece_begin, groups) == block_n
    active_begin, active_end, whole_begin, whole_end = np.zeros((4, count), np.int64)
    active_begin[met] = np.minimum.reduceat(least_begin, groups) // block_m
    active_end[met] = -(-np.maximum.reduceat(end[split], groups) // block_m)
    whole_begin[met] = -(-np.maximum.reduceat(most_begin, groups) // block_m)
    whole_end[met] = np.minimum.reduceat(end[split], groups) // block_m
    full_tiles = np.zeros(count, bool)
    full_tiles[met] = full
    none = ~full_tiles | (whole_end <= whole_begin)
    whole_begin[none] = whole_end[none] = active_begin[none]
    return _KeyTiles(active_begin, active_end, whole_begin, whole_end, int((piece_end - piece_begin).sum()) < num_keys)


def _expand(begin: np.ndarray, end: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The integers of all intervals [begin, end), one after another, and each interval's values repeated for each."""
    length = np.maximum(end - begin, 0)
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.repeat(begin, length) + offset, *(np.repeat(v, length) for v in values)


def _edge_tiles(tiles: _KeyTiles) -> tuple[np.ndarray, np.ndarray]:
    """All edge pairs in the order of the query tiles, then of the key tiles: (query tile, key tile)."""
    key_tile = np.arange(len(tiles.active_begin))
    query, key = _expand(
        np.concatenate((tiles.active_begin, tiles.whole_end)),
        np.concatenate((tiles.whole_begin, tiles.active_end)),
        np.concatenate((key_tile, key_tile)),
    )
    order = np.argsort(query * len(key_tile) + key)
    return query[order], key[order]


def _whole_ranges(tiles: _KeyTiles) -> tuple[np.ndarray, np.ndarray]:
    """Runs of whole key tiles, in the order of the query tiles, then of the key tiles: query tile, [first, end).

    A run of query tile i starts at key tile j if i is in the whole interval of j and not in that of j − 1, and ends
    before j if it is the other way round. Starts and ends, sorted, belong together.
    """
    begin, end = (np.concatenate(([0], x, [0])) for x in (tiles.whole_begin, tiles.whole_end))
    boundary = np.arange(len(begin) - 1)  # before key tile j
    bounds = []
    for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        # here without there: what lies before it, and what lies after it
        query, key = _expand(
            np.concatenate((begin[here], np.maximum(begin[here], end[there]))),
            np.concatenate((np.minimum(end[here], begin[there]), end[here])),
            np.concatenate((boundary, boundary)),
        )
        order = np.argsort(query * len(begin) + key)
        bounds.append((query[order], key[order]))
    (rows, first), (_, last) = bounds
    return rows, np.stack((first, last), axis=1)


def _by_work(work: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    entries = np.zeros((len(work), 8), np.int64)
    entries[:, : len(columns)] = np.stack(columns, axis=1)
    return entries[np.argsort(-work, kind="stable")]


def _to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The tables as int32 parts of one buffer, each at a multiple of 16 bytes, as kernels assume of their pointers."""
    sizes = [-(-a.size // 4) * 4 for a in arrays]
    buffer = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    host = buffer.numpy()
    starts = np.cumsum([0, *sizes[:-1]])
    for array, start in zip(arrays, starts, strict=True):
        host[start : start + array.size] = array.reshape(-1)
    buffer = buffer.to(device, non_blocking=True)
    return [buffer[s : s + a.size].view(a.shape) for a, s in zip(arrays, starts, strict=True)]
