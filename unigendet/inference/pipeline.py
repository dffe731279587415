"""From files and prompts to verdicts and pictures: a model with its tokenizer, autoencoder and image views.

A model folder holds the weights and ``config.json`` (see ``unigendet.model.checkpoint``), the tokenizer's files, and
``data.json``, the views in which the model sees images. A folder as BAGEL publishes it lacks ``data.json`` and gets the
published views; its autoencoder is ``ae.safetensors``; it has no real/fake head, so a verdict comes from the text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unigendet.config import DataConfig, GuidanceConfig, check, guidance_from_dict
from unigendet.data.datasets import SampleBuilder, load_data_config, parse_verdict, save_data_config
from unigendet.data.tokenizer import Tokenizer, load_tokenizer
from unigendet.data.transforms import read_image, to_image
from unigendet.files import replaced_files
from unigendet.inference.calibration import Calibration
from unigendet.inference.detect import Detection, DetectionOutput, DetectionRequest, answer_room, detect_packed
from unigendet.inference.generate import generate_latents, tokens_to_latent
from unigendet.inference.model_files import autoencoder_file, folder_config
from unigendet.inference.prefetch import map_ahead
from unigendet.inference.requests import ImageRequest, RequestBuilder
from unigendet.model.autoencoder import build_autoencoder
from unigendet.model.checkpoint import OWN_WEIGHTS, load_pretrained, write_pretrained
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Text, VitImage

if TYPE_CHECKING:
    from PIL.Image import Image

GUIDANCE_FILE = "generation.json"
_DECODING = threading.Lock()  # pictures that were opened elsewhere are decoded one at a time
DEFAULT_ANSWER = 256  # tokens, where the model has room for as many


@dataclass(frozen=True)
class _Prepared:
    """An image's two views, both still pixels, and what is asked of it."""

    name: str
    question: Text
    latent: Tensor
    vit: Tensor


@dataclass(frozen=True)
class _Call:
    """The settings of one call of ``Pipeline.detect``; ``options`` are those of ``detect_packed``."""

    transform: Callable[[Image], Image] | None
    with_latent: bool
    batch_size: int
    calibration: Calibration
    on_error: Literal["raise", "row"]
    options: dict[str, Any]


