"""How large a run's weights are, exactly and without weights: the model and its stage are built on the meta device.

A sharded parameter is cut along its first dimension into as many pieces as there are processes, each as long as the
first one, which is rounded up; the piece of rank 0 is therefore the largest, and the one that is counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from unigendet.config import LatentConfig, ModelConfig
from unigendet.model.autoencoder import flux_on_meta
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import TrainConfig
from unigendet.training.stages import make_stage

Shapes = Mapping[str, tuple[int, ...]]
FP32 = 4  # bytes of a weight, a gradient, a moment and an average

# Parts of the model by the beginnings of their parameters' names.
_PARTS = (
    ("decoder, understanding", r"decoder\..*\.und(\.|$)"),
    ("decoder, generation", r"decoder\..*\.gen(\.|$)"),
    ("ViT and connector", r"(vision|connector)\."),
    ("embedding and text head", r"(embed_tokens|lm_head)\."),
    ("latents, time and velocity", r"(vae2llm|llm2vae|time_embedding)\."),
    ("real/fake head", r"class_head\."),
    ("φ", r"align_head\."),
)
_GROUP = re.compile(r"(decoder|vision)\.layers\.\d+")
ROOT = "root"
# Weights that autocast keeps no copies of for the backward pass: read by index, or with an input without gradient.
_UNCOPIED = re.compile(
    r"(embed_tokens|vision\.position_embedding|vision\.patch_embedding|vae2llm|time_embedding\.fc1)\."
)


def elements(shapes: Shapes | Iterable[tuple[int, ...]], shards: int = 1) -> int:
    """Numbers in tensors of these shapes, of rank 0 where each is sharded over ``shards`` processes."""
    values = shapes.values() if isinstance(shapes, Mapping) else shapes
    return sum(math.ceil(shape[0] / shards) * math.prod(shape[1:]) if shape else 1 for shape in values)


def groups(shapes: Shapes) -> dict[str, Shapes]:
    """Parameters by what is gathered together: a decoder layer, a layer of the ViT, and all else, ``root``."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _GROUP.match(name)
        found.setdefault(match[0] if match else ROOT, {})[name] = shape
    return found


@dataclass(frozen=True)
class RunSizes:
    """Shapes of everything that a run keeps.

    ``parameters``: all of the model's; ``trained``: the names of those that learn; ``teacher``: what DIGA's teacher
    copies with one process, and every checkpoint holds; ``whole_teacher``: what it copies where parameters are divided,
    all of it; ``buffers``: bytes of the position tables; ``rope``: those of cosines and sines; ``autoencoder``: its
    parameters, 0 for pixels.
    """

    parameters: Shapes
    trained: frozenset[str]
    teacher: Shapes
    whole_teacher: Shapes
    buffers: int
    rope: int
    autoencoder: int

    @classmethod
    def of(cls, config: TrainConfig, model: ModelConfig) -> RunSizes:
        """The sizes of a run with ``config`` on a model of these settings. Raises ValueError as ``make_stage`` does."""
        with torch.device("meta"):
            stage = make_stage(UniGenDet(model), config)
        teacher = getattr(stage, "teacher", None)
        return cls(
            parameters=_shapes(stage.model.named_parameters()),
            trained=frozenset(stage.trained),
            teacher=_shapes(stage.state_dict().items()),
            whole_teacher={} if teacher is None else _shapes(teacher.named_parameters()),
            buffers=sum(b.nbytes for b in stage.model.buffers()),
            rope=2 * model.max_position * (model.head_dim // 2) * FP32,
            autoencoder=_autoencoder(model.latent),
        )

    @property
    def learning(self) -> Shapes:
        """The parameters that learn."""
        return {name: shape for name, shape in self.parameters.items() if name in self.trained}

    def parts(self) -> dict[str, int]:
        """Numbers of parameters by part of the model."""
        found = dict.fromkeys((title for title, _ in _PARTS), 0)
        for name, shape in self.parameters.items():
            title = next(title for title, pattern in _PARTS if re.match(pattern, name))
            found[title] += elements([shape])
        return {title: count for title, count in found.items() if count}

    def autocast_copies(self, recompute: str) -> int:
        """Numbers in the low-precision copies of weights that autocast keeps for the backward pass.

        Layers that are computed again make theirs anew, so only one decoder layer has them at a time.
        """
        copied = {n: s for n, s in self.parameters.items() if len(s) > 1 and not _UNCOPIED.match(n)}
        copied = {n: s for n, s in copied.items() if not n.startswith("align_head.") or n in self.trained}
        if recompute == "none":
            return elements(copied)
        layer = elements(s for n, s in copied.items() if n.startswith("decoder.layers.0."))
        return layer + elements(s for n, s in copied.items() if not _GROUP.match(n))


def _shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _autoencoder(config: LatentConfig) -> int:
    return sum(p.numel() for p in flux_on_meta().parameters()) if config.autoencoder == "flux" else 0
