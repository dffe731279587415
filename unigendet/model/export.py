"""Settings and weights in the published form: BAGEL's settings files, and ``ema.safetensors`` as UniGenDet's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens
from unigendet.model.checkpoint import (
    PUBLISHED,
    as_published,
    find_tensors,
    published_state_dict,
    stored_config,
    unused_tensors,
)
from unigendet.model.settings import CONFIG_FILE, LLM_FILE, VIT_FILE, published_settings
from unigendet.model.shards import open_tensors, plan_shards, stream_tensors
from unigendet.model.unigendet import UniGenDet


def export_weights(
    source: str | Path, folder: Path, dtype: torch.dtype = torch.float32, shard_bytes: int | None = None
) -> list[str]:
    """Write settings and weights in the published form; one tensor at a time is held in memory.

    A model with the real/fake head also gets the published files' ``latent_to_vit_connector``, all zero: nothing uses
    it, but a strict loader asks for it.

    Args:
        source: a model folder, ours or one in the published form.
        folder: where to; empty.
        dtype: of the weights.
        shard_bytes: of tensors in a file; default: all are in one, the only form that BAGEL's own code opens.

    Returns:
        Names of settings that the published files cannot say. If there are any, ``config.json`` holds them all, which
        this package reads first, and other programs do not know.

    Raises:
        FileNotFoundError, CheckpointError: ``source`` is not a whole model.
        OSError: a file cannot be written.
    """
    config = stored_config(source)
    with torch.device("meta"):
        targets = published_state_dict(UniGenDet(config))
    found = find_tensors({name: tensor.shape for name, tensor in targets.items()}, source)
    unused = unused_tensors(config) if config.class_head else {}
    tensors = {name: tensor.to(dtype) for name, tensor in (targets | unused).items()}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(open_tensors(file))
            for file in {piece.file for pieces in found.values() for piece in pieces}
        }

        def read(name: str) -> Tensor:
            if name in unused:
                return torch.zeros(unused[name].shape, dtype=dtype)
            pieces = [opened[piece.file].get_tensor(name) for piece in found[name]]
            return as_published(name, pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(dtype)

        for file, names in plan_shards(sizes, folder, PUBLISHED, shard_bytes).items():
            stream_tensors({name: tensors[name] for name in names}, read, folder / file)
    llm, vit = published_settings(config)
    contents = {LLM_FILE: llm | {"torch_dtype": str(dtype).removeprefix("torch.")}, VIT_FILE: vit}
    unsaid = not_published(config)
    if unsaid:
        contents[CONFIG_FILE] = config.to_dict()
    for name, values in contents.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return unsaid


def not_published(config: ModelConfig) -> list[str]:
    """The settings whose values the published files have no word for, by name."""
    names = []
    for part, default in (("latent", LatentConfig()), ("special_tokens", SpecialTokens())):
        mine = getattr(config, part)
        names += [f"{part}.{name}" for name, value in vars(default).items() if getattr(mine, name) != value]
    if config.vision.positions != config.vision.max_patches_per_side**2:
        names.append("vision.num_positions")
    if config.align_projector != ModelConfig.align_projector:
        names.append("align_projector")
    return names
