"""Broken images: left out, counted, named once, and the end of the run above a limit."""

import functools
import json
import logging
import operator
from collections import Counter
from itertools import islice

import pytest
from loader_cases import loader, names, records, text_sample

from unigendet.data.loader import Loader, Source, share_of_counts
from unigendet.data.transforms import read_image

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def build(record):
    """A sample; a record of ``lost`` or ``torn`` images is met as the image reader meets them."""
    name, _ = record
    if name.startswith("lost"):
        read_image(f"/nowhere/{name}.png")
    if name.startswith("torn"):
        read_image(__file__)
    return text_sample(record)


def source(good, bad, name="a.json"):
    return Source([*records("good", good), *bad], build, name=name)


LOST = records("lost", 3)
TORN = records("torn", 2)


def flat(packs):
    return functools.reduce(operator.iadd, names(packs), [])


def broken_lines(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_left_out_counted_and_named_once(workers, lookahead, caplog):
    stream = loader(source(20, LOST + TORN), workers=workers, epochs=3, max_broken=5, lookahead=lookahead)
    with caplog.at_level(logging.WARNING, "unigendet.data.loader"):
        read = Counter(flat(stream))
    assert read == Counter({f"good{i}": 3 for i in range(20)})
    assert stream.broken == 5
    lines = broken_lines(caplog)
    assert len(lines) == 5  # over three epochs, by whichever worker
    assert sum("image /nowhere/lost" in line and "image_root says where" in line for line in lines) == 3
    assert sum("cannot be decoded" in line for line in lines) == 2
    assert all(line.count("a.json, record") == 1 for line in lines)
    assert [line[line.rindex("left out") :] for line in lines] == [f"left out ({i} of at most 5)" for i in range(1, 6)]


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("most", [0, 1, 4])
def test_one_too_many_stops_the_run(workers, most):
    """All workers of a process are counted together."""
    stream = loader(source(30, LOST + TORN), workers=workers, max_broken=most)
    with pytest.raises((ValueError, FileNotFoundError), match=r"^image ") as caught:
        list(islice(stream, 60))
    place, limit = caught.value.__notes__
    assert place.startswith("a.json, record 3")  # 30 to 34
    assert limit == f"{most + 1} broken image{'s' * (most > 0)}; loader.max_broken allows {most}"
    assert stream.broken == most + 1


def test_a_stream_of_nothing_but_broken_images_ends():
    """In the process and in a worker, which would never come to the end of a pack."""
    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match=r"lost\d.png does not exist") as caught:
            next(iter(loader(source(0, LOST), workers=workers)))
        assert caught.value.__notes__[-1] == "so are all 3 images of a.json"
        with pytest.raises(FileNotFoundError) as caught:
            next(iter(loader(source(0, records("lost", 400)), workers=workers)))
        assert caught.value.__notes__[-1] == "101 broken images; loader.max_broken allows 100"


def test_a_source_of_nothing_but_broken_images_is_an_error_beside_others():
    with pytest.raises(FileNotFoundError) as caught:
        list(islice(loader(records("a", 9), source(0, LOST, "b.json")), 20))
    assert caught.value.__notes__[-1] == "so are all 3 images of b.json"


def test_broken_and_too_long_together_leave_nothing():
    stream = loader(source(0, [*LOST, ("long", 31)]), max_sample_tokens=30)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        next(iter(stream))
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "the last 8 samples of a.json, which has 4, were all" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_count(workers, caplog):
    def make():
        return loader(source(20, LOST + TORN), workers=workers, max_broken=4, seed=2)

    first = make()
    steps = 0
    while first.broken < 3:
        list(islice(first, 1))
        steps += 1
    second = make()
    second.load_state_dict(Loader.merge_states([first.state_dict()]))
    assert second.broken == first.broken
    caplog.clear()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list(islice(second, 60))
    assert caught.value.__notes__[-1] == "5 broken images; loader.max_broken allows 4"
    assert len(broken_lines(caplog)) == 4 - first.broken
    # in all epochs to come those that are known do not count again
    known = loader(source(20, LOST + TORN), workers=workers, max_broken=5, seed=2)
    known.load_state_dict(first.state_dict())
    assert len(list(islice(known, 60))) == 60


def test_ranks_count_for_themselves():
    ranks = [loader(source(30, LOST + TORN), rank=r, world_size=2, max_broken=4, epochs=1, seed=3) for r in range(2)]
    for one in ranks:
        list(one)
    assert sum(one.broken for one in ranks) == 5
    assert 0 < ranks[0].broken < 5
    one_too_many = loader(source(30, LOST + TORN), rank=0, world_size=2, max_broken=ranks[0].broken - 1, seed=3)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list(islice(one_too_many, 60))
    met, most = one_too_many.broken, one_too_many.config.max_broken
    assert met == most + 1
    said = f"{met} broken image{'s' * (met > 1)} counted by rank 0; loader.max_broken allows {most}"
    assert caught.value.__notes__[-1] == said


