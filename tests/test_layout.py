"""Layout against the rules of masking and positions written out token by token, for random packs."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigendet.layout import MODES, SPLIT_FIELDS, Layout, visible

PER_TOKEN = ("query_begin", "query_end", "key_rows", "stream_to_sequence", "sequence_to_stream", "positions")
BOUNDARIES = ("cu_seqlens_q", "cu_seqlens_k")
HOST = ("stream_lengths", "splits")


@dataclasses.dataclass(frozen=True)
class Token:
    sample: int
    split: int  # number within the whole pack
    mode: str
    offset: int  # within its sample
    is_query: bool
    key_row: int


@dataclasses.dataclass(frozen=True)
class Pack:
    samples: list
    cached: list
    capacity: list

    def layout(self, **options):
        return Layout.from_splits(self.samples, cached=self.cached, capacity=self.capacity, **options)

    def tokens(self):
        tokens, split, first_row = [], 0, 0
        for i, splits in enumerate(self.samples):
            offset = 0
            for length, mode in splits:
                for _ in range(length):
                    tokens.append(Token(i, split, mode, offset, offset >= self.cached[i], first_row + offset))
                    offset += 1
                split += 1
            first_row += self.capacity[i]
        return tokens

    def queries(self):
        return [t for t in self.tokens() if t.is_query]


def may_attend(q, k):
    """Same sample; not later, or in the same image; not inside a noised image other than q's own."""
    if q.sample != k.sample:
        return False
    if not (k.offset <= q.offset or (q.split == k.split and q.mode in ("full", "noise"))):
        return False
    return k.mode != "noise" or k.split == q.split


def walked_positions(splits):
    """RoPE positions of a sample's tokens: text runs on, an image is one step, a noised image none."""
    positions, r = [], 0
    for length, mode in splits:
        if mode == "causal":
            for _ in range(length):
                positions.append(r)
                r += 1
        else:
            positions.extend([r] * length)
            r += mode == "full"
    return positions


@st.composite
def packs(draw, max_samples=3, max_length=5):
    split = st.tuples(st.integers(1, max_length), st.sampled_from(MODES))
    samples = draw(st.lists(st.lists(split, min_size=1, max_size=4), min_size=1, max_size=max_samples))
    tokens = [sum(length for length, _ in splits) for splits in samples]
    cached = [draw(st.integers(0, n)) for n in tokens]
    if sum(tokens) == sum(cached):
        cached[-1] = draw(st.integers(0, tokens[-1] - 1))
    return Pack(samples, cached, [n + draw(st.integers(0, 3)) for n in tokens])


@given(packs())
def test_mask_follows_the_rules_of_attention(pack):
    layout = pack.layout()
    expected = torch.zeros(layout.num_queries, layout.num_keys, dtype=torch.bool)
    for row, q in enumerate(pack.queries()):
        for k in pack.tokens():
            expected[row, k.key_row] = may_attend(q, k)
    assert torch.equal(layout.dense_mask(), expected)
    rows = torch.arange(layout.num_queries)[:, None]
    assert torch.equal(visible(rows, layout.query_begin, layout.query_end), expected)


@given(packs(max_samples=4, max_length=9))
def test_visible_pairs_are_those_of_the_mask(pack):
    layout = pack.layout()
    assert layout.visible_pairs() == int(layout.dense_mask().sum())
    assert isinstance(layout.visible_pairs(), int)


def test_visible_pairs_of_a_long_pack():
    """More than 32 bits hold."""
    n = 100_000
    assert Layout.from_splits([[(n, "causal")], [(n, "full")]]).visible_pairs() == n * (n + 1) // 2 + n * n


@given(packs())
def test_positions_restart_in_every_sample(pack):
    walks = [walked_positions(splits) for splits in pack.samples]
    expected = [walks[t.sample][t.offset] for t in pack.queries()]
    layout = pack.layout()
    assert layout.positions.tolist() == expected
    assert layout.max_position == max(expected)
    given_positions = [7 * i % 5 for i in range(layout.num_queries)]
    other = pack.layout(positions=given_positions)
    assert other.positions.tolist() == given_positions
    assert other.max_position == max(given_positions)


