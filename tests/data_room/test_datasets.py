import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from unigendet import config as settings
from unigendet.config import DataConfig, ImageConfig, SpecialTokens
from unigendet.data.datasets import SampleBuilder, encode_latents, read_captions, read_detection
from unigendet.data.quickstart import data_config, read_png
from unigendet.model.autoencoder import build_autoencoder
from unigendet.packing import LatentImage, Sample, Text, VitImage, pack, sample_length

GOOD = {
    "image": "a/b.png",
    "label": 0,
    "cate": "animal",
    "conversations": [
        {"from": "human", "value": "<image>Real or fake?"},
        {"from": "gpt", "value": " This is a fake image. "},
    ],
}


def write(folder, entries):
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


@pytest.fixture
def builder(tokenizer):
    model = settings.quickstart(vocab_size=512)
    return SampleBuilder(model, tokenizer, data_config(), encode=build_autoencoder(model.latent).encode)


def test_reads_fakeclue(tmp_path):
    later = copy.deepcopy(GOOD)
    later["conversations"][0]["value"] = "Real or fake?\n<image>"
    for record in read_detection(write(tmp_path, [GOOD, later]), tmp_path / "root"):
        assert record.image == tmp_path / "root" / "a" / "b.png"
        assert (record.label, record.category) == (0, "animal")
        assert record.question == "Real or fake?"
        assert record.answer == "This is a fake image."
    assert read_detection(tmp_path / "data.json")[0].image == tmp_path / "a" / "b.png"


def change(*path, value=None):
    entry = copy.deepcopy(GOOD)
    target = entry
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (change("label"), r"entry 1 has no field 'label'"),
        (change("label", value=2), r"entry 1, field 'label' is 2; it must be 1 \(real\) or 0 \(fake\)"),
        (change("label", value=True), r"field 'label' is True"),
        (change("label", value="0"), r"field 'label' is '0'"),
        (change("image", value="/etc/x.png"), r"field 'image' is '/etc/x.png'; it must be a path relative to"),
        (
            change("image", value="../x.png"),
            r"field 'image' is '../x.png'; it must be a path below image_root, without",
        ),
        (change("image", value=7), r"field 'image' is 7; it must be a non-empty string"),
        (change("cate"), r"has no field 'cate'"),
        (change("conversations", 1), r"has the speakers \['human'\]"),
        (change("conversations", value=GOOD["conversations"][::-1]), r"has the speakers \['gpt', 'human'\]"),
        (change("conversations", value="text"), r"has the speakers 'text'"),
        (change("conversations", 1, "value", value=" "), r"entry 1, conversations\[1\], field 'value' is ' '"),
        (
            change("conversations", 0, "value", value="<image> "),
            r"conversations\[0\], field 'value' holds nothing beside",
        ),
        ("text", r"entry 1 is a str; it must be an object"),
    ],
)
def test_malformed_entries_are_named(tmp_path, entry, message):
    with pytest.raises(ValueError, match=r"data.json, .*" + message):
        read_detection(write(tmp_path, [GOOD, entry]))


def test_all_that_is_malformed_is_found(tmp_path):
    """Every field of every entry, and the sound entries are there all the same."""
    both = change("label", value=2)
    del both["cate"]
    file, malformed = write(tmp_path, [both, GOOD, 7, change("image", value="/x.png"), GOOD]), []
    records = read_detection(file, None, malformed)
    assert [record.where for record in records] == [f"{file}, entry 1", f"{file}, entry 4"]
    assert [(one.file, one.entry) for one in malformed] == [(str(file), i) for i in (0, 0, 2, 3)]
    for one, reason in zip(malformed, ("field 'label' is 2", "no field 'cate'", "is a int", "'/x.png'"), strict=True):
        assert f"{file}, entry {one.entry}" in one.reason
        assert reason in one.reason
    with pytest.raises(ValueError, match=r"entry 0, field 'label' is 2"):  # strict reading stops at the first of them
        read_detection(file)
    captions, malformed = write(tmp_path, [{"prompt": "a"}, {"image_path": "x.png", "prompt": "a"}]), []
    assert [record.prompt for record in read_captions(captions, None, malformed)] == ["a"]
    assert [one.entry for one in malformed] == [0]
    with pytest.raises(ValueError, match=r"data\.json has no sound entry"):
        read_detection(captions, None, malformed)
    assert len(malformed) == 1 + 2 * 4


