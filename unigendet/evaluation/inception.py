"""Inception features, by torch-fidelity: what a published FID is computed from.

The network is the Inception of 2015 that the original TensorFlow code uses, with its resizing; torch-fidelity holds
itself to that code's numbers. The package comes with the extra ``fid``. Its weights are a file that is never downloaded
here: whoever wants them fetches it and names it.
Source: Heusel et al. 2017 (arXiv 1706.08500); torch-fidelity, Obukhov et al. 2020.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unigendet.data.hashes import file_hash
from unigendet.data.transforms import read_image

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"  # the hash of the published file begins so, as its name says
WHERE = (
    f"torch-fidelity's {WEIGHTS}, a file of its release v0.2.0 at github.com/toshas/torch-fidelity (pytorch-fid's "
    f"pt_inception-2015-12-05-6726825d.pth is the same file)"
)
FEATURES = 2048


class InceptionFeatures:
    """Features of the last pooling layer.

    Args:
        weights: the file, see ``WHERE``.
        device: where the network runs, in float32.

    ``sha256``: of the weights; ``published``: whether it is the published file's.
    Raises FileNotFoundError or ValueError for a file that is missing, damaged or something else, and ImportError where
    torch-fidelity cannot be loaded.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        weights = Path(weights)
        if not weights.is_file():
            raise FileNotFoundError(f"Inception's weights {weights} do not exist; it must be {WHERE}")
        network = _library().FeatureExtractorInceptionV3
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # the library's own loading would run any code
            self._network = network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
        except Exception as error:  # whatever torch.load and load_state_dict raise for a wrong file
            why = " ".join(str(error).split())
            raise ValueError(
                f"{weights} does not hold Inception's weights; it must be {WHERE} ({why[:200]})"
            ) from error
        self._network = self._network.to(device)
        self._device = torch.device(device)
        self.sha256 = file_hash(weights).hex()
        self.published = self.sha256.startswith(SHA256)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Path], *, batch_size: int = 8, done: Callable[[], None] | None = None
    ) -> NDArray[np.float64]:
        """Features [N, 2048] of image files, in their order; ``done`` is called after each.

        Raises ValueError or FileNotFoundError for a file that is no image; names it.
        """
        rows = []
        # Float32 products as they are: TensorFloat-32, the default of convolutions on a GPU, moves the distance.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for group in _alike(images, batch_size):
                (features,) = self._network(torch.stack(group).to(self._device))
                rows.append(features.double().cpu().numpy())
                for _ in group if done is not None else ():
                    done()
        return np.concatenate(rows) if rows else np.zeros((0, FEATURES))


def _library() -> Any:
    """The package, or an ImportError that says what to do."""
    try:
        return importlib.import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("torch_fidelity", "torchvision"):
            raise
        raise ImportError(f"Inception features need the package {missing!r}: pip install 'unigendet[fid]'") from error
    except (RuntimeError, ImportError, OSError) as error:
        # torchvision's compiled operators do not load beside another build of PyTorch.
        raise ImportError(
            f"torch-fidelity cannot be loaded ({error}); it needs a torchvision that was built for this PyTorch, "
            f"{torch.__version__}"
        ) from error


def _alike(images: Sequence[Path], batch_size: int) -> Iterator[list[Tensor]]:
    """uint8 [3, H, W] each, in batches of consecutive images of one size."""
    group: list[Tensor] = []
    for path in images:
        pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
        if group and (len(group) == batch_size or pixels.shape != group[0].shape):
            yield group
            group = []
        group.append(pixels)
    if group:
        yield group
