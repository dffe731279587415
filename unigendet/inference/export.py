"""A whole model folder in the published form: weights, settings, tokenizer, views, autoencoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from unigendet.data.datasets import DATA_FILE, load_data_config
from unigendet.data.tokenizer import load_tokenizer
from unigendet.files import replaced_files
from unigendet.inference.model_files import FLUX_WEIGHTS
from unigendet.inference.pipeline import GUIDANCE_FILE, load_guidance
from unigendet.model.checkpoint import OURS, PUBLISHED, stored_config
from unigendet.model.export import export_weights
from unigendet.model.settings import CONFIG_FILE
from unigendet.model.shards import open_tensors, outdated_names

# What an earlier model in the same folder would be read by, in place of the new one or beside it.
_OUTDATED = (*outdated_names([OURS, PUBLISHED]), CONFIG_FILE, DATA_FILE, GUIDANCE_FILE, "vocab.json", "merges.txt",
             "tokenizer_config.json", "added_tokens.json")  # fmt: skip


def export_model(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    autoencoder: str | Path | None = None,
    shard_bytes: int | None = None,
) -> list[str]:
    """Write the model in ``source`` to ``folder`` in the published form, for ``Pipeline.from_pretrained`` and others.

    Args:
        source: a model folder, ours or one in the published form.
        folder: where to. What an earlier model left there is exchanged as in ``files.replaced_files``; other files
            stay.
        dtype: of the weights, ``float32`` or ``bfloat16``.
        autoencoder: file that is copied as ``ae.safetensors``; default: the one in ``source``, if it has one.
        shard_bytes: see ``export_weights``.

    Returns:
        Names of settings that only this package reads back, see ``export_weights``.

    Raises:
        FileNotFoundError: a part is missing; names it.
        ValueError: a part is damaged or does not fit; nothing is written.
        OSError: a file cannot be written; what was in ``folder`` is untouched.
    """
    source = Path(source)
    uses_flux = stored_config(source).latent.autoencoder == "flux"
    if autoencoder is None and uses_flux and (source / FLUX_WEIGHTS).is_file():
        autoencoder = source / FLUX_WEIGHTS
    if autoencoder is not None:
        if not uses_flux:
            raise ValueError(f"autoencoder is {str(autoencoder)!r}; it must be None: the model's latents are pixels")
        if not Path(autoencoder).is_file():
            raise FileNotFoundError(f"autoencoder weights {autoencoder} do not exist")
        with open_tensors(Path(autoencoder)):
            pass  # it is a whole safetensors file
    load_data_config(source)  # they are copied below: a damaged file is an error before anything is written
    load_guidance(source)
    tokenizer = load_tokenizer(source)
    with replaced_files(folder, _OUTDATED) as new:
        unsaid = export_weights(source, new, getattr(torch, dtype), shard_bytes)
        tokenizer.save(new)
        tokenizer.save_as_published(new)
        for name in (DATA_FILE, GUIDANCE_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
        if autoencoder is not None:
            shutil.copyfile(autoencoder, new / FLUX_WEIGHTS)
    return unsaid


def needs_autoencoder(folder: str | Path) -> bool:
    """Whether the model in ``folder`` takes latents of an autoencoder whose weights are not there."""
    folder = Path(folder)
    return stored_config(folder).latent.autoencoder == "flux" and not (folder / FLUX_WEIGHTS).is_file()
