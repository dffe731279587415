"""First-fit packing with a look-ahead buffer: fuller packs, nothing lost, nobody waits without end."""

from collections import Counter
from itertools import islice

import pytest
from loader_cases import length, loader, names, odd_records, text_sample

from unigendet.data.loader import Source


def waits(sizes, lookahead, **kwargs):
    """The packs of one epoch of samples of these sizes, and for each sample how many packs after the one for which it
    was made it came.
    """
    made, packs = {}, []

    def build(record):
        made[record[0]] = len(packs)  # the loader makes nothing ahead of the pack that is asked for
        return text_sample(record)

    source = Source([(f"a{i}", n) for i, n in enumerate(sizes)], build)
    stream = loader(source, epochs=1, shuffle=False, lookahead=lookahead, **kwargs)
    for pack in stream:
        packs.append(pack)
    return packs, {sample.name: i - made[sample.name] for i, pack in enumerate(packs) for sample in pack}


def fill(packs, max_tokens):
    return sum(sum(map(length, pack)) for pack in packs) / (len(packs) * max_tokens)


@pytest.mark.parametrize("lookahead", [0, 1, 3, 8])
def test_a_sample_waits_for_lookahead_and_one_packs_at_most(lookahead):
    """Also where nearly nothing fits beside anything, so that all that has found no room has to be taken one by one."""
    longest = 0
    for sizes in ([n for _, n in odd_records("a", 300)], [21] * 60, [21, 40, 21, 3] * 30, [40] + [21, 19] * 60):
        packs, waited = waits(sizes, lookahead)
        assert len(waited) == len(sizes)
        assert all(sum(map(length, pack)) <= 40 for pack in packs)
        longest = max(longest, *waited.values())
    assert longest == lookahead + 1


def test_the_oldest_comes_first():
    packs, _ = waits([30, 25, 8, 20, 15, 9], 2)
    assert names(packs) == [["a0", "a2"], ["a1", "a4"], ["a3", "a5"]]


def test_packs_are_fuller():
    sizes = [n for _, n in odd_records("a", 2000, least=70, most=280)]
    every = [waits(sizes, lookahead, max_tokens=1000)[0] for lookahead in (0, 2, 8, 32)]
    fills = [fill(packs[:-10], 1000) for packs in every]  # at the end there is nothing left to choose from
    assert fills == sorted(fills)
    assert fills[0] < 0.92
    assert fills[-1] > 0.96


def test_every_sample_is_made_once():
    """Those that find no room are kept, not made again."""
    for lookahead in (0, 4):
        made = Counter()

        def build(record, made=made):
            made[record[0]] += 1
            return text_sample(record)

        source = Source(odd_records("a", 200), build)
        assert sum(map(len, loader(source, epochs=1, lookahead=lookahead))) == 200
        assert set(made.values()) == {1}
        assert len(made) == 200


def test_the_mixture_is_the_same():
    """Look-ahead moves samples between packs; what is drawn, and how much of each source, does not change."""
    a, b = odd_records("a", 90), odd_records("b", 90)
    stream = loader(Source(a, text_sample, 5.0), Source(b, text_sample, 1.0), lookahead=6)
    drawn = Counter()
    for pack in names(islice(stream, 60)):
        drawn.update(name[0] for name in pack)
        assert abs(drawn["a"] - 5 * drawn["b"]) <= 5 * (6 + 1)
    assert drawn["b"] > 20


def test_a_negative_lookahead():
    with pytest.raises(ValueError, match=r"loader.lookahead is -1; it must be at least 0"):
        loader(odd_records("a", 3), lookahead=-1)
