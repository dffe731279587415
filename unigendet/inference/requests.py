"""From a prompt and input images to what the sampler takes; all that can be wrong with them is found here, beforehand.

The conditions stand in BAGEL's order for editing: of every input image its latent view, then its ViT view, and the text
last (paper section 3.3). Both views are resized from the original image. An image made from others has, unless a size
is given, the size of the last one's latent view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unigendet.config import check
from unigendet.data.datasets import SampleBuilder
from unigendet.data.transforms import read_image, to_rgb
from unigendet.inference.generate import GenerationRequest, latent_grid
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Text, VitImage

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 40  # letters of a prompt in an error message


@dataclass(frozen=True)
class ImageRequest:
    """One image to make: from a prompt and input ``images`` (paths or PIL images), with the noise of ``seed``.

    ``size``: (height, width) in pixels; None: that of the last input image, without one the largest square the model
    makes. ``name``: what errors call the request beside the beginning of its prompt.
    Raises ValueError for a seed that PyTorch's generators do not take.
    """

    prompt: str
    seed: int = 0
    size: tuple[int, int] | None = None
    images: tuple[str | Path | Image, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 - 1")

    @property
    def where(self) -> str:
        """Its name in errors."""
        short = self.prompt if len(self.prompt) <= SHOWN else self.prompt[:SHOWN] + "…"
        return f"{self.name} ({short!r})" if self.name else f"prompt {short!r}"


class RequestBuilder:
    """Checks requests, and makes the sampler's of them; keeps the views of the images that the last batch used.

    ``encode``: pixels → latent, for the latent views, which ``samples`` leaves as pixels.
    """

    def __init__(self, model: UniGenDet, samples: SampleBuilder, encode: Callable[[Tensor], Tensor]) -> None:
        self._model, self._samples, self._encode = model, samples, encode
        self._views: dict[object, tuple[LatentImage, VitImage]] = {}

    def check(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The same requests, each with its size.

        Raises:
            ValueError: a prompt is too long, a size is none the model makes, or an input image cannot be read.
            FileNotFoundError: an input image does not exist.
        """
        sizes: dict[object, tuple[int, int]] = {}
        return [self._checked(request, sizes) for request in requests]

    def _checked(self, request: ImageRequest, sizes: dict[object, tuple[int, int]]) -> ImageRequest:
        # A text takes a position for each token and two for its delimiters, an image segment one, the new image one.
        most = self._model.config.max_position - 3 - 2 * len(request.images)
        tokens = len(self._samples.text(request.prompt).ids)
        if tokens > most:
            given = f" beside {len(request.images)} input images" if request.images else ""
            raise ValueError(
                f"{request.where} has {tokens} tokens; it must have at most {most}{given}: the model has "
                f"{self._model.config.max_position} positions (max_position)"
            )
        for image in request.images:
            if _key(image) not in sizes:
                sizes[_key(image)] = self._latent_view_size(image)
        latent = self._model.config.latent
        size = sizes[_key(request.images[-1])] if request.images else (latent.stride * latent.max_size,) * 2
        size = request.size or size
        latent_grid(self._model, size, f"{request.where}: size")
        return dataclasses.replace(request, size=size)

    def _latent_view_size(self, image: str | Path | Image) -> tuple[int, int]:
        """Height and width of the latent view. The file is read as a whole, so that a damaged one is found now."""
        size = (read_image(image) if isinstance(image, str | Path) else to_rgb(image)).size  # of the picture upright
        width, height = self._samples.latent_view.size_of(*size)
        return height, width

    def build(self, group: Sequence[ImageRequest]) -> tuple[list[GenerationRequest], list[Tensor]]:
        """The sampler's requests for one batch of checked requests, and their noise."""
        used = {_key(image): image for request in group for image in request.images}
        self._views = {key: self._views.get(key) or self._both_views(image) for key, image in used.items()}
        requests, noise = [], []
        for request in group:
            images = [view for image in request.images for view in self._views[_key(image)]]
            text: Text = self._samples.text(request.prompt)
            requests.append(GenerationRequest((*images, text), request.size, request.where))
            rows, columns = latent_grid(self._model, request.size)
            generator = torch.Generator().manual_seed(request.seed)
            noise.append(torch.randn((rows * columns, self._model.config.latent.token_dim), generator=generator))
        return requests, noise

    def _both_views(self, image: str | Path | Image) -> tuple[LatentImage, VitImage]:
        latent, pixels = self._samples.views(image)
        return LatentImage(self._encode(latent)), VitImage(pixels)


def _key(image: str | Path | Image) -> object:
    return str(image) if isinstance(image, str | Path) else id(image)