def test_absolute_paths(tmp_path):
    """What the message says to do is so."""
    image = tmp_path / "a" / "x.png"
    file = write(tmp_path, [change("image", value=str(image))])
    with pytest.raises(ValueError, match=rf"relative to image_root, which is '{tmp_path}': write 'a/x\.png'"):
        read_detection(file)
    assert read_detection(write(tmp_path, [change("image", value="a/x.png")]))[0].image == image
    file = write(tmp_path, [change("image", value=str(image))])
    below = str(image)[1:]
    with pytest.raises(ValueError, match=rf"is '{tmp_path}/b'; or set image_root to '/' and write '{below}'$"):
        read_detection(file, tmp_path / "b")
    assert read_detection(write(tmp_path, [change("image", value=below)]), "/")[0].image == image


def test_a_byte_order_mark(tmp_path):
    file = write(tmp_path, [GOOD])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_detection(file)[0].label == 0


def test_malformed_files_are_named(tmp_path):
    for content, message in (("{", "is not JSON"), ("{}", "holds a dict"), ("[]", "holds an empty list")):
        with pytest.raises(ValueError, match=r"data.json " + message):
            read_detection(write(tmp_path, content))
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
        read_captions(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"entry 0 has no field 'prompt'"):
        read_captions(write(tmp_path, [{"image_path": "x.png"}]))


def test_detection_sample(quickstart, builder, tokenizer):
    record = read_detection(quickstart.test_detection)[5]
    sample = builder.detection(record)
    latent, vit, question, answer = sample.segments
    levels = read_png(record.image)
    assert isinstance(latent, LatentImage)
    assert not latent.noised
    assert torch.equal(((latent.latent[0] + 1) * 8).round(), torch.from_numpy(levels).float())
    assert isinstance(vit, VitImage)
    assert torch.equal(vit.pixels, latent.latent)
    assert tokenizer.decode(question.ids) == record.question
    assert tokenizer.decode(answer.ids) == record.answer
    assert (question.loss, answer.loss) == (False, True)
    assert not any(s.droppable for s in sample.segments)
    assert (sample.label, sample.name) == (record.label, str(record.image))
    assert builder.detection(record, with_latent=False).segments[0].pixels.equal(vit.pixels)
    assert len(builder.detection(record, with_latent=False).segments) == 3


def test_generation_and_teacher_samples(quickstart, builder, tokenizer, monkeypatch):
    from unigendet.data import datasets

    record = read_captions(quickstart.train_captions)[3]
    opened = []
    monkeypatch.setattr(datasets, "read_image", lambda p, read=datasets.read_image: opened.append(p) or read(p))
    student, teacher = builder.generation_with_teacher(record)
    assert opened == [record.image]  # one decoding for both
    caption, noised = student.segments
    assert isinstance(caption, Text)
    assert caption.droppable
    assert not caption.loss
    assert tokenizer.decode(caption.ids) == record.prompt
    assert (noised.noised, noised.droppable) == (True, False)
    clean, prompt, vit = teacher.segments
    assert clean.latent is noised.latent
    assert not clean.noised
    assert record.prompt in tokenizer.decode(prompt.ids)
    assert not any(s.droppable for s in teacher.segments)
    assert vit.pixels.shape == (1, 8, 8)
    for alone, both in ((builder.generation(record), student), (builder.teacher(record), teacher)):
        assert alone.segments[-1].__class__ is both.segments[-1].__class__
        assert builder.length(alone) == builder.length(both) == sample_length(both, builder.model)


def test_a_caption_with_braces(tmp_path, builder):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (record,) = read_captions(write(tmp_path, [{"image_path": "x.png", "prompt": "a {caption} {0}"}]))
    text = builder.tokenizer.decode(builder.teacher(record).segments[1].ids)
    assert text.endswith("a {caption} {0}")


