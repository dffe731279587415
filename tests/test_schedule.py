"""Tile schedules against the dense mask, for random packs; and what the standard traces launch."""

import numpy as np
import pytest
import torch
from attention_cases import arguments, layout_of
from hypothesis import given
from hypothesis import strategies as st
from test_layout import packs

from benchmarks import traces
from unigendet import schedule as schedules
from unigendet.layout import Layout
from unigendet.ops import symbiotic_attention
from unigendet.schedule import layout_schedule

TABLES = ("query_tiles", "whole_ranges", "edge_tiles", "key_tiles")
EDGE, WHOLE = 1, 2
blocks = st.integers(1, 32)
large_packs = packs(max_samples=4, max_length=40)


def tiles_of_mask(layout, block_m, block_n):
    """By definition, for each pair of tiles: 0, EDGE or WHOLE. A tile over the end of the pack is not whole."""
    mask = layout.dense_mask().numpy()
    shape = (-(-mask.shape[0] // block_m), -(-mask.shape[1] // block_n))
    padded = np.zeros((shape[0] * block_m, shape[1] * block_n), bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    tiles = padded.reshape(shape[0], block_m, shape[1], block_n)
    return np.where(tiles.all((1, 3)), WHOLE, np.where(tiles.any((1, 3)), EDGE, 0))


def tiles_of_queries(schedule, shape):
    """What a kernel over query tiles visits; a tile that is visited twice shows in the sum."""
    found = np.zeros(shape, int)
    for tile, first_range, end_range, first_edge, end_edge, *padding in schedule.query_tiles.tolist():
        assert padding == [0, 0, 0]
        for first, end in schedule.whole_ranges[first_range:end_range].tolist():
            assert first < end
            found[tile, first:end] += WHOLE
        for key_tile in schedule.edge_tiles[first_edge:end_edge].tolist():
            found[tile, key_tile] += EDGE
    return found


def tiles_of_keys(schedule, shape):
    """What a kernel over key tiles visits."""
    found = np.zeros(shape, int)
    for tile, begin, end, whole_begin, whole_end, *padding in schedule.key_tiles.tolist():
        assert padding == [0, 0, 0]
        assert begin <= whole_begin <= whole_end <= end
        found[begin:end, tile] += EDGE
        found[whole_begin:whole_end, tile] += WHOLE - EDGE
    return found


@given(large_packs, blocks, blocks)
def test_both_tables_cover_the_mask(pack, block_m, block_n):
    """Every visible pair once, no whole tile with an invisible pair, no tile without a visible one."""
    layout = pack.layout()
    schedule = layout_schedule(layout, block_m, block_n)
    expected = tiles_of_mask(layout, block_m, block_n)
    assert (schedule.block_m, schedule.block_n) == (block_m, block_n)
    np.testing.assert_array_equal(tiles_of_queries(schedule, expected.shape), expected)
    np.testing.assert_array_equal(tiles_of_keys(schedule, expected.shape), expected)


@given(large_packs, blocks, blocks)
def test_every_tile_has_one_entry_and_the_longest_are_first(pack, block_m, block_n):
    layout = pack.layout()
    schedule = layout_schedule(layout, block_m, block_n)
    tiles = tiles_of_mask(layout, block_m, block_n)
    for table, work in ((schedule.query_tiles, (tiles > 0).sum(1)), (schedule.key_tiles, (tiles > 0).sum(0))):
        order = table[:, 0].numpy()
        assert sorted(order) == list(range(len(work)))
        assert (np.diff(work[order]) <= 0).all()


@given(large_packs, blocks, blocks)
def test_holes_and_launched_pairs(pack, block_m, block_n):
    layout = pack.layout()
    schedule = layout_schedule(layout, block_m, block_n)
    assert schedule.holes == bool((~layout.dense_mask().any(0)).any())
    assert schedule.launched_pairs == (tiles_of_mask(layout, block_m, block_n) > 0).sum() * block_m * block_n
    assert schedule.launched_pairs >= layout.visible_pairs()
    assert isinstance(schedule.launched_pairs, int)


@given(large_packs, blocks, blocks)
def test_tables_are_aligned_int32(pack, block_m, block_n):
    """Kernels assume that pointers are multiples of 16 bytes."""
    schedule = layout_schedule(pack.layout(), block_m, block_n)
    for name in TABLES:
        table = getattr(schedule, name)
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        assert table.numel() == 0 or table.data_ptr() % 16 == 0, name
        assert table.storage_offset() % 4 == 0, name
    assert schedule.query_tiles.shape[1] == schedule.key_tiles.shape[1] == 8
    assert schedule.whole_ranges.shape[1] == 2


def test_the_tables_of_one_pack():
    """Written out: a text of 5, a noised image of 4 and a text of 3, in tiles of 2 × 4."""
    schedule = layout_schedule(Layout.from_splits([[(5, "causal"), (4, "noise"), (3, "causal")]]), 2, 4)
    # Key tile 1 holds the text's last token and three of the image, tile 2 the image's last and the later text.
    queries = {row[0]: row[1:5] for row in schedule.query_tiles.tolist()}
    ranges, edges = schedule.whole_ranges.tolist(), schedule.edge_tiles.tolist()
    visited = {t: (ranges[a:b], edges[c:d]) for t, (a, b, c, d) in queries.items()}
    assert visited == {
        0: ([], [0]),
        1: ([], [0]),
        2: ([[0, 1]], [1, 2]),
        3: ([[0, 2]], [2]),
        4: ([[0, 1]], [1, 2]),
        5: ([[0, 1]], [1, 2]),
    }
    assert schedule.key_tiles.tolist() == [
        [0, 0, 6, 2, 6, 0, 0, 0],
        [1, 2, 6, 3, 4, 0, 0, 0],
        [2, 2, 6, 2, 2, 0, 0, 0],
    ]
    assert schedule.launched_pairs == 8 * 14


def test_kept_by_content():
    """Equal packs share one schedule; another number of key rows, tile or pack has its own; the cache is bounded."""
    make = lambda rows=8: Layout.from_splits([[(3, "causal"), (4, "noise")]], capacity=[rows])  # noqa: E731
    first = layout_schedule(make(), 4, 2)
    assert layout_schedule(make(), 4, 2) is first
    others = [layout_schedule(make(9), 4, 2), layout_schedule(make(), 2, 4), layout_schedule(layout_of("cached"), 4, 2)]
    assert len({id(s) for s in (first, *others)}) == 4
    assert schedules._cached.cache_info().maxsize


def test_layers_and_directions_share_one_schedule(monkeypatch):
    built, key_tiles = [], schedules._key_tiles

    def counted(*args):
        built.append(args)
        return key_tiles(*args)

    monkeypatch.setattr(schedules, "_key_tiles", counted)
    schedules._cached.cache_clear()
    for name in ("single tokens", "training"):
        q, k, v = arguments(layout_of(name), heads=(1, 1))
        for _ in range(2):  # layers, each with a layout of equal content
            q = symbiotic_attention(q, k, v, layout_of(name), backend="triton")
        q.sum().backward()
    assert len(built) == 2  # in the interpreter all kernels have tiles of one size


@pytest.mark.parametrize("name", ["gduf_32k", "diga_23k"])
def test_launched_work_of_the_standard_traces_is_useful(name):
    layout = traces.trace(name).layout
    assert layout.visible_pairs() / layout_schedule(layout, 128, 128).launched_pairs >= 0.90


def test_more_pairs_than_32_bits_hold():
    layout = Layout.from_splits([[(100_000, "full")]])
    schedule = layout_schedule(layout, 128, 128)
    assert schedule.launched_pairs == (782 * 128) ** 2
    assert len(schedule.whole_ranges) == 781
    assert len(schedule.edge_tiles) == 782 + 781