def position(ranks):
    return json.loads(json.dumps(Loader.merge_states([one.state_dict() for one in ranks])))


def resumed(state, world_size, data, workers=0, **settings):
    ranks = [loader(data, rank=r, world_size=world_size, workers=workers, **settings) for r in range(world_size)]
    for one in ranks:
        one.load_state_dict(state)
    return ranks


MANY = source(120, records("lost", 30))


@pytest.mark.parametrize(("world_size", "workers", "counts"), [
    (1, 0, [8]), (2, 0, [8, 8]), (3, 0, [8, 8, 7]), (4, 2, None), (7, 0, [5, 5, 4, 4, 4, 4, 4]),
])  # fmt: skip
def test_what_is_known_is_apart_from_what_counts(world_size, workers, counts, caplog):
    """Ranks within the limit go on within it, whatever their number, and nobody reports an image again."""
    first = [loader(MANY, rank=r, world_size=4, max_broken=30, epochs=1, seed=1) for r in range(4)]
    for one in first:
        list(one)
    before = [one.broken for one in first]
    assert sum(before) == 30
    assert sorted(before, reverse=True) != [8, 8, 7, 7]
    state, settings = position(first), {"max_broken": max(before), "epochs": 3, "seed": 1}
    same = resumed(state, 4, MANY, **settings)
    assert [one.broken for one in same] == before
    assert position(same) == state
    ranks = resumed(state, world_size, MANY, workers, **settings)
    caplog.clear()
    assert [one.broken for one in ranks] == (counts or before)
    assert sum(len(flat(one)) for one in ranks) == 240
    assert [one.broken for one in ranks] == (counts or before)
    assert not caplog.records
    again = resumed(position(ranks), world_size, MANY, workers, **settings)
    assert position(again) == position(ranks)


def test_shares_by_hand():
    def shares(counts, world_size):
        return [share_of_counts(counts, rank, world_size) for rank in range(world_size)]

    assert shares([7, 7, 10, 4], 4) == [7, 7, 10, 4]
    assert shares([7, 7, 10, 4], 2) == [7, 7]
    assert shares([7, 7, 11, 4], 2) == [8, 7]
    assert shares([7, 7, 10, 4], 8) == [4, 4, 4, 4, 3, 3, 3, 3]
    assert shares([0, 12], 1) == [6]
    assert shares([2], 3) == [1, 1, 0]


def test_new_ones_count_on_top_of_a_share():
    """As many more as the limit leaves room for, and the error says whose count it is."""
    first = [loader(source(40, LOST), rank=r, world_size=2, max_broken=9, epochs=1, seed=4) for r in range(2)]
    for one in first:
        list(one)
    state = position(first)
    found = [one["counted"] for one in state["ranks"]]
    assert found == [len(one["broken"]) for one in state["ranks"]]
    assert sum(found) == 3
    gone = source(0, [*records("lost", 40), *LOST])  # as if the other 40 had been moved meanwhile
    ranks = resumed(state, 3, gone, max_broken=5, seed=4)
    assert [one.broken for one in ranks] == [1, 1, 1]
    for rank, one in enumerate(ranks):
        with pytest.raises(FileNotFoundError) as caught:
            list(one)
        assert caught.value.__notes__[-1] == f"6 broken images counted by rank {rank}; loader.max_broken allows 5"


def test_a_position_without_counts():
    """Written before there were any: each rank counted all that it knew."""
    first = [loader(source(30, LOST + TORN), rank=r, world_size=2, epochs=1, seed=3) for r in range(2)]
    for one in first:
        list(one)
    state = position(first)
    for one in state["ranks"]:
        del one["counted"]
    met = [one.broken for one in first]
    assert [one.broken for one in resumed(state, 2, source(30, LOST + TORN), seed=3)] == met
    assert [one.broken for one in resumed(state, 5, source(30, LOST + TORN), seed=3)] == [1] * 5


def test_an_image_that_breaks_while_its_sample_waits(tmp_path):
    """On resuming, what waited is made again."""
    gone = tmp_path / "gone"

    def vanishing(record):
        if record[0] == "a1" and gone.exists():
            read_image(gone / "a1.png")
        return text_sample(record)

    def make():
        data = Source([("a0", 30), ("a1", 25), ("a2", 8), ("a3", 20)], vanishing)
        return loader(data, shuffle=False, lookahead=2, epochs=1, max_broken=1)

    first = make()
    assert names(islice(first, 1)) == [["a0", "a2"]]
    gone.mkdir()
    second = make()
    second.load_state_dict(first.state_dict())
    assert names(second) == [["a3"]]
    assert second.broken == 1


def test_other_errors_are_not_swallowed():
    """Only images may be broken: a text that is none stops the run at once."""

    def odd(record):
        raise ValueError("no Unicode text")

    with pytest.raises(ValueError, match="no Unicode text"):
        next(iter(loader(Source(records("a", 3), odd), max_broken=9)))