def test_each_view_comes_from_the_original(tmp_path, tokenizer):
    """Views of different sizes equal what resizing the original directly gives."""
    model = settings.quickstart(vocab_size=512)
    data = DataConfig(latent_view=ImageConfig(4, 4, 2), vit_view=ImageConfig(8, 8, 2))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    latent, vit = SampleBuilder(model, tokenizer, data).views(image)
    small, large = (image.resize((n, n), Image.Resampling.BICUBIC) for n in (4, 8))
    assert torch.allclose(latent[0], torch.from_numpy(np.asarray(small, np.float32)) / 127.5 - 1, atol=1e-6)
    assert torch.allclose(vit[0], torch.from_numpy(np.asarray(large, np.float32)) / 127.5 - 1, atol=1e-6)


def test_late_encoding_equals_early_encoding(quickstart, tokenizer, builder):
    """Pixels that wait in the latent segments are encoded once per image, and counted as the tokens they will be."""
    late = SampleBuilder(builder.model, tokenizer, data_config())
    records = read_captions(quickstart.train_captions)[:2]
    items = [late.generation_with_teacher(record) for record in records] + [late.generation(records[0])]
    calls = []
    items = encode_latents(items, lambda pixels: calls.append(1) or pixels * 2)
    assert len(calls) == 3  # two pairs share their image, the last was decoded anew
    assert items[0][0].segments[1].latent is items[0][1].segments[0].latent
    assert torch.equal(items[0][0].segments[1].latent, builder.generation(records[0]).segments[1].latent * 2)
    assert items[0][0].segments[1].noised


def test_length_of_unencoded_pixels(tokenizer):
    """A latent token covers 16 × 16 pixels of the published model, and 2 × 2 numbers of its latents."""
    special = tokenizer.special
    model = settings.ModelConfig(special_tokens=special)
    image = Image.new("RGB", (512, 640))
    late = SampleBuilder(model, tokenizer)
    early = SampleBuilder(
        model, tokenizer, encode=lambda pixels: pixels.new_zeros(16, *(n // 8 for n in pixels.shape[1:]))
    )
    for builder in (late, early):
        latent, pixels = builder.views(image)
        sample = Sample((LatentImage(latent), VitImage(pixels)))
        assert builder.length(sample) == 32 * 40 + 2 + 37 * 46 + 2  # ViT: 518 × 644
    assert sample_length(sample, model) == early.length(sample)


def test_packs_and_pickles(quickstart, builder):
    clone = pickle.loads(pickle.dumps(builder))
    record = read_detection(quickstart.test_detection)[0]
    a, b = (pack([x.detection(record)], builder.model) for x in (builder, clone))
    assert a.text_ids.equal(b.text_ids)
    assert a.latents.equal(b.latents)
    assert a.labels.tolist() == [record.label]


def test_mismatched_settings_are_refused(tokenizer):
    model = settings.quickstart(vocab_size=512, special_tokens=SpecialTokens(3, 2, 1, 0))
    with pytest.raises(ValueError, match=r"tokenizer.special is .*; it must be the model's"):
        SampleBuilder(model, tokenizer, data_config())
    with pytest.raises(ValueError, match=r"it must be at most the model's 300"):
        SampleBuilder(settings.quickstart(vocab_size=300), tokenizer, data_config())
    odd = DataConfig(latent_view=ImageConfig(9, 9, 3), vit_view=ImageConfig(8, 8, 2))
    with pytest.raises(ValueError, match=r"data.latent_view.stride is 3; it must be a multiple of the model's 2"):
        SampleBuilder(settings.quickstart(vocab_size=512), tokenizer, odd)


@pytest.mark.parametrize("name", ["latent_view", "vit_view"])
def test_views_beyond_the_position_tables_are_refused(tokenizer, name):
    model = settings.quickstart(vocab_size=512)
    SampleBuilder(model, tokenizer, data_config())  # 8 pixels: all four positions a side
    large = dataclasses.replace(data_config(), **{name: ImageConfig(8, 10, 2)})
    with pytest.raises(
        ValueError, match=rf"data\.{name}\.max_size is 10; it must be at most 8, .*4 tokens of 2 pixels"
    ):
        SampleBuilder(model, tokenizer, large)
