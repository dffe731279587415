"""Annotation files become records, and records become samples.

Two formats: FakeClue (detection) is a JSON list of ``{"image": path, "label": 0 | 1, "cate": category,
"conversations": [{"from": "human", "value": "<image>question"}, {"from": "gpt", "value": answer}]}``; the LAION
subset (generation) is a JSON list of ``{"image_path": path, "prompt": caption}``. Paths are relative to an image
root. The readers are strict: a malformed entry is an error that names the file, the entry and the field.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unigendet.config import DataConfig, ModelConfig, check, data_from_dict
from unigendet.data.entries import Entry, Malformed, Reader, sound_entries
from unigendet.data.tokenizer import Tokenizer
from unigendet.data.transforms import ImageTransform, read_image
from unigendet.files import naming
from unigendet.packing import LatentImage, Sample, Text, VitImage

IMAGE_MARKER = "<image>"
DATA_FILE = "data.json"  # of a model folder: the views and the question its model was trained with
_VERDICT = re.compile(r"\W*this\s+is\s+an?\s+(real|fake)\s+image\b", re.IGNORECASE)


@dataclass(frozen=True)
class DetectionRecord:
    """One image with a verdict. ``label``: 1 = real, 0 = fake; ``category`` groups the evaluation.

    ``where``: what errors call its place, the annotation file and the entry.
    """

    image: Path
    label: int
    category: str
    question: str
    answer: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class CaptionRecord:
    """One image with its caption. ``where``: as a ``DetectionRecord``'s."""

    image: Path
    prompt: str
    where: str = field(default="", compare=False)


def read_detection(
    file: str | Path, image_root: str | Path | None = None, malformed: list[Malformed] | None = None
) -> list[DetectionRecord]:
    """Read a FakeClue annotation file.

    Args:
        file: the JSON file, in UTF-8.
        image_root: what image paths are relative to; default: the file's folder.
        malformed: takes everything that is wrong with any entry, and the records are those of the sound ones; None:
            the first mistake is raised.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or an entry is malformed, or none is sound; names the file, the entry's index and the
            field.
    """
    entries = sound_entries(file, image_root, malformed, (_label, _texts, _image("image"), _text("cate")))
    return [
        DetectionRecord(image, label, category, question, answer, where)
        for where, (label, (question, answer), image, category) in entries
    ]


def read_captions(
    file: str | Path, image_root: str | Path | None = None, malformed: list[Malformed] | None = None
) -> list[CaptionRecord]:
    """Read a LAION annotation file. Arguments and errors as in ``read_detection``."""
    entries = sound_entries(file, image_root, malformed, (_image("image_path"), _text("prompt")))
    return [CaptionRecord(image, prompt, where) for where, (image, prompt) in entries]


def _image(field: str) -> Reader:
    return lambda entry: entry.path(field)


def _text(field: str) -> Reader:
    return lambda entry: entry.text(field)


def _label(entry: Entry) -> int:
    label = entry.get("label")
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"{entry.where}, field 'label' is {label!r}; it must be 1 (real) or 0 (fake)")
    return label


def _texts(entry: Entry) -> tuple[str, str]:
    """Question and answer."""
    turns = entry.get("conversations")
    speakers = turns
    if isinstance(turns, list):
        speakers = [turn.get("from") if isinstance(turn, dict) else turn for turn in turns]
    if speakers != ["human", "gpt"]:
        raise ValueError(
            f"{entry.where}, field 'conversations' has the speakers {speakers!r}; it must be one turn by 'human', "
            "then one by 'gpt'"
        )
    question, answer = (
        Entry(turn, f"{entry.where}, conversations[{i}]", entry.root).text("value") for i, turn in enumerate(turns)
    )
    question = question.replace(IMAGE_MARKER, "").strip()
    if not question:
        raise ValueError(f"{entry.where}, conversations[0], field 'value' holds nothing beside {IMAGE_MARKER}")
    return question, answer.strip()


def parse_verdict(text: str) -> int | None:
    """1 for an answer that begins "This is a real image", 0 for "This is a fake image", None for any other text.

    Case, white space and punctuation before the sentence (quotes, markup) do not matter; a verdict further on does not
    count.
    """
    found = _VERDICT.match(text)
    return None if found is None else int(found[1].lower() == "real")


def save_data_config(folder: str | Path, config: DataConfig) -> None:
    """Write ``data.json`` into a model folder."""
    text, file = json.dumps(dataclasses.asdict(config), indent=2), Path(folder) / DATA_FILE
    with naming(file):
        file.write_text(text, encoding="utf-8")