class Pipeline:
    """A model that is ready to judge and to make images; ``batch_size`` images of a call are packed together.

    ``all_ended``: for a model of which several processes hold a part each, so that they make every pass together: all
    must then call ``detect`` with the same options and as many images, and ``generate`` with as many prompts. It says
    whether its argument is true in all of them, which is asked at every step of decoding: images that one of them
    cannot read, and answers that end earlier, then change nothing for the others.
    """

    def __init__(
        self,
        model: UniGenDet,
        tokenizer: Tokenizer,
        autoencoder: Any,
        data: DataConfig | None = None,
        guidance: GuidanceConfig | None = None,
        *,
        all_ended: Callable[[bool], bool] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.autoencoder = model.eval(), tokenizer, autoencoder
        self.data, self.guidance = data or DataConfig(), guidance or GuidanceConfig()
        self._all_ended = all_ended
        # Views are left as pixels: threads prepare them, and the autoencoder works in the caller's.
        self.builder = SampleBuilder(model.config, tokenizer, self.data)

    @property
    def has_head(self) -> bool:
        """Whether verdicts come from a real/fake head; otherwise they are read from the answer's text."""
        return self.model.class_head is not None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        autoencoder: str | Path | None = None,
    ) -> Pipeline:
        """Load a model folder.

        Args:
            folder: of the model.
            device: where the model and the autoencoder run.
            dtype: of the model's parameters; default float32.
            autoencoder: the autoencoder's weights; default ``ae.safetensors`` in ``folder``, if the model needs any.

        Raises:
            FileNotFoundError: a part is missing; says which.
            ValueError: the parts do not fit each other.
        """
        config = folder_config(folder)
        autoencoder = autoencoder_file(folder, config, autoencoder)  # before the weights, which may take minutes
        model = load_pretrained(folder, config=config, device=device, dtype=dtype)
        vae = build_autoencoder(config.latent, autoencoder)
        return cls(model, load_tokenizer(folder), vae.to(device), load_data_config(folder), load_guidance(folder))

    def save(self, folder: str | Path) -> None:
        """Write a model folder that ``from_pretrained`` reads: weights, settings, tokenizer, views.

        The autoencoder, which never changes, is not copied. What an interrupted save leaves: see ``save_pretrained``.
        """
        with replaced_files(folder, OWN_WEIGHTS) as new:
            write_pretrained(self.model, new)
            self.tokenizer.save(new)
            save_data_config(new, self.data)
            save_guidance(new, self.guidance)

    def detect(
        self,
        images: Iterable[str | Path | Image],
        *,
        question: str | Sequence[str | None] | None = None,
        transform: Callable[[Image], Image] | None = None,
        with_latent: bool = True,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        calibration: Calibration | None = None,
        on_error: Literal["raise", "row"] = "raise",
    ) -> Iterator[Detection]:
        """Judge images, in their order.

        The images of the next batch are read and resized in threads while the model works on this one. Verdicts,
        probabilities and greedy texts do not depend on ``batch_size`` but for the last bits of the model's arithmetic;
        sampled texts do. All are the same, bit for bit, in every run with the same batch size and seed.

        Args:
            images: paths or PIL images; of an animation, the first picture.
            question: what the model is asked, of every image or one per image; None: the question it was trained with.
            transform: applied, in those threads, to every original image, before the model's views of it are made.
            with_latent: show the model the latent view too (symbiotic attention).
            max_new_tokens: longest answer; 0 skips the explanation; default: ``default_answer`` of the questions.
            temperature: 0 = greedy.
            seed: of sampled answers.
            batch_size: images decoded together; up to as many more are read ahead.
            calibration: temperature, threshold and unsure band of the verdicts; default: real from 0.5 on.
            on_error: what becomes of an image that cannot be read, or whose logits are not finite: ``raise`` its error,
                or yield a ``row`` with it.

        Yields:
            A ``Detection`` per image.

        Raises:
            ValueError, FileNotFoundError: an argument does not fit, says so at once; a file is no image or does not
                exist; names it.
            RuntimeError: the model failed, say for lack of memory; a note names the images of the batch.
        """
        check(batch_size > 0, "batch_size", batch_size, "positive")
        check(on_error in ("raise", "row"), "on_error", on_error, "'raise' or 'row'")
        for_all = question is None or isinstance(question, str)
        asked = [self.data.question if one is None else one for one in ([question] if for_all else question)]
        for one in set(asked if calibration is not None else ()):
            calibration.check_use(self.model, self.data, one, with_latent)
        texts = [self.builder.text(one) for one in asked]
        options = {
            "max_new_tokens": self._answer_length(texts, with_latent, max_new_tokens),
            "temperature": temperature,
            "generator": torch.Generator(self.model.device).manual_seed(seed),
            "all_ended": self._all_ended,
        }
        call = _Call(transform, with_latent, batch_size, calibration or Calibration(), on_error, options)
        return self._judge_all(_paired(images, texts[0] if for_all else texts), call)

    def default_answer(self, questions: Iterable[str | None], *, with_latent: bool = True) -> int:
        """The longest answer of ``detect`` by default, in tokens: 256, or what the longest question leaves room for.

        Arguments and errors as ``detect``'s; ``questions``: one or more.
        """
        asked = {self.data.question if one is None else one for one in questions}
        return self._answer_length([self.builder.text(one) for one in asked], with_latent, None)

    def _judge_all(self, pairs: Iterable[tuple[str | Path | Image, Text]], call: _Call) -> Iterator[Detection]:
        prepare, threads = functools.partial(self._prepare, call=call), min(4, os.cpu_count() or 1)
        prepared = map_ahead(prepare, pairs, ahead=call.batch_size, threads=threads)
        for group in _groups(prepared, call.batch_size):
            try:
                yield from self._judge(group, call)
            except (RuntimeError, MemoryError) as error:
                names = ", ".join(row.name for row in group if isinstance(row, _Prepared))
                error.add_note(f"while judging {names}; a smaller batch_size takes less memory")
                raise

    def _judge(self, group: list[_Prepared | Detection], call: _Call) -> Iterator[Detection]:
        requests = [self._request(row, call.with_latent) for row in group if isinstance(row, _Prepared)]
        alone = self._all_ended is None
        outputs = iter(() if alone and not requests else detect_packed(self.model, requests, **call.options))
        for row in group:
            result = row
            if isinstance(row, _Prepared):
                result = self._detection(row.name, next(outputs), call.calibration)
                if result.error is not None and call.on_error == "raise":
                    raise ValueError(result.error)
            yield result

    def _answer_length(self, questions: Sequence[Text], with_latent: bool, max_new_tokens: int | None) -> int:
        """``max_new_tokens`` or its default; ValueError if a question, or the answer after it, is too long."""
        longest = max(questions, key=lambda text: len(text.ids), default=Text(()))
        room, tokens = answer_room(self.model.config, longest, with_latent=with_latent), len(longest.ids)
        if room < 1:
            most = f"at most {tokens + room - 1}, for a model of {self.model.config.max_position} positions"
            raise ValueError(f"question (--question) has {tokens} tokens; it must have {most}")
        if max_new_tokens is None:
            return min(DEFAULT_ANSWER, room)
        need = f"from 0 to {room}, the room after a question of {tokens} tokens"
        check(0 <= max_new_tokens <= room, "max_new_tokens (--max-tokens)", max_new_tokens, need)
        return max_new_tokens

    def _prepare(self, pair: tuple[str | Path | Image, Text], call: _Call) -> _Prepared | Detection:
        image, question = pair
        name = str(image) if isinstance(image, str | Path) else str(getattr(image, "filename", ""))
        try:
            if not isinstance(image, str | Path):
                with _DECODING:  # the same picture may be given twice
                    image.load()
            if call.transform is not None:
                image = call.transform(read_image(image) if isinstance(image, str | Path) else image)
            latent, pixels = self.builder.views(image)
        except (ValueError, OSError, MemoryError) as error:
            named = _naming(name, error)
            if call.on_error == "raise":
                if named is error:
                    raise
                raise named from error
            return Detection(name, None, None, "", str(named))
        return _Prepared(name, question, latent, pixels)

    def _request(self, image: _Prepared, with_latent: bool) -> DetectionRequest:
        latent = LatentImage(self.autoencoder.encode(image.latent)) if with_latent else None
        return DetectionRequest(VitImage(image.vit), image.question, latent, image.name)

    def _detection(self, name: str, output: DetectionOutput, calibration: Calibration) -> Detection:
        answer, logit = self.tokenizer.decode(output.ids), output.logit
        if logit is None:
            verdict = parse_verdict(answer)
            return Detection(name, None if verdict is None else bool(verdict), None, answer)
        if not math.isfinite(logit):
            error = f"image {name}: the real/fake head's logits are not finite; try another dtype, or another model"
            return Detection(name, None, None, "", error)
        probability = calibration.probability(logit)
        verdict = calibration.verdict(probability)
        return Detection(name, verdict, probability, answer, logit=logit, unsure=verdict is None)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[str | Path | Image] = (),
        size: tuple[int, int] | None = None,
        guidance: GuidanceConfig | None = None,
        seed: int = 0,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image]:
        """Make one image per prompt and return them all; ``generate_each`` keeps no more than a batch in memory.

        Args:
            prompts: captions, or instructions that go with the input ``images``.
            images: what every image is made from besides its prompt.
            size: (height, width) in pixels; default: that of the last input image, without one the largest square the
                model makes.
            guidance, batch_size, progress, and errors: see ``generate_each``.
            seed: image i depends on ``seed + i`` and its conditions alone, not on the other prompts.

        Returns:
            PIL images.
        """
        requests = [ImageRequest(prompt, seed + i, size, tuple(images)) for i, prompt in enumerate(prompts)]
        return list(self.generate_each(requests, guidance=guidance, batch_size=batch_size, progress=progress))

    def check_requests(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The same requests, each with its size. Errors as ``generate_each``'s."""
        return RequestBuilder(self.model, self.builder, self.autoencoder.encode).check(requests)

    def generate_each(
        self,
        requests: Sequence[ImageRequest],
        *,
        guidance: GuidanceConfig | None = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Image]:
        """Make images, in the order of their requests. All requests are checked by this call, before the first image.

        Args:
            requests: prompts, seeds, sizes and input images.
            guidance: scales and steps; default: the model folder's.
            batch_size: images denoised together.
            progress: called with (steps done, steps of all batches).

        Returns:
            An iterator over PIL images; it makes a batch when the first image of it is asked for.

        Raises:
            ValueError: a setting, a prompt that is too long, a size that the model cannot make, an unreadable image;
                from the iterator, an image that is not finite.
            FileNotFoundError: an input image does not exist.
        """
        check(batch_size > 0, "batch_size", batch_size, "positive")
        guidance = guidance or self.guidance
        build = RequestBuilder(self.model, self.builder, self.autoencoder.encode)
        requests = build.check(requests)
        batches = -(-len(requests) // batch_size)

        def images() -> Iterator[Image]:
            for done, group in enumerate(_groups(requests, batch_size)):
                step = None if progress is None else lambda i, n, done=done: progress(done * n + i, batches * n)
                conditions, noise = build.build(group)
                tokens = generate_latents(self.model, conditions, guidance, noise=noise, progress=step)
                for request, one in zip(group, tokens, strict=True):
                    pixels = self.autoencoder.decode(tokens_to_latent(self.model, one, request.size))
                    if not torch.isfinite(pixels).all():  # it would become a black or white picture
                        lack = "the model's image is not finite; try another dtype, or another model"
                        raise ValueError(f"{request.where}: {lack}")
                    yield to_image(pixels)

        return images()


def save_guidance(folder: str | Path, guidance: GuidanceConfig) -> None:
    """Write ``generation.json`` into a model folder."""
    text = json.dumps(dataclasses.asdict(guidance), indent=2)
    (Path(folder) / GUIDANCE_FILE).write_text(text, encoding="utf-8")


def load_guidance(folder: str | Path) -> GuidanceConfig:
    """Read ``generation.json`` of a model folder; without that file, the published defaults.

    Raises:
        ValueError: the file is not JSON, or a setting is unknown or unfit; names the file.
    """
    file = Path(folder) / GUIDANCE_FILE
    if not file.is_file():
        return GuidanceConfig()
    try:
        return guidance_from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, IndexError) as error:  # not JSON; an unfit setting; no mapping
        raise ValueError(f"{file} does not hold sampling settings: {error}") from error


def _paired(images: Iterable[Any], questions: Text | Sequence[Text]) -> Iterator[tuple[Any, Text]]:
    if isinstance(questions, Text):  # of every image
        yield from zip(images, itertools.repeat(questions))
        return
    nothing = object()
    for image, question in itertools.zip_longest(images, questions, fillvalue=nothing):
        if image is nothing or question is nothing:
            raise ValueError(f"question has {len(questions)} entries; it must be one text, or as many as images")
        yield image, question


def _naming(name: str, error: ValueError | OSError | MemoryError) -> ValueError | OSError:
    """The error, or one that says of which image it is; only files have names."""
    image = f"image {name}" if name else "the image"
    if isinstance(error, MemoryError):
        return ValueError(f"{image}: not enough memory; scale it down first")
    return error if not name or str(error).startswith(image) else ValueError(f"{image}: {error}")


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
