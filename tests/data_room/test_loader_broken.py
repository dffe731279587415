"""Broken images: left out, counted, named once, and the end of the run above a limit."""

import functools
import logging
import operator
from collections import Counter
from itertools import islice

import pytest
from loader_cases import loader, names, records, text_sample

from unigendet.data.loader import Loader, Source
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
    assert "in rank 0's part of the data; loader.max_broken allows" in caught.value.__notes__[-1]
    after = loader(source(30, LOST + TORN), max_broken=4, epochs=2, seed=3)
    after.load_state_dict(Loader.merge_states([one.state_dict() for one in ranks]))
    assert after.broken == 5  # a rank that takes over knows them all
    assert len(flat(after)) == 30


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