def load_data_config(folder: str | Path) -> DataConfig:
    """Read ``data.json`` of a model folder; without it, the published views. ValueError names what is wrong."""
    file = Path(folder) / DATA_FILE
    if not file.is_file():
        return DataConfig()
    try:
        return data_from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:  # not JSON; an unknown or unfit setting; no mapping
        raise ValueError(f"{file} does not hold a model's views: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise ValueError unless the tokenizer has the model's special tokens, and no more tokens than it."""
    check(
        tokenizer.special == model.special_tokens,
        "tokenizer.special",
        tokenizer.special,
        f"the model's: {model.special_tokens}",
    )
    most = model.vocab_size
    check(tokenizer.vocab_size <= most, "tokenizer.vocab_size", tokenizer.vocab_size, f"at most the model's {most}")


def check_views(data: DataConfig, model: ModelConfig, name: str = "data") -> None:
    """Raise ValueError unless both views fit the model; ``name``: what errors call ``data``."""
    for view, config, need, positions in (
        ("latent_view", data.latent_view, model.latent.stride, model.latent.max_size),
        ("vit_view", data.vit_view, model.vision.patch_size, model.vision.max_patches_per_side),
    ):
        where, most = f"{name}.{view}", need * positions
        check(config.stride % need == 0, f"{where}.stride", config.stride, f"a multiple of the model's {need}")
        covers = f"what the model's position table covers ({positions} tokens of {need} pixels a side)"
        check(config.max_size <= most, f"{where}.max_size", config.max_size, f"at most {most}, {covers}")


class SampleBuilder:
    """Turns records, or an image and a text, into samples. Picklable; one is shared by all data workers.

    Attributes ``latent_view``, ``vit_view``: the transforms that make the two views.

    Args:
        model: sizes of the model; they fix the views' channels and strides.
        tokenizer: its special tokens must be the model's.
        data: sizes of the two views, and the teacher's prompt. No view may reach beyond the model's position tables.
        encode: pixels [channels, H, W] in [-1, 1] → latent, normally ``autoencoder.encode``. None leaves the pixels
            in place of the latents, for ``encode_latents`` to encode them later, on the accelerator.

    Raises:
        ValueError: the tokenizer or a view does not fit the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        data: DataConfig | None = None,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        data = data or DataConfig()
        check_tokenizer(tokenizer, model)
        check_views(data, model)
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self._encode = encode
        grey_or_rgb = model.latent.channels if model.latent.autoencoder == "pixels" else 3
        self.latent_view = ImageTransform.from_config(data.latent_view, grey_or_rgb)
        self.vit_view = ImageTransform.from_config(data.vit_view, model.vision.num_channels)

    def views(self, image: Any) -> tuple[Tensor, Tensor]:
        """A PIL image, or the path of one → (latent, or pixels without ``encode``; the ViT's pixels), each from the
        original.
        """
        if isinstance(image, str | Path):
            image = read_image(image)
        latent = self.latent_view(image)
        return (latent if self._encode is None else self._encode(latent)), self.vit_view(image)

    def text(self, text: str, **flags: bool) -> Text:
        """The text segment of ``text``; ``flags`` are ``Text``'s."""
        return Text(tuple(self.tokenizer.encode(text)), **flags)

    def detection(self, record: DetectionRecord, *, with_latent: bool = True) -> Sample:
        """``[latent image, clean] [ViT image] [question] [answer, loss]`` with the label (SMSA's order).

        ``with_latent=False`` leaves the latent image out: the detector without symbiotic attention.
        """
        latent, pixels = self.views(record.image)
        segments = (VitImage(pixels), self.text(record.question), self.text(record.answer, loss=True))
        return Sample((LatentImage(latent), *segments) if with_latent else segments, record.label, str(record.image))

    def generation(self, record: CaptionRecord) -> Sample:
        """``[caption, droppable] [latent image, noised]``."""
        return self._generation(record, self._latent_of(record))

    def teacher(self, record: CaptionRecord) -> Sample:
        """``[latent image, clean] [prompt that contains the caption] [ViT image]``, what DIGA's teacher reads."""
        return self._teacher(record, *self.views(record.image))

    def generation_with_teacher(self, record: CaptionRecord) -> tuple[Sample, Sample]:
        """The generation sample and its teacher sample; the image is decoded and encoded once for both."""
        latent, pixels = self.views(record.image)
        return self._generation(record, latent), self._teacher(record, latent, pixels)

    def _latent_of(self, record: CaptionRecord) -> Tensor:
        latent = self.latent_view(read_image(record.image))
        return latent if self._encode is None else self._encode(latent)

    def _generation(self, record: CaptionRecord, latent: Tensor) -> Sample:
        segments = (self.text(record.prompt, droppable=True), LatentImage(latent, noised=True))
        return Sample(segments, name=str(record.image))

    def _teacher(self, record: CaptionRecord, latent: Tensor, pixels: Tensor) -> Sample:
        prompt = self.data.teacher_prompt.replace("{caption}", record.prompt)  # a caption may hold braces of its own
        return Sample((LatentImage(latent), self.text(prompt), VitImage(pixels)), name=str(record.image))

    def length(self, sample: Sample) -> int:
        """Number of tokens of ``sample``, whether its latent images are encoded or still pixels."""
        total = 0
        for segment in sample.segments:
            if isinstance(segment, Text):
                total += len(segment.ids) + 1 + segment.eos
            elif isinstance(segment, VitImage):
                total += _tokens(segment.pixels, self.model.vision.patch_size)
            else:
                encoded = self._encode is not None
                total += _tokens(segment.latent, self.model.latent.patch_size if encoded else self.model.latent.stride)
        return total


def _tokens(image: Tensor, patch: int) -> int:
    return (image.shape[-2] // patch) * (image.shape[-1] // patch) + 2


def encode_latents(
    items: Sequence[Sample | tuple[Sample, ...]], encode: Callable[[Tensor], Tensor]
) -> list[Sample | tuple[Sample, ...]]:
    """Encode the pixels that a ``SampleBuilder`` without ``encode`` left in the latent segments.

    An image that occurs in several segments (a DIGA student and its teacher) is encoded once.

    Args:
        items: samples, or tuples of samples.
        encode: pixels [channels, H, W] → latent, normally ``autoencoder.encode`` on the accelerator.
    """
    latents: dict[int, Tensor] = {}

    def encoded(sample: Sample) -> Sample:
        segments = []
        for segment in sample.segments:
            if isinstance(segment, LatentImage):
                key = id(segment.latent)  # the tensors outlive this call in ``items``, so ids are unique
                if key not in latents:
                    latents[key] = encode(segment.latent)
                segment = dataclasses.replace(segment, latent=latents[key])
            segments.append(segment)
        return dataclasses.replace(sample, segments=tuple(segments))

    return [encoded(item) if isinstance(item, Sample) else tuple(map(encoded, item)) for item in items]
