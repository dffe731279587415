"""Packs against a plain walk over the segments, token by token; condition dropout, cached packs."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import BEGIN, BOS, CONFIG, END, EOS, image

from unigendet.packing import (
    ConditionDropout,
    LatentImage,
    Sample,
    Text,
    VitImage,
    pack,
    patchify,
    sample_length,
    segment_length,
)


@dataclasses.dataclass(frozen=True)
class Token:
    kind: str  # "text", "vit" or "latent"
    value: object  # token id, or the numbers of the patch
    position: int
    target: int | None = None  # what it must predict
    table: int | None = None  # row of the position table
    noised: bool = False


def patch_numbers(image, patch, row, column):
    """The numbers of one patch: row in patch, column in patch, channel."""
    return [
        float(image[c, row * patch + i, column * patch + j])
        for i in range(patch)
        for j in range(patch)
        for c in range(image.shape[0])
    ]


def walk(sample):
    """The tokens of a sample, written from the packing rules."""
    tokens, r = [], 0
    for segment in sample.segments:
        if isinstance(segment, Text):
            ids = [BOS, *segment.ids] + ([EOS] if segment.eos else [])
            for i, token in enumerate(ids):
                target = ids[i + 1] if segment.loss and i + 1 < len(ids) else None
                tokens.append(Token("text", token, r + i, target))
            r += len(ids)
            continue
        vit = isinstance(segment, VitImage)
        image, patch = (segment.pixels, 2) if vit else (segment.latent, 2)
        side, kind = (3, "vit") if vit else (5, "latent")
        noised = not vit and segment.noised
        tokens.append(Token("text", BEGIN, r))
        for row in range(image.shape[1] // patch):
            for column in range(image.shape[2] // patch):
                numbers = patch_numbers(image, patch, row, column)
                tokens.append(Token(kind, numbers, r, table=row * side + column, noised=noised))
        tokens.append(Token("text", END, r))
        r += not noised
    return tokens


def sequence_kinds(batch):
    """For each sequence row, its kind and its row among that kind's embeddings, from source_rows."""
    texts, vits = len(batch.text_ids), len(batch.vit_patches)
    kinds = []
    for source in batch.source_rows[batch.layout.sequence_to_stream].tolist():
        if source < texts:
            kinds.append(("text", source))
        elif source < texts + vits:
            kinds.append(("vit", source - texts))
        else:
            kinds.append(("latent", source - texts - vits))
    return kinds


def latent_numbers(batch):
    """The numbers of each latent token, cut out of ``batch.latents``."""
    numbers, offset = [], 0
    for rows, columns in batch.latent_sizes:
        size = 4 * 4 * rows * columns
        image = batch.latents[offset : offset + size].reshape(4, 2 * rows, 2 * columns)
        numbers += [patch_numbers(image, 2, r, c) for r in range(rows) for c in range(columns)]
        offset += size
    assert offset == batch.latents.numel()
    return numbers


def check(batch, expected):
    """``batch`` holds exactly the tokens ``expected`` (a list per sample)."""
    tokens = [t for sample in expected for t in sample]
    layout = batch.layout
    assert layout.num_queries == len(tokens)
    assert layout.positions.tolist() == [t.position for t in tokens]
    assert batch.text_ids.tolist() == [t.value for t in tokens if t.kind == "text"]
    assert batch.vit_patches.tolist() == [t.value for t in tokens if t.kind == "vit"]
    assert latent_numbers(batch) == [t.value for t in tokens if t.kind == "latent"]
    assert batch.vit_positions.tolist() == [t.table for t in tokens if t.kind == "vit"]
    assert batch.latent_positions.tolist() == [t.table for t in tokens if t.kind == "latent"]
    count = dict.fromkeys(("text", "vit", "latent"), 0)
    for (kind, row), token in zip(sequence_kinds(batch), tokens, strict=True):
        assert (kind, row) == (token.kind, count[kind])  # each kind's embeddings come in sequence order
        count[kind] += 1
    generation = [i for i, t in enumerate(tokens) if t.kind == "latent"]
    understanding = [i for i, t in enumerate(tokens) if t.kind != "latent"]
    to_sequence = layout.stream_to_sequence
    assert to_sequence.tolist() == understanding + generation
    assert to_sequence[batch.vit_rows].tolist() == [i for i, t in enumerate(tokens) if t.kind == "vit"]
    latents = [t for t in tokens if t.kind == "latent"]
    assert batch.noised_tokens.tolist() == [i for i, t in enumerate(latents) if t.noised]
    assert to_sequence[batch.target_rows].tolist() == [i for i, t in enumerate(tokens) if t.target is not None]
    assert batch.targets.tolist() == [t.target for t in tokens if t.target is not None]
    ends = np.cumsum([len(s) for s in expected])
    last = [to_sequence[row].item() if row >= 0 else -1 for row in batch.last_rows.tolist()]
    assert last == [end - 1 if sample else -1 for end, sample in zip(ends, expected, strict=True)]


