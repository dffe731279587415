import dataclasses
import functools
import json
import logging
import operator
import os
import traceback
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loader_cases import length, loader, names, odd_records, records, text_sample

from unigendet import config as settings
from unigendet.config import LoaderConfig
from unigendet.data.datasets import SampleBuilder, read_captions, read_detection
from unigendet.data.loader import Loader, Source
from unigendet.data.quickstart import data_config
from unigendet.model.autoencoder import build_autoencoder
from unigendet.packing import ConditionDropout, PackedBatch

# Three workers on a machine of two cores are what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("lookahead", [0, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_are_disjoint_and_complete(workers, world_size, lookahead):
    """Over one and two epochs, all ranks and workers together read each record exactly so often."""
    a, b = odd_records("a", 23), odd_records("b", 8)
    for epochs in (1, 2):
        read = Counter()
        for rank in range(world_size):
            part = {"rank": rank, "world_size": world_size, "epochs": epochs, "lookahead": lookahead}
            for pack in names(loader(a, b, workers=workers, **part)):
                read.update(pack)
        assert read == Counter({name: epochs for name, _ in a + b})


def test_workers_read_different_records():
    packs = names(islice(loader(records("a", 60), workers=3), 6))
    flat = [name for pack in packs for name in pack]
    assert len(set(flat)) == len(flat) == 24


def test_order_depends_on_seed_and_epoch():
    def order(**kwargs):
        return functools.reduce(operator.iadd, names(loader(records("a", 20), epochs=2, **kwargs)), [])

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    assert sorted(order(seed=1)[:20]) == sorted(order(seed=1)[20:])
    assert order(seed=1)[:20] != order(seed=1)[20:]
    assert order(shuffle=False)[:20] == [f"a{i}" for i in range(20)]


def test_weights_hold_at_every_moment():
    stream = loader(
        Source(records("d", 50), text_sample, 5.0), Source(records("g", 50), text_sample, 1.0), max_tokens=60
    )
    drawn = Counter()
    for pack in names(islice(stream, 40)):
        drawn.update(name[0] for name in pack)
        assert abs(drawn["d"] - 5 * drawn["g"]) <= 5
    assert drawn == {"d": 200, "g": 40}


def test_packs_are_greedy_and_within_budget():
    sizes = [int(n) for n in np.random.default_rng(0).integers(3, 40, 200)]
    source = [(f"a{i}", n) for i, n in enumerate(sizes)]
    packs = list(loader(source, epochs=1, shuffle=False, max_tokens=50))
    for pack, after in zip(packs, [*packs[1:], None], strict=True):
        total = sum(map(length, pack))
        assert total <= 50
        if after is not None:
            assert total + length(after[0]) > 50
    assert [s.name for pack in packs for s in pack] == [name for name, _ in source]


def test_too_long_samples_are_left_out_and_named(caplog):
    source = [*records("a", 5), ("huge", 31), *records("b", 5)]
    stream = loader(source, epochs=2, max_sample_tokens=30)
    with caplog.at_level(logging.WARNING, "unigendet.data.loader"):
        read = Counter(functools.reduce(operator.iadd, names(stream), []))
    assert "huge" not in read
    assert sum(read.values()) == 20
    assert stream.skipped == 2
    assert next(r.getMessage() for r in caplog.records).startswith(
        "sample huge has 31 tokens, more than loader.max_sample_tokens = 30"
    )
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_left_out_at_the_very_end_count(workers):
    stream = loader([*records("a", 5), ("huge", 31)], epochs=1, max_sample_tokens=30, shuffle=False, workers=workers)
    list(stream)
    assert stream.skipped == 1


def test_a_stream_of_nothing_but_long_samples_ends():
    with pytest.raises(ValueError, match=r"loader.max_sample_tokens is 30; the last 8 samples of source, which has 4"):
        next(iter(loader(records("a", 4, 31), max_sample_tokens=30)))


def test_a_source_of_nothing_but_long_samples_is_an_error_beside_others():
    """Or the others would be trained on alone, and not in the mixture that was asked for."""
    long = Source(records("b", 3, 31), text_sample, name="b.json")
    with pytest.raises(ValueError, match=r"the last 6 samples of b\.json, which has 3, were all longer"):
        list(islice(loader(records("a", 9), long, max_sample_tokens=30), 20))
    mixed = Source([*records("b", 3, 31), ("short", 5)], text_sample, name="b.json")
    stream = loader(records("a", 9), mixed, max_sample_tokens=30)
    assert sum(pack.count("short") for pack in names(islice(stream, 20))) > 3


