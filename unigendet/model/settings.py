"""The settings beside a model's weights: our ``config.json``, or BAGEL's ``llm_config.json`` and ``vit_config.json``.

BAGEL's release also has a ``config.json``, which is Hugging Face's: one that says ``model_type`` or ``architectures``
is not ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.files import finish_replacing
from unigendet.model.shards import CheckpointError, JsonObject

CONFIG_FILE, LLM_FILE, VIT_FILE = "config.json", "llm_config.json", "vit_config.json"
# What a published file may say beside the sizes, and what it must say then: the model computes nothing else.
_LLM_MUST = {"hidden_act": "silu", "rope_scaling": None, "rope_type": "default", "use_sliding_window": False}
_VIT_MUST = {"hidden_act": "gelu_pytorch_tanh"}
_HUGGING_FACE = ("model_type", "architectures")


def has_own_config(folder: Path) -> bool:
    """Whether ``folder`` has a ``config.json`` that is ours, to the extent that it can be read."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True  # damaged: ``load_config`` says so
    return not (isinstance(values, dict) and any(name in values for name in _HUGGING_FACE))


def require_whole(folder: Path) -> None:
    """Finish a save that ended while the folder's files changed places; CheckpointError if that cannot be done."""
    try:
        finish_replacing(folder)
    except (OSError, UnicodeDecodeError) as error:  # a folder that cannot be written to, a damaged mark
        raise CheckpointError(
            f"{folder}: a save was interrupted while its files changed places, and cannot be finished now ({error}); "
            "make the folder writable, or save the model again"
        ) from error


def inside_hint(folder: Path) -> str:
    """Of a folder without a model: which one to name, if it has the form of a run's checkpoint; else nothing."""
    inside = [name for name in ("ema", "model") if (folder / name).is_dir()]
    return f"; it looks like a training checkpoint: name {folder / inside[0]}" if inside else ""


def load_config(path: str | Path) -> ModelConfig:
    """The settings beside the weights at ``path``: ``config.json``, or BAGEL's ``llm_`` and ``vit_config.json``.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: a file is damaged, or a setting in it is missing, unknown or unfit; names the file.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    require_whole(folder)
    if has_own_config(folder):
        try:
            return ModelConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:  # not JSON; an unknown or unfit setting; no mapping
            raise CheckpointError(f"{folder / CONFIG_FILE} does not hold a model's settings: {error}") from error
    if (folder / LLM_FILE).is_file() and (folder / VIT_FILE).is_file():
        try:
            llm, vit = JsonObject(folder / LLM_FILE), JsonObject(folder / VIT_FILE)
            llm.update(llm.pop("rope_parameters", None) or {})  # where transformers 5 has rope_theta
            vit.update(vit.pop("vision_config", None) or {})  # of a whole SigLIP
            return published_config(llm, vit)
        except CheckpointError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:  # an unfit setting
            raise CheckpointError(
                f"{folder}: {LLM_FILE} and {VIT_FILE} do not hold a model's settings: {error}"
            ) from error
    foreign = f" of ours ({CONFIG_FILE} is another model's)" if (folder / CONFIG_FILE).is_file() else ""
    raise FileNotFoundError(
        f"no settings{foreign} in {folder}: it holds neither {CONFIG_FILE} nor {LLM_FILE} and {VIT_FILE}"
        f"{inside_hint(folder)}"
    )


def published_config(llm: Mapping[str, Any], vit: Mapping[str, Any]) -> ModelConfig:
    """Settings from the contents of ``llm_config.json`` and ``vit_config.json``.

    They name neither heads, latents nor special tokens: these are BAGEL's, and both heads are there. Other entries do
    not matter: transformers writes many, and ``qk_norm`` and ``tie_word_embeddings`` are the model's whatever they say.

    Raises:
        KeyError, or CheckpointError from a ``JsonObject``: an entry is missing.
        ValueError: an entry asks for what the model does not compute, or a size is unfit.
    """
    for file, values, must in ((LLM_FILE, llm, _LLM_MUST), (VIT_FILE, vit, _VIT_MUST)):
        for name, value in must.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name} of {file} is {values[name]!r}; it must be {value!r}")
    head_dim = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
    if head_dim * llm["num_attention_heads"] != llm["hidden_size"]:
        raise ValueError(f"head_dim of {LLM_FILE} is {head_dim}; it must be hidden_size / num_attention_heads")
    return ModelConfig(
        hidden_size=llm["hidden_size"],
        intermediate_size=llm["intermediate_size"],
        num_layers=llm["num_hidden_layers"],
        num_heads=llm["num_attention_heads"],
        num_kv_heads=llm["num_key_value_heads"],
        vocab_size=llm["vocab_size"],
        rope_theta=llm["rope_theta"],
        rms_norm_eps=llm["rms_norm_eps"],
        max_position=llm["max_position_embeddings"],
        vision=VisionConfig(
            hidden_size=vit["hidden_size"],
            intermediate_size=vit["intermediate_size"],
            num_layers=vit["num_hidden_layers"] - 1,  # BAGEL reads the last but one layer
            num_heads=vit["num_attention_heads"],
            patch_size=vit["patch_size"],
            max_patches_per_side=vit["image_size"] // vit["patch_size"],
            num_channels=vit.get("num_channels", 3),
            layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        ),
        latent=LatentConfig(),
        special_tokens=SpecialTokens(),
    )


def published_settings(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of ``llm_config.json`` and ``vit_config.json`` for a model, as far as they can say it."""
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "qk_norm": True,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    vision = config.vision
    vit = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "image_size": vision.max_patches_per_side * vision.patch_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_layers + 1,
        "patch_size": vision.patch_size,
    }
    return llm, vit
