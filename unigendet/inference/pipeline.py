"""From files and prompts to verdicts and pictures: a model with its tokenizer, autoencoder and image views.

A model folder holds the weights and ``config.json`` (see ``unigendet.model.checkpoint``), the tokenizer's files, and
``data.json``, the views in which the model sees images. A folder as BAGEL publishes it lacks ``data.json`` and gets the
published views; its autoencoder is ``ae.safetensors``; it has no real/fake head, so a verdict comes from the text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from unigendet.config import DataConfig, GuidanceConfig, check, guidance_from_dict
from unigendet.data.datasets import SampleBuilder, load_data_config, parse_verdict, save_data_config
from unigendet.data.tokenizer import Tokenizer, load_tokenizer
from unigendet.data.transforms import to_image
from unigendet.files import replaced_files
from unigendet.inference.detect import DetectionOutput, DetectionRequest, detect_packed
from unigendet.inference.generate import GenerationRequest, generate_latents, latent_grid, tokens_to_latent
from unigendet.model.autoencoder import build_autoencoder
from unigendet.model.checkpoint import OWN_WEIGHTS, load_pretrained, stored_config, write_pretrained
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, VitImage

if TYPE_CHECKING:
    from PIL.Image import Image

FLUX_WEIGHTS = "ae.safetensors"
GUIDANCE_FILE = "generation.json"


@dataclass(frozen=True)
class Detection:
    """The verdict on one image.

    ``real``: the verdict, by the real/fake head if the model has one, otherwise by the answer's first sentence; None if
    neither decides. ``probability``: of being real, by the head. ``explanation``: the whole answer. ``name``: its path.
    ``error``: why there is no verdict, for a picture that could not be read.
    """

    name: str
    real: bool | None
    probability: float | None
    explanation: str
    error: str | None = None

    @property
    def verdict(self) -> str:
        """``real``, ``fake``, ``undecided`` or ``error``."""
        if self.error is not None:
            return "error"
        return "undecided" if self.real is None else "real" if self.real else "fake"


class Pipeline:
    """A model that is ready to judge and to make images; ``batch_size`` images of a call are packed together."""

    def __init__(
        self,
        model: UniGenDet,
        tokenizer: Tokenizer,
        autoencoder: Any,
        data: DataConfig | None = None,
        guidance: GuidanceConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.autoencoder = model.eval(), tokenizer, autoencoder
        self.data, self.guidance = data or DataConfig(), guidance or GuidanceConfig()
        self.builder = SampleBuilder(model.config, tokenizer, self.data, encode=autoencoder.encode)

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
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder at {folder}")
        model = load_pretrained(folder, config=stored_config(folder), device=device, dtype=dtype)
        if autoencoder is None and model.config.latent.autoencoder == "flux":
            autoencoder = folder / FLUX_WEIGHTS
            if not autoencoder.is_file():
                raise FileNotFoundError(f"{autoencoder} does not exist; say where the autoencoder's weights are")
        vae = build_autoencoder(model.config.latent, autoencoder)
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
        question: str | None = None,
        with_latent: bool = True,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        on_error: Literal["raise", "row"] = "raise",
    ) -> Iterator[Detection]:
        """Judge images, in their order.

        Args:
            images: paths or PIL images.
            question: what the model is asked; default: the question it was trained with.
            with_latent: show the model the latent view too (symbiotic attention).
            max_new_tokens: longest answer; 0 skips the explanation.
            temperature: 0 = greedy.
            seed: of sampled answers.
            batch_size: images decoded together.
            on_error: what becomes of a file that cannot be read: ``raise`` its error, or yield a ``row`` with it.

        Yields:
            A ``Detection`` per image.

        Raises:
            ValueError, FileNotFoundError: a file is no image or does not exist; names it.
        """
        check(batch_size > 0, "batch_size", batch_size, "positive")
        check(on_error in ("raise", "row"), "on_error", on_error, "'raise' or 'row'")
        text = self.builder.text(self.data.question if question is None else question)
        generator = torch.Generator(self.model.device).manual_seed(seed)

        def request(image: str | Path | Image) -> DetectionRequest | Detection:
            name = str(image) if isinstance(image, str | Path) else str(getattr(image, "filename", ""))
            try:
                latent, pixels = self.builder.views(image)
            except (ValueError, OSError) as error:
                if on_error == "raise":
                    raise
                return Detection(name, None, None, "", str(error))
            return DetectionRequest(VitImage(pixels), text, LatentImage(latent) if with_latent else None, name)

        for group in _groups(images, batch_size):
            rows = [request(image) for image in group]
            requests = [row for row in rows if isinstance(row, DetectionRequest)]
            outputs = iter(
                detect_packed(
                    self.model, requests, max_new_tokens=max_new_tokens, temperature=temperature, generator=generator
                )
                if requests
                else ()
            )
            for row in rows:
                yield row if isinstance(row, Detection) else self._detection(row, next(outputs))

    def _detection(self, request: DetectionRequest, output: DetectionOutput) -> Detection:
        answer = self.tokenizer.decode(output.ids)
        probability = output.probability
        verdict = parse_verdict(answer) if probability is None else probability >= 0.5
        return Detection(request.name, None if verdict is None else bool(verdict), probability, answer)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        guidance: GuidanceConfig | None = None,
        seed: int = 0,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image]:
        """Make one image per prompt.

        Args:
            prompts: captions.
            size: (height, width) in pixels; default: the largest square the model makes.
            guidance: scales and steps.
            seed: image i depends on ``seed + i`` and its prompt alone, not on the other prompts.
            batch_size: images denoised together.
            progress: called with (steps done, steps of all batches).

        Returns:
            PIL images.

        Raises:
            ValueError: a setting, or a size that the model cannot make.
        """
        check(batch_size > 0, "batch_size", batch_size, "positive")
        guidance = guidance or self.guidance
        latent = self.model.config.latent
        size = size or (latent.stride * latent.max_size,) * 2
        rows, columns = latent_grid(self.model, size)
        images: list[Image] = []
        batches = -(-len(prompts) // batch_size)
        for group in _groups(prompts, batch_size):
            requests = [GenerationRequest((self.builder.text(prompt),), size, prompt) for prompt in group]
            first, done = seed + len(images), len(images) // batch_size
            shape = (rows * columns, latent.token_dim)
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(first + i)) for i in range(len(group))]
            step = None if progress is None else lambda i, n, done=done: progress(done * n + i, batches * n)
            for tokens in generate_latents(self.model, requests, guidance, noise=noise, progress=step):
                pixels = self.autoencoder.decode(tokens_to_latent(self.model, tokens, size))
                images.append(to_image(pixels))
        return images


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


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
