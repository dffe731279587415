"""A model folder's files: its settings, its autoencoder, and all that pictures and verdicts follow from."""

from __future__ import annotations

from pathlib import Path

from unigendet.config import ModelConfig
from unigendet.model.checkpoint import stored_config, weight_files

FLUX_WEIGHTS = "ae.safetensors"
# What pictures and verdicts follow from beside the weights; names that may be missing. Sampling settings
# (generation.json) are not among them: whoever uses them says which.
SETTINGS = ("config.json", "llm_config.json", "vit_config.json", "data.json", "tokenizer.json", "vocab.json",
            "merges.txt", "tokenizer_config.json", "added_tokens.json")  # fmt: skip


def folder_config(folder: str | Path) -> ModelConfig:
    """The settings of the model in ``folder``, see ``stored_config``.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        CheckpointError: the model's files are damaged.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    return stored_config(folder)


def autoencoder_file(folder: str | Path, config: ModelConfig, given: str | Path | None = None) -> Path | None:
    """The weights of the autoencoder: ``given``, or ``ae.safetensors`` in ``folder`` if the model needs any.

    Raises FileNotFoundError if it needs some, and none are given or in the folder.
    """
    if given is not None or config.latent.autoencoder != "flux":
        return None if given is None else Path(given)
    file = Path(folder) / FLUX_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; say where the autoencoder's weights are")
    return file


def model_files(folder: str | Path, config: ModelConfig, autoencoder: str | Path | None = None) -> list[Path]:
    """All files that the pictures and verdicts of the model in ``folder`` follow from: weights, settings, views,
    tokenizer, and the autoencoder's weights, see ``autoencoder_file``.
    """
    folder = Path(folder)
    settings = [path for name in SETTINGS if (path := folder / name).is_file()]
    weights = autoencoder_file(folder, config, autoencoder)
    return [*weight_files(folder), *settings, *([] if weights is None else [weights])]
