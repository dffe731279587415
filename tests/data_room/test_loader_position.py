"""A run's position on other numbers of ranks and workers: what is left of the epoch is read once, and nothing twice."""

import json
import logging
from collections import Counter
from itertools import islice

import pytest
from loader_cases import loader, names, odd_records, text_sample

from unigendet.data.loader import Loader, Source
from unigendet.data.position import Position, Remaining, what_remains

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

A, B = odd_records("a", 61, seed=1), odd_records("b", 40, seed=2)
# (ranks, workers) of the run that saves, and of the one that goes on
RESHAPED = [((1, 0), (2, 0)), ((2, 0), (1, 0)), ((2, 0), (3, 0)), ((1, 0), (1, 2)), ((1, 2), (1, 1)), ((2, 2), (1, 0)),
            ((1, 3), (2, 2))]  # fmt: skip


def run(shape, lookahead=0, epochs=None):
    """The loaders of all ranks."""
    ranks, workers = shape
    sources = (Source(A, text_sample, 3.0, "a"), Source(B, text_sample, 1.0, "b"))
    settings = {"workers": workers, "lookahead": lookahead, "epochs": epochs, "max_tokens": 60, "seed": 5}
    return [loader(*sources, rank=rank, world_size=ranks, **settings) for rank in range(ranks)]


def steps(ranks, count):
    """What so many packs of every rank hold; None: all there are."""
    return Counter(name for one in ranks for pack in names(islice(one, count)) for name in pack)


def position(ranks):
    return json.loads(json.dumps(Loader.merge_states([one.state_dict() for one in ranks])))


def resumed(shape, state, **settings):
    ranks = run(shape, **settings)
    for one in ranks:
        one.load_state_dict(state)
    return ranks


def everything(epochs):
    return Counter({name: epochs for name, _ in A + B})


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize(("before", "after"), RESHAPED, ids=str)
def test_what_is_left_is_read_once(before, after, lookahead):
    first = run(before, lookahead)
    read = steps(first, 12 // len(first))
    assert 30 < read.total() < len(A)  # in the midst of the first epoch of either source
    assert max(read.values()) == 1
    for epochs in (1, 2):
        rest = resumed(after, position(first), lookahead=lookahead, epochs=epochs)
        assert read + steps(rest, None) == everything(epochs)


@pytest.mark.parametrize("lookahead", [0, 4])
def test_again_and_again(lookahead):
    """Each part of a run goes on from what the parts before it have left, in a later epoch, too."""
    shapes = [(2, 0), (3, 0), (1, 2), (2, 1), (1, 0), (4, 0)]
    ranks = run(shapes[0], lookahead, epochs=3)
    read = steps(ranks, 7)
    for shape in shapes[1:]:
        ranks = resumed(shape, position(ranks), lookahead=lookahead, epochs=3)
        read += steps(ranks, 12 // len(ranks))
    assert sum(read.values()) > 150  # beyond the first epoch of both sources
    assert max(read.values()) > 1
    for one in resumed((1, 0), position(ranks), lookahead=lookahead, epochs=3):
        read.update(name for pack in names(one) for name in pack)
    assert read == everything(3)


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (2, 2)], ids=str)
def test_the_same_shape_goes_on_exactly(shape, lookahead, caplog):
    straight = run(shape, lookahead)
    want = [names(islice(one, 9)) for one in straight]
    first = run(shape, lookahead)
    assert [names(islice(one, 4)) for one in first] == [packs[:4] for packs in want]
    again = resumed(shape, position(first), lookahead=lookahead)
    assert [names(islice(one, 5)) for one in again] == [packs[4:] for packs in want]
    assert position(again) == position(straight)
    assert not caplog.records


def test_a_reshaped_run_resumes_exactly_in_its_new_shape():
    first = run((2, 0), 4)
    steps(first, 6)
    second = resumed((3, 0), position(first), lookahead=4)
    before = steps(second, 3)
    third = resumed((3, 0), position(second), lookahead=4)
    assert [names(islice(one, 5)) for one in third] == [names(islice(one, 5)) for one in second]
    assert before


def test_the_order_is_the_same_every_time():
    first = run((2, 0), 4)
    steps(first, 6)
    one, two = (resumed((3, 0), position(first), lookahead=4) for _ in range(2))
    assert [names(islice(rank, 8)) for rank in one] == [names(islice(rank, 8)) for rank in two]


def test_counts_outlive_another_shape(caplog):
    sources = [Source([*A, ("huge", 90)], text_sample, 1.0, "a")]
    settings = {"max_tokens": 95, "max_sample_tokens": 60, "epochs": 3}
    first = [loader(*sources, rank=rank, world_size=2, **settings) for rank in range(2)]
    for one in first:
        list(one)
    assert sum(one.skipped for one in first) == 3
    packs = [one.state_dict()["ranks"][0]["positions"][0]["packs"] for one in first]
    with caplog.at_level(logging.WARNING, "unigendet.data.loader"):
        after = [loader(*sources, rank=rank, world_size=3, **settings) for rank in range(3)]
        for one in after:
            one.load_state_dict(position(first))
    assert [one.skipped for one in after] == [3, 0, 0]
    # condition dropout is drawn by the number of the pack
    assert {p["packs"] for one in after for p in one.state_dict()["ranks"][0]["positions"]} == {max(packs)}
    warnings = [record.getMessage() for record in caplog.records if "dealt out anew" in record.getMessage()]
    assert len(warnings) == 1
    assert "read by 2 × 1 workers (ranks × workers of each) and now is by 3 × 1" in warnings[0]


def test_positions_that_are_not_the_run_s():
    one, two = run((2, 0))
    with pytest.raises(ValueError, match=r"position is that of ranks \[1\]; it must be that of all 2 in order"):
        two.load_state_dict(two.state_dict())
    states = [one.state_dict(), two.state_dict()]
    with pytest.raises(ValueError, match=r"states are those of ranks \[1, 0\]; they must be those of all 2 ranks"):
        Loader.merge_states(states[::-1])
    with pytest.raises(ValueError, match="states is empty"):
        Loader.merge_states([])
    other = loader(A, B, rank=1, world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"states\[1\] differs from states\[0\] in identity"):
        Loader.merge_states([states[0], other])
    lone = run((1, 0))[0].state_dict()
    assert Loader.merge_states([lone]) == lone


def test_what_remains_by_hand():
    # places 0 to 9 of source 0, three shards: 0 3 6 9 …, 1 4 7 …, 2 5 8 …
    positions = [Position([3]), Position([1], held=[(0, 1)]), Position([2])]
    assert what_remains(Remaining(), 0, positions) == Remaining((1, 4), 7)
    # of these, two shards: 1 7 9 …, 4 8 10 …
    assert what_remains(Remaining((1, 4), 7), 0, [Position([1]), Position([0])]) == Remaining((4,), 7)
    assert what_remains(Remaining((1, 4), 7), 0, [Position([3]), Position([0])]) == Remaining((4, 8), 10)
    assert what_remains(Remaining((1, 4), 7), 0, [Position([0]), Position([0])]) == Remaining((1, 4), 7)
    assert what_remains(Remaining(), 0, [Position([0]), Position([0])]) == Remaining()