@given(packs(), st.data())
def test_orders_are_inverse_and_stable(pack, data):
    num_queries = len(pack.queries())
    streams = data.draw(st.lists(st.integers(0, 1), min_size=num_queries, max_size=num_queries))
    layout = pack.layout(streams=streams)
    understanding = [i for i, s in enumerate(streams) if s == 0]
    generation = [i for i, s in enumerate(streams) if s == 1]
    assert layout.stream_to_sequence.tolist() == understanding + generation
    rows = torch.arange(num_queries)
    assert torch.equal(layout.stream_to_sequence[layout.sequence_to_stream], rows)
    assert torch.equal(layout.sequence_to_stream[layout.stream_to_sequence], rows)
    assert layout.stream_lengths.tolist() == [len(understanding), len(generation)]


@given(packs())
def test_rows_boundaries_and_splits(pack):
    layout, tokens, queries = pack.layout(), pack.tokens(), pack.queries()
    assert (layout.num_queries, layout.num_keys, layout.num_samples) == (
        len(queries),
        sum(pack.capacity),
        len(pack.samples),
    )
    assert layout.key_rows.tolist() == [t.key_row for t in queries]
    per_sample = [sum(t.sample == i for t in queries) for i in range(len(pack.samples))]
    assert layout.cu_seqlens_q.tolist() == [sum(per_sample[:i]) for i in range(len(per_sample) + 1)]
    assert layout.cu_seqlens_k.tolist() == [sum(pack.capacity[:i]) for i in range(len(per_sample) + 1)]
    rows = [dict(zip(SPLIT_FIELDS, r, strict=True)) for r in layout.splits.unflatten(0, (-1, 7)).tolist()]
    assert len(rows) == sum(map(len, pack.samples))
    for number, row in enumerate(rows):
        inside = [t for t in tokens if t.split == number]
        sample = [t.key_row for t in tokens if t.sample == inside[0].sample]
        assert MODES[row["mode"]] == inside[0].mode
        assert (row["key_begin"], row["key_end"]) == (inside[0].key_row, inside[-1].key_row + 1)
        assert (row["sample_key_begin"], row["sample_key_end"]) == (sample[0], sample[-1] + 1)
        asking = [i for i, t in enumerate(queries) if t.split == number]
        assert row["query_end"] - row["query_begin"] == len(asking)
        assert not asking or row["query_begin"] == asking[0]


@given(packs())
def test_spare_rows_are_seen_by_nobody(pack):
    layout = pack.layout()
    used = {t.key_row for t in pack.tokens()}
    spare = [row for row in range(layout.num_keys) if row not in used]
    assert not layout.dense_mask()[:, spare].any()
    assert bool((layout.query_begin[spare] == layout.query_end[spare]).all())


@given(packs())
def test_dtypes_copies_and_moves(pack):
    layout = pack.layout()
    for name in ("query_begin", "query_end", *BOUNDARIES):
        assert getattr(layout, name).dtype == torch.int32
    for name in ("key_rows", "stream_to_sequence", "sequence_to_stream", "positions", *HOST):
        assert getattr(layout, name).dtype == torch.int64
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), copy.copy(layout)):
        assert type(other) is Layout
        for name in (*PER_TOKEN, *BOUNDARIES, *HOST):
            assert torch.equal(getattr(other, name), getattr(layout, name)), name
        for name in ("num_queries", "num_keys", "num_samples", "max_position"):
            assert getattr(other, name) == getattr(layout, name)


def test_moving_keeps_the_host_tables_on_the_cpu():
    layout = Layout.from_splits([[(3, "causal"), (2, "noise")]])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    for name in (*PER_TOKEN, *BOUNDARIES):
        assert getattr(moved, name).device.type == "meta", name
    for name in HOST:
        assert getattr(moved, name) is getattr(layout, name)


@pytest.mark.gpu
def test_pinned_and_moved_to_a_gpu():
    layout = Layout.from_splits([[(3, "causal"), (2, "noise")]])
    pinned = layout.pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in (*PER_TOKEN, *BOUNDARIES))
    moved = pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    for name in (*PER_TOKEN, *BOUNDARIES, *HOST):
        assert torch.equal(getattr(moved, name).cpu(), getattr(layout, name)), name
    assert moved.to("cuda") is moved


def test_immutable():
    layout = Layout.from_splits([[(3, "causal")]])
    with pytest.raises(AttributeError, match="immutable: positions cannot be set"):
        layout.positions = torch.zeros(3)
    with pytest.raises(AttributeError, match="immutable: splits cannot be deleted"):
        del layout.splits
    with pytest.raises(AttributeError, match="immutable: other cannot be set"):
        layout.other = 1


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_arguments_are_copied(convert):
    """Changing what a layout was built from must not change the layout."""
    streams, positions = convert([0, 1, 1]), convert([0, 5, 5])
    layout = Layout.from_splits([[(1, "causal"), (2, "noise")]], streams=streams, positions=positions)
    streams[0], positions[0] = 1, 9
    assert layout.stream_lengths.tolist() == [1, 2]
    assert layout.positions.tolist() == [0, 5, 5]