@st.composite
def samples(draw):
    texts = st.builds(
        Text, st.lists(st.integers(4, 49), max_size=4), loss=st.booleans(), droppable=st.booleans(), eos=st.booleans()
    )
    side = st.integers(1, 3)
    vits = st.builds(lambda h, w, d: VitImage(image(3, h, w), droppable=d), side, side, st.booleans())
    latents = st.builds(
        lambda h, w, n, d: LatentImage(image(4, h, w), noised=n, droppable=d), side, side, st.booleans(), st.booleans()
    )
    segments = draw(st.lists(st.one_of(texts, vits, latents), min_size=1, max_size=5))
    has_answer = any(isinstance(s, Text) and s.loss for s in segments)
    label = draw(st.sampled_from([None, 0, 1])) if has_answer else None
    return Sample(tuple(segments), label)


@given(st.lists(samples(), min_size=1, max_size=3))
def test_tokens_of_random_samples(drawn):
    batch = pack(drawn, CONFIG)
    check(batch, [walk(s) for s in drawn])
    lengths = [sample_length(s, CONFIG) for s in drawn]
    assert lengths == [len(walk(s)) for s in drawn]
    assert batch.layout.cu_seqlens_q.diff().tolist() == lengths


@given(st.lists(samples(), min_size=1, max_size=3))
def test_images_and_labels_of_random_samples(drawn):
    batch = pack(drawn, CONFIG)
    segments = [s for sample in drawn for s in sample.segments]
    latents = [s for s in segments if isinstance(s, LatentImage)]
    vits = [s for s in segments if isinstance(s, VitImage)]
    assert batch.latent_sizes == tuple((s.latent.shape[1] // 2, s.latent.shape[2] // 2) for s in latents)
    assert batch.vit_sizes == tuple((s.pixels.shape[1] // 2, s.pixels.shape[2] // 2) for s in vits)
    assert batch.noised_images.tolist() == [s.noised for s in latents]
    assert batch.latent_image.tolist() == [i for i, (h, w) in enumerate(batch.latent_sizes) for _ in range(h * w)]
    assert (batch.vit_layout is None) == (not vits)
    if vits:
        mask = torch.block_diag(*[torch.ones(h * w, h * w) for h, w in batch.vit_sizes]).bool()
        assert torch.equal(batch.vit_layout.dense_mask(), mask)
    expected, first = [], 0
    for sample in drawn:
        if sample.label is not None:
            before = 0
            for segment in sample.segments:
                if isinstance(segment, Text) and segment.loss:
                    break
                before += segment_length(segment, CONFIG)
            expected.append(first + before)
        first += sample_length(sample, CONFIG)
    assert batch.layout.stream_to_sequence[batch.label_rows].tolist() == expected
    assert batch.labels.tolist() == [s.label for s in drawn if s.label is not None]
    row_ids = [batch.text_ids[batch.source_rows[row]].item() for row in batch.label_rows]
    assert row_ids == [BOS] * len(expected)


def test_modes_of_the_splits():
    sample = Sample(
        (Text([5]), LatentImage(image(4, 1, 1)), VitImage(image(3, 1, 1)), LatentImage(image(4, 1, 1), noised=True))
    )
    assert pack([sample], CONFIG).layout.splits.unflatten(0, (-1, 7))[:, :3].tolist() == [
        [0, 0, 3],
        [1, 3, 6],
        [1, 6, 9],
        [2, 9, 12],
    ]


def test_a_text_of_no_tokens():
    batch = pack([Sample((Text([], loss=True),)), Sample((Text([], loss=True, eos=False), Text([])))], CONFIG)
    assert batch.text_ids.tolist() == [BOS, EOS, BOS, BOS, EOS]
    assert batch.targets.tolist() == [EOS]
    assert batch.target_rows.tolist() == [0]


@given(samples(), samples(), st.data())
def test_a_cached_pack_is_the_tail_of_the_whole(first, second, data):
    first, second = (dataclasses.replace(s, label=None) for s in (first, second))
    cached = []
    for sample in (first, second):
        allowed, offset = [0], 0
        for segment in sample.segments:
            length = segment_length(segment, CONFIG)
            allowed += range(offset, offset + length + 1) if isinstance(segment, Text) else [offset + length]
            offset += length
        cached.append(data.draw(st.sampled_from(sorted(set(allowed)))))
    lengths = [sample_length(s, CONFIG) for s in (first, second)]
    if cached == lengths:
        with pytest.raises(ValueError, match="cached covers every token of every sample"):
            pack([first, second], CONFIG, cached=cached)
        return
    capacity = [n + 2 for n in lengths]
    batch = pack([first, second], CONFIG, cached=cached, capacity=capacity)
    check(batch, [walk(s)[n:] for s, n in zip((first, second), cached, strict=True)])
    whole = pack([first, second], CONFIG, capacity=capacity).layout
    new = [i for i, row in enumerate(whole.key_rows.tolist()) if row in set(batch.layout.key_rows.tolist())]
    assert torch.equal(batch.layout.dense_mask(), whole.dense_mask()[new])
    assert torch.equal(batch.layout.positions, whole.positions[new])


def test_cached_whole_images_alone_is_an_error():
    with pytest.raises(ValueError, match="cached covers every token of every sample"):
        pack([Sample((VitImage(image(3, 1, 2)),))], CONFIG, cached=[4])


def test_dropped_images_advance_the_position_and_dropped_texts_vanish():
    sample = Sample(
        (
            Text([5, 6], droppable=True),
            VitImage(image(3, 1, 2), droppable=True),
            LatentImage(image(4, 1, 1), droppable=True),
            Text([7]),
        )
    )
    kept = sample.segments[3:]
    batch = pack([sample], CONFIG, dropout=ConditionDropout(1, 1, 1), rng=np.random.default_rng(0))
    check(batch, [[dataclasses.replace(t, position=t.position + 2) for t in walk(Sample(kept))]])
    only_text = pack([sample], CONFIG, dropout=ConditionDropout(1, 0, 0), rng=np.random.default_rng(0))
    check(only_text, [walk(Sample(sample.segments[1:]))])
    nothing = pack([sample], CONFIG, dropout=ConditionDropout(0, 0, 0), rng=np.random.default_rng(0))
    check(nothing, [walk(sample)])
    check(pack([sample], CONFIG), [walk(sample)])


def test_what_has_a_loss_or_is_not_droppable_is_never_dropped():
    sample = Sample(
        (
            Text([5]),
            VitImage(image(3, 1, 1)),
            LatentImage(image(4, 1, 1)),
            LatentImage(image(4, 2, 1), noised=True, droppable=True),
            Text([6], loss=True, droppable=True),
        ),
        label=1,
    )
    batch = pack([sample], CONFIG, dropout=ConditionDropout(1, 1, 1), rng=np.random.default_rng(0))
    check(batch, [walk(sample)])


def test_rates_of_dropout():
    """Each kind is dropped at its own rate, independently, and the same seed drops the same."""
    sample = Sample(
        (
            Text([5], droppable=True),
            VitImage(image(3, 1, 1), droppable=True),
            LatentImage(image(4, 1, 1), droppable=True),
            Text([9, 9, 9]),
        )
    )
    runs = 2000
    batch = pack([sample] * runs, CONFIG, dropout=ConditionDropout(), rng=np.random.default_rng(7))
    lengths = batch.layout.cu_seqlens_q.diff()
    texts = (batch.text_ids == 5).sum().item()
    kept = {"text": texts, "vit": len(batch.vit_sizes), "latent": len(batch.latent_sizes)}
    for name, rate in (("text", 0.1), ("vit", 0.3), ("latent", 0.3)):
        deviation = (runs * rate * (1 - rate)) ** 0.5
        assert abs(runs - kept[name] - runs * rate) < 4 * deviation, name
    all_dropped = (lengths == 5).sum().item()
    expected = runs * 0.1 * 0.3 * 0.3
    assert abs(all_dropped - expected) < 4 * expected**0.5
    again = pack([sample] * runs, CONFIG, dropout=ConditionDropout(), rng=np.random.default_rng(7))
    assert torch.equal(again.layout.splits, batch.layout.splits)
    other = pack([sample] * runs, CONFIG, dropout=ConditionDropout(), rng=np.random.default_rng(8))
    assert not torch.equal(other.layout.cu_seqlens_q, batch.layout.cu_seqlens_q)


@settings(max_examples=20)
@given(samples(), st.integers(0, 9))
def test_dropout_of_random_samples(sample, seed):
    """Dropping is leaving out segments, with the positions of the dropped images kept free."""
    dropout = ConditionDropout(0.5, 0.5, 0.5)
    sample = Sample((*sample.segments, Text([4])), sample.label)
    batch = pack([sample], CONFIG, dropout=dropout, rng=np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    expected, shift, before = [], 0, []
    for segment in sample.segments:
        has_loss = segment.loss if isinstance(segment, Text) else getattr(segment, "noised", False)
        dropped = segment.droppable and rng.random() < (0 if has_loss else 0.5)
        if dropped:
            shift += not isinstance(segment, Text)
            continue
        before.append(segment)
        tail = walk(Sample(tuple(before)))[len(expected) :]
        expected += [dataclasses.replace(t, position=t.position + shift) for t in tail]
    check(batch, [expected])


def test_moving_a_batch():
    batch = pack([Sample((Text([5]), VitImage(image(3, 1, 2)), LatentImage(image(4, 1, 1))), name="a")], CONFIG)
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", field.name
            assert value.shape == getattr(batch, field.name).shape
    assert moved.layout.device.type == moved.vit_layout.device.type == "meta"
    assert moved.layout.stream_lengths.device.type == "cpu"
    assert moved.names == ("a",)
    assert batch.to("cpu").layout is batch.layout


@pytest.mark.gpu
def test_pinning_a_batch():
    batch = pack([Sample((Text([5]), VitImage(image(3, 1, 2)), LatentImage(image(4, 1, 1))))], CONFIG)
    pinned = batch.pin_memory()
    assert pinned.text_ids.is_pinned()
    assert pinned.layout.positions.is_pinned()
    assert pinned.to("cuda", non_blocking=True).text_ids.tolist() == batch.text_ids.tolist()


def test_dtypes_and_a_pack_without_images():
    batch = pack([Sample((Text([5]),))], CONFIG)
    assert batch.vit_patches.shape == (0, 12)
    assert batch.latents.shape == (0,)
    assert batch.vit_layout is None
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            wanted = torch.float32 if field.name in ("vit_patches", "latents") else torch.int64
            assert value.dtype == (torch.bool if field.name == "noised_images" else wanted), field.name


def test_patchify():
    numbers = image(3, 2, 3)
    expected = [patch_numbers(numbers, 2, r, c) for r in range(2) for c in range(3)]
    assert patchify(numbers, 2).tolist() == expected


def test_samples_are_not_changed():
    latent, ids = image(4, 1, 1), [5, 6]
    copy = latent.clone()
    batch = pack([Sample((Text(ids), LatentImage(latent)))], CONFIG)
    batch.latents.zero_()
    assert ids == [5, 6]
    assert torch.equal(latent, copy)