@pytest.mark.parametrize("lookahead", [0, 5])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 5])
def test_resuming_is_exact(workers, stop, lookahead):
    source = odd_records("a", 60, most=29)

    def make():
        settings = {"max_tokens": 50, "max_sample_tokens": 28, "seed": 3, "lookahead": lookahead}
        return loader(source, records("b", 7), workers=workers, **settings)

    straight = make()
    want = names(islice(straight, 16))
    first = make()
    assert names(islice(first, stop)) == want[:stop]
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert names(islice(second, 16 - stop)) == want[stop:]
    assert second.state_dict() == straight.state_dict()
    assert names(islice(first, 16 - stop)) == want[stop:]  # a new iteration of the same loader goes on, too


def test_resuming_near_the_end_with_uneven_workers():
    source = records("a", 21)

    def make():
        return loader(source, workers=3, max_tokens=20, epochs=1)

    want = names(make())
    for stop in range(1, len(want)):
        first, second = make(), make()
        list(islice(first, stop))
        second.load_state_dict(first.state_dict())
        assert names(second) == want[stop:]


def test_a_position_of_other_settings_is_refused():
    state = loader(records("a", 5)).state_dict()
    for other, what in (
        (
            loader(records("a", 6)),
            r"source 0 is 'source' \(6 records, weight 1\), saved with 'source' \(5 records, weight 1\)$",
        ),
        (loader(records("a", 5), records("a", 5)), "the number of sources is 2, saved with 1$"),
        (loader(records("a", 5), seed=1), "loader.seed is 1, saved with 0$"),
        (
            loader(records("a", 5), lookahead=2, max_tokens=50),
            "loader.max_tokens is 50, saved with 40; loader.max_sample_tokens is .*; loader.lookahead is 2, saved with",
        ),
    ):
        with pytest.raises(ValueError, match=f"does not fit this loader: {what}"):
            other.load_state_dict(state)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="sources is empty"):
        loader()
    with pytest.raises(ValueError, match="records is empty"):
        Source([], text_sample)
    with pytest.raises(ValueError, match="weight is 0"):
        Source([1], text_sample, 0)
    with pytest.raises(ValueError, match="rank is 2"):
        loader(records("a", 1), rank=2, world_size=2)
    with pytest.raises(ValueError, match="epochs is 0"):
        loader(records("a", 1), epochs=0)
    with pytest.raises(ValueError, match=r"loader.max_sample_tokens is 50; it must be in 1..max_tokens \(40\)"):
        LoaderConfig(40, 50)


def test_cache_builds_each_sample_once():
    built = Counter()

    def build(record):
        built[record[0]] += 1
        return text_sample(record)

    stream = loader(Source(records("a", 9), build), cache=True)
    first = names(islice(stream, 4))
    list(islice(stream, 12))
    assert len(built) == 9
    assert set(built.values()) == {1}
    assert first == names(islice(loader(records("a", 9)), 4))


def broken(record):
    raise OSError(f"cannot read {record[0]}")


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_not_swallowed(workers):
    """One of the data reaches the consumer as it is, out of a worker too, and names its record."""
    stream = loader(Source([("a0", 5)], broken, name="a.json"), workers=workers)
    with pytest.raises(OSError, match="cannot read a0") as caught:
        list(stream)
    assert (str(caught.value), caught.value.__notes__) == ("cannot read a0", ["a.json, record 0"])


def wrong(record):
    raise KeyError("a programming error")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_programming_error_keeps_its_traceback(workers):
    with pytest.raises(KeyError, match="a programming error") as caught:
        list(loader(Source([("a0", 5)], wrong), workers=workers))
    shown = "".join(traceback.format_exception(caught.value))
    assert "in wrong" in shown


@pytest.fixture(scope="module")
def parts(quickstart, tokenizer):
    model = settings.quickstart(vocab_size=512)
    builder = SampleBuilder(model, tokenizer, data_config(), encode=build_autoencoder(model.latent).encode)
    return model, builder, read_detection(quickstart.train_detection), read_captions(quickstart.train_captions)


def gduf(parts, **kwargs):
    model, builder, detection, captions = parts
    sources = [
        Source(detection, builder.detection, 5, "detection"),
        Source(captions, builder.generation, 1, "captions"),
    ]
    config = LoaderConfig(1000, 200, num_workers=kwargs.pop("workers", 0), cache=True)
    return Loader(sources, config, length=builder.length, model=model, dropout=ConditionDropout(text=0.5), **kwargs)


def same(a, b):
    return (
        all(
            torch.equal(getattr(a, f), getattr(b, f))
            for f in ("text_ids", "latents", "vit_patches", "labels", "source_rows")
        )
        and a.names == b.names
    )


def test_gduf_packs(parts):
    stream = gduf(parts)
    packs = list(islice(stream, 6))
    assert all(isinstance(p, PackedBatch) for p in packs)
    assert all(900 < p.layout.num_queries <= 1000 for p in packs)
    generation = sum(int(p.noised_images.sum()) for p in packs)
    labelled = sum(len(p.labels) for p in packs)
    assert 4.5 < labelled / generation < 5.5
    # resuming in the middle repeats the condition dropout, too
    again, resumed = gduf(parts), gduf(parts)
    list(islice(again, 2))
    resumed.load_state_dict(again.state_dict())
    assert all(same(a, b) for a, b in zip(islice(resumed, 4), packs[2:], strict=True))