def test_no_tensor_is_larger_than_the_pack(monkeypatch):
    """Linear memory: neither the layout nor any array on the way to it grows with the square of the tokens."""
    largest = 0
    for name in ("arange", "zeros", "repeat", "where", "maximum", "stack", "cumsum", "argsort"):
        function = getattr(np, name)

        def watched(*args, _function=function, **kwargs):
            nonlocal largest
            result = _function(*args, **kwargs)
            largest = max(largest, result.size)
            return result

        monkeypatch.setattr(np, name, watched)
    tokens = 3 * (20 + 1000 + 500)
    layout = Layout.from_splits([[(20, "causal"), (1000, "noise"), (500, "full")]] * 3)
    assert tokens <= largest <= 2 * tokens
    for name in (*PER_TOKEN, *BOUNDARIES, *HOST):
        assert getattr(layout, name).numel() <= tokens


def test_repr_says_what_it_holds():
    layout = Layout.from_splits([[(3, "causal"), (2, "noise")]], streams=[0, 0, 0, 1, 1], capacity=[7])
    assert repr(layout) == "Layout(1 samples, 2 splits, 5 queries (3 understanding, 2 generation), 7 keys, cpu)"


TEXT = [(3, "causal")]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "samples is empty; it must hold at least one sample"),
        ([TEXT, []], {}, r"samples\[1\] is empty; a sample needs at least one split"),
        ([TEXT, [(1, "full"), (2, "text")]], {}, r"samples\[1\]\[1\] has mode 'text'; it must be one of"),
        ([[(0, "full")]], {}, r"samples\[0\]\[0\] has 0 tokens; it must have at least one"),
        ([[(-2, "full")]], {}, r"samples\[0\]\[0\] has -2 tokens; it must have at least one"),
        ([20, "causal"], {}, r"samples\[0\] is 20; it must be a list of \(tokens, mode\)"),
        ([(20, "causal")], {}, r"samples\[0\]\[0\] is 20; it must be \(tokens, mode\)"),
        ([[("a", "causal")]], {}, r"samples\[0\]\[0\] is \('a', 'causal'\); it must be \(tokens, mode\)"),
        ([TEXT, [(1, "full"), (2,)]], {}, r"samples\[1\]\[1\] is \(2,\); it must be \(tokens, mode\)"),
        ([[(2.5, "full")]], {}, r"samples\[0\]\[0\] has 2.5 tokens; it must have a whole number"),
        ([TEXT], {"cached": [1, 1]}, r"cached has shape \[2\]; it must have one entry per sample: \[1\]"),
        ([TEXT, TEXT], {"cached": [0, 4]}, r"cached\[1\] is 4; it must be in \[0, 3\] \(its tokens\)"),
        ([TEXT], {"cached": [-1]}, r"cached\[0\] is -1; it must be in \[0, 3\]"),
        ([TEXT], {"cached": [3]}, "cached covers every token of every sample"),
        ([TEXT, TEXT], {"capacity": [3, 2]}, r"capacity\[1\] is 2; it must be at least 3, the sample's tokens"),
        ([TEXT], {"capacity": 3}, r"capacity has shape \[\]; it must have one entry per sample: \[1\]"),
        ([TEXT], {"positions": [0, 1]}, r"positions has shape \[2\]; it must have one entry per query: \[3\]"),
        ([TEXT], {"positions": [0, 1, -1]}, r"positions holds values in \[-1, 1\]; they must be non-negative"),
        ([TEXT], {"positions": [0, 0.5, 1]}, "positions has dtype float64; it must hold integers"),
        ([TEXT], {"streams": [0, 1]}, r"streams has shape \[2\]; it must have one entry per query: \[3\]"),
        ([TEXT], {"streams": [0, 1, 2]}, r"streams holds values in \[0, 2\]; they must be in \[0, 1\]"),
        ([TEXT], {"streams": [0, 0.9, 1]}, "streams has dtype float64; it must hold integers"),
        ([TEXT], {"cached": [1.5]}, "cached has dtype float64; it must hold integers"),
        ([TEXT], {"cached": [1], "streams": [0, 0, 1]}, r"streams has shape \[3\]; .* one entry per query: \[2\]"),
    ],
)
def test_bad_arguments(samples, options, message):
    with pytest.raises(ValueError, match=message):
        Layout.from_splits(samples, **options)