def test_workers_pack_what_the_process_itself_would(parts):
    inside, outside = gduf(parts), gduf(parts, workers=1)
    assert all(same(a, b) for a, b in zip(islice(inside, 3), islice(outside, 3), strict=True))


def test_diga_packs_share_their_images(parts):
    model, builder, _, captions = parts
    config = LoaderConfig(600, 200)
    make = lambda **kwargs: Loader(  # noqa: E731
        [Source(captions, builder.generation_with_teacher)], config, length=builder.length, model=model, **kwargs
    )
    student, teacher = next(iter(make(dropout=ConditionDropout(text=1.0))))
    assert student.layout.num_queries <= 600
    assert student.names == teacher.names
    assert torch.equal(student.latents, teacher.latents)
    assert student.noised_images.all()
    assert not teacher.noised_images.any()
    assert len(teacher.vit_sizes) == len(student.latent_sizes) > 15
    assert len(student.text_ids) == 2 * len(student.names)  # every caption dropped, only the image delimiters left
    assert len(teacher.text_ids) > 6 * len(teacher.names)  # the teacher drops nothing


def test_condition_dropout_is_drawn_anew_for_every_pack(parts):
    model, builder, _, captions = parts
    config = LoaderConfig(30, 30)  # one generation sample per pack
    stream = Loader(
        [Source(captions, builder.generation)],
        config,
        length=builder.length,
        model=model,
        dropout=ConditionDropout(text=0.5),
    )
    kept = [len(pack.text_ids) > 2 for pack in islice(stream, 100)]
    assert 30 < sum(kept) < 70
    assert kept[:50] != kept[50:]


def test_encoding_in_the_consuming_process(parts):
    model, builder, _, captions = parts
    late = SampleBuilder(model, builder.tokenizer, data_config())
    packs = []
    for b, kwargs in ((builder, {}), (late, {"encode": lambda pixels: pixels.clone()})):
        source = Source(captions, b.generation_with_teacher)
        config = LoaderConfig(300, 200, num_workers=1)
        packs.append(next(iter(Loader([source], config, length=b.length, model=model, **kwargs))))
    assert all(same(a, b) for a, b in zip(*packs, strict=True))


def test_only_encoding_is_left_to_the_consuming_process(parts):
    """With an autoencoder that runs there, images are still decoded, resized and tokenized by the workers."""
    model, builder, _, captions = parts
    late = SampleBuilder(model, builder.tokenizer, data_config())

    def build(record):
        sample = late.generation(record)
        return dataclasses.replace(sample, name=f"{os.getpid()}")

    encoded = []

    def encode(pixels):
        encoded.append(os.getpid())
        return pixels.clone()

    stream = Loader(
        [Source(captions, build)], LoaderConfig(300, 200, num_workers=2), length=late.length, model=model, encode=encode
    )
    packs = list(islice(stream, 2))
    builders = {name for pack in packs for name in pack.names}
    assert len(builders) == 2
    assert str(os.getpid()) not in builders
    assert encoded == [os.getpid()] * sum(len(pack.names) for pack in packs)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_time_of_encoding(parts, workers, monkeypatch):
    """All that encodings take, and packing in this process, but nothing of the workers' part."""
    model, builder, _, captions = parts
    late = SampleBuilder(model, builder.tokenizer, data_config())
    clock = [50.0]
    monkeypatch.setattr("unigendet.data.loader.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def spend(seconds, value):
        clock[0] += seconds
        return value

    def make(**options):
        source = Source(captions, lambda record: spend(8.0, late.generation(record)))
        return Loader([source], LoaderConfig(300, 200, num_workers=workers), length=late.length, **options)

    alone = make()
    list(islice(alone, 2))
    assert alone.encode_seconds is None
    stream = make(model=model, encode=lambda pixels: spend(0.5, pixels.clone()))
    stream._packer = lambda items, *where, packer=stream._packer: spend(0.25, packer(items, *where))
    assert stream.encode_seconds == 0.0
    want = 0.0
    for pack in islice(stream, 3):
        want += 0.5 * len(pack.names) + 0.25
        assert stream.encode_seconds == want


def test_spawned_workers(parts):
    model, builder, detection, _ = parts
    source = Source(detection[:50], builder.detection)
    config = LoaderConfig(300, 200, num_workers=1)
    make = lambda **kwargs: Loader([source], config, length=builder.length, model=model, **kwargs)  # noqa: E731
    assert same(next(iter(make(start_method="spawn"))), next(iter(make())))
