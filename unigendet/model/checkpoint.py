"""Weights under the published names: BAGEL's and UniGenDet's safetensors, single or sharded, in and out.

The model's parameters are fused (q, k, v in one matrix, gate and up in another); this file alone knows the published
names. A folder holds

* ours: ``config.json`` and ``model.safetensors`` (or shards with ``model.safetensors.index.json``);
* BAGEL's: ``llm_config.json``, ``vit_config.json`` and ``ema.safetensors``.

Nothing is guessed: a wrong path is an error, and every missing, unexpected or misshapen tensor; all are listed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.model.unigendet import UniGenDet, init_weights

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PROJECTORS = {"mlp": "diga_mlp", "conv": "diga_conv"}  # φ's forms by their names in files
UNUSED = ("latent_to_vit_connector.",)  # in the published files, used by nothing
SHARD_BYTES = 5 * 2**30

_LAYER = "language_model.model.layers.{i}."
_VIT = "vit_model.vision_model."
# Our name → published names, concatenated along the rows. {i}: layer number; {g}: "" or "_moe_gen", the stream.
_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"decoder\.layers\.(?P<i>\d+)\.norm1\.(?P<s>und|gen)", (_LAYER + "input_layernorm{g}.weight",)),
    (r"decoder\.layers\.(?P<i>\d+)\.norm2\.(?P<s>und|gen)", (_LAYER + "post_attention_layernorm{g}.weight",)),
    (
        r"decoder\.layers\.(?P<i>\d+)\.qkv\.(?P<s>und|gen)\.(?P<k>weight|bias)",
        tuple(_LAYER + f"self_attn.{x}_proj{{g}}.{{k}}" for x in "qkv"),
    ),
    (r"decoder\.layers\.(?P<i>\d+)\.(?P<n>q_norm|k_norm)\.(?P<s>und|gen)", (_LAYER + "self_attn.{n}{g}.weight",)),
    (r"decoder\.layers\.(?P<i>\d+)\.out\.(?P<s>und|gen)\.weight", (_LAYER + "self_attn.o_proj{g}.weight",)),
    (
        r"decoder\.layers\.(?P<i>\d+)\.gate_up\.(?P<s>und|gen)\.weight",
        tuple(_LAYER + f"mlp{{g}}.{x}_proj.weight" for x in ("gate", "up")),
    ),
    (r"decoder\.layers\.(?P<i>\d+)\.down\.(?P<s>und|gen)\.weight", (_LAYER + "mlp{g}.down_proj.weight",)),
    (r"decoder\.norm\.(?P<s>und|gen)", ("language_model.model.norm{g}.weight",)),
    (r"embed_tokens\.weight", ("language_model.model.embed_tokens.weight",)),
    (r"lm_head\.weight", ("language_model.lm_head.weight",)),
    (r"vision\.(?P<n>patch_embedding|position_embedding)\.(?P<k>weight|bias)", (_VIT + "embeddings.{n}.{k}",)),
    (
        r"vision\.layers\.(?P<i>\d+)\.norm(?P<n>[12])\.(?P<k>weight|bias)",
        (_VIT + "encoder.layers.{i}.layer_norm{n}.{k}",),
    ),
    (
        r"vision\.layers\.(?P<i>\d+)\.qkv\.(?P<k>weight|bias)",
        tuple(_VIT + f"encoder.layers.{{i}}.self_attn.{x}_proj.{{k}}" for x in "qkv"),
    ),
    (r"vision\.layers\.(?P<i>\d+)\.out\.(?P<k>weight|bias)", (_VIT + "encoder.layers.{i}.self_attn.out_proj.{k}",)),
    (r"vision\.layers\.(?P<i>\d+)\.mlp\.(?P<n>fc[12])\.(?P<k>weight|bias)", (_VIT + "encoder.layers.{i}.mlp.{n}.{k}",)),
    (r"vision\.norm\.(?P<k>weight|bias)", (_VIT + "post_layernorm.{k}",)),
    (r"(?P<n>connector\.fc[12]|vae2llm|llm2vae)\.(?P<k>weight|bias)", ("{n}.{k}",)),
    (r"(?P<n>vit|latent)_table", ("{n}_pos_embed.pos_embed",)),
    (r"time_embedding\.fc1\.(?P<k>weight|bias)", ("time_embedder.mlp.0.{k}",)),
    (r"time_embedding\.fc2\.(?P<k>weight|bias)", ("time_embedder.mlp.2.{k}",)),
    (r"class_head\.(?P<n>\d)\.(?P<k>weight|bias)", ("fake_cls_head.{n}.{k}",)),
    (r"align_head\.fc1\.(?P<k>weight|bias)", ("diga_mlp.0.{k}",)),
    (r"align_head\.fc2\.(?P<k>weight|bias)", ("diga_mlp.2.{k}",)),
    (r"align_head\.conv\.(?P<k>weight|bias)", ("diga_conv.{k}",)),  # no published model has it
)
_COMPILED = tuple((re.compile(pattern), names) for pattern, names in _RULES)


class CheckpointError(ValueError):
    """A checkpoint does not fit the model; the message lists every tensor concerned."""


def published_names(name: str) -> tuple[str, ...]:
    """Published names of our parameter ``name``; more than one where it is their concatenation along dimension 0."""
    for pattern, names in _COMPILED:
        if match := pattern.fullmatch(name):
            parts = {**match.groupdict(), "g": "_moe_gen" if match.groupdict().get("s") == "gen" else ""}
            return tuple(n.format(**parts) for n in names)
    raise KeyError(f"parameter {name!r} has no published name")


def _parts(model: UniGenDet) -> Iterator[tuple[str, Tensor]]:
    """Every published tensor of the model, as a view of the parameter that holds it."""
    config = model.config
    qkv = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    for name, tensor in model.state_dict().items():
        names = published_names(name)
        sizes = qkv if ".qkv." in name and name.startswith("decoder.") else [tensor.shape[0] // len(names)] * len(names)
        yield from zip(names, tensor.split(sizes) if len(names) > 1 else [tensor], strict=True)


def published_state_dict(model: UniGenDet) -> dict[str, Tensor]:
    """All weights under their published names; tensors share memory with the model."""
    return dict(_parts(model))


def load_weights(model: UniGenDet, path: str | Path, *, initialize: Sequence[str] = ()) -> None:
    """Copy published weights from a folder or file into ``model`` (on a real device), converting to its dtypes.

    ``initialize``: published modules (say ``"fake_cls_head"``, ``"diga_mlp"``) that may be missing from the file as a
    whole and then keep the model's own initial weights. Where that is φ, the file's φ of another form is left aside.

    Raises:
        FileNotFoundError: there are no weights at ``path``.
        CheckpointError: tensors are missing, unexpected or misshapen, or a file is damaged.
    """
    files = weight_files(path)
    targets = published_state_dict(model)
    own = PROJECTORS[model.config.align_projector]
    replaced = [f"{name}." for name in PROJECTORS.values() if own in initialize and name != own]
    found: dict[str, str] = {}
    unexpected, misshapen = [], []
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                target = targets.get(name)
                if name in found:
                    unexpected.append(f"{name} (in {found[name]} and again in {file.name})")
                elif target is None:
                    if not name.startswith((*UNUSED, *replaced)):
                        unexpected.append(name)
                    continue
                found[name] = file.name
                shape = _linear_shape(name, tensors.get_slice(name).get_shape())
                if shape != list(target.shape):
                    misshapen.append(f"{name} is {shape}, the model needs {list(target.shape)}")
    absent = [name for name in targets if name not in found]
    whole = [m for m in initialize if all(n in absent for n in targets if n.startswith(m + "."))]
    missing = [name for name in absent if not name.startswith(tuple(m + "." for m in whole))]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
        raise CheckpointError(f"{path} does not fit the model. Tensors " + "; ".join(lines))
    for file in files:  # only now: a checkpoint that does not fit leaves the model as it is
        with _open(file) as tensors, torch.no_grad():
            for name in found.keys() & set(tensors.keys()):
                targets[name].copy_(_as_linear(name, tensors.get_tensor(name)))


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a complete safetensors file: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises CheckpointError if it is damaged."""
    with _open(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def _is_kernel(name: str, shape: Sequence[int]) -> bool:
    return name.endswith("embeddings.patch_embedding.weight") and len(shape) == 4


def _linear_shape(name: str, shape: list[int]) -> list[int]:
    """The shape of what ``_as_linear`` makes of a tensor."""
    return [shape[0], shape[1] * shape[2] * shape[3]] if _is_kernel(name, shape) else shape


def _as_linear(name: str, value: Tensor) -> Tensor:
    """A patch embedding stored as a conv kernel [out, C, p, p], as a linear weight in (row, column, channel) order."""
    return value.permute(0, 2, 3, 1).flatten(1) if _is_kernel(name, value.shape) else value


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files at ``path``, a file or a folder.

    Raises:
        FileNotFoundError: there are none, or not all that the index names.
        CheckpointError: the index names none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    if (path / INDEX_FILE).is_file():
        weight_map = _Settings(path / INDEX_FILE)["weight_map"]
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(name, str) for name in files):
            raise CheckpointError(
                f"{path / INDEX_FILE}: weight_map is {str(weight_map)[:80]}; it must give the file of every tensor"
            )
        names = sorted(set(files))
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{path / INDEX_FILE} names shards that are not there: {absent}")
        return [path / name for name in names]
    for name in (WEIGHTS_FILE, "ema.safetensors"):
        if (path / name).is_file():
            return [path / name]
    raise FileNotFoundError(f"no weights in {path}: it holds none of {INDEX_FILE}, {WEIGHTS_FILE}, ema.safetensors")


def load_config(path: str | Path) -> ModelConfig:
    """The settings beside the weights at ``path``: ``config.json``, or BAGEL's ``llm_`` and ``vit_config.json``.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: a file is damaged, or a setting in it is missing, unknown or unfit; names the file.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / CONFIG_FILE).is_file():
        try:
            return ModelConfig.from_dict(json.loads((folder / CONFIG_FILE).read_text()))
        except (ValueError, TypeError, AttributeError) as error:  # not JSON; an unknown or unfit setting; no mapping
            raise CheckpointError(f"{folder / CONFIG_FILE} does not hold a model's settings: {error}") from error
    if (folder / "llm_config.json").is_file() and (folder / "vit_config.json").is_file():
        try:
            return _bagel_config(_Settings(folder / "llm_config.json"), _Settings(folder / "vit_config.json"))
        except CheckpointError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:  # an unfit setting
            raise CheckpointError(
                f"{folder}: llm_config.json and vit_config.json do not hold a model's settings: {error}"
            ) from error
    raise FileNotFoundError(
        f"no settings in {folder}: it holds neither {CONFIG_FILE} nor llm_config.json and vit_config.json"
    )


def stored_config(path: str | Path) -> ModelConfig:
    """As ``load_config``, with the heads that the weights hold where the settings, BAGEL's, know nothing of heads.

    For inference: BAGEL's release itself has neither head and generates without.
    """
    files = weight_files(path)
    config = load_config(path)
    if (files[0].parent / CONFIG_FILE).is_file():
        return config
    names: set[str] = set()
    for file in files:
        with _open(file) as tensors:
            names.update(tensors.keys())
    heads = {"class_head": "fake_cls_head.", "align_head": "diga_mlp."}
    found = {field: any(name.startswith(prefix) for name in names) for field, prefix in heads.items()}
    return dataclasses.replace(config, **found)


class _Settings(dict[str, Any]):
    """The object in a JSON file. A damaged file or a missing key is an error that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} holds a {type(values).__name__}; it must hold an object")
        super().__init__(values)

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self._file} has no {key!r}; it has {sorted(self)}")


def _bagel_config(llm: dict[str, Any], vit: dict[str, Any]) -> ModelConfig:
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
            layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        ),
        latent=LatentConfig(),
        special_tokens=SpecialTokens(),
    )


def load_pretrained(
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    initialize: Sequence[str] = (),
) -> UniGenDet:
    """A model with the weights at ``path``.

    Args:
        path: folder or safetensors file.
        config: settings; default: those beside the weights.
        device: where the parameters go.
        dtype: of the parameters; default float32.
        initialize: modules that may be missing and are then freshly initialised, see ``load_weights``.

    Raises:
        FileNotFoundError: no weights or no settings at ``path``.
        CheckpointError: the weights do not fit.
    """
    weight_files(path)  # before anything is built: a wrong path must not cost minutes
    config = config or load_config(path)
    with torch.device("meta"):
        model = UniGenDet(config)
    model = model.to(dtype or torch.float32).to_empty(device=device)
    for module in _published_modules(model, initialize):
        init_weights(module)
    load_weights(model, path, initialize=initialize)
    return model


def _published_modules(model: UniGenDet, names: Iterable[str]) -> list[nn.Module]:
    modules = {"fake_cls_head": model.class_head, PROJECTORS[model.config.align_projector]: model.align_head}
    unknown = [name for name in names if modules.get(name) is None]
    if unknown:
        optional = [name for name, module in modules.items() if module is not None]
        raise ValueError(f"initialize names {unknown}; the model's modules that may be missing are {optional}")
    return [modules[name] for name in names]


def save_pretrained(model: UniGenDet, folder: str | Path) -> None:
    """Write ``config.json`` and the weights under their published names, in shards of at most 5 GiB.

    Each file appears whole or not at all: all are written under other names first. An earlier save's weights go.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _parts(model):
        size += tensor.numel() * tensor.element_size()
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = tensor.numel() * tensor.element_size()
        shards[-1][name] = tensor.detach().cpu().contiguous().clone()
    files = (
        [WEIGHTS_FILE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / (file + ".tmp"), metadata={"format": "pt"})
    for file in files:
        (folder / (file + ".tmp")).replace(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write(folder / INDEX_FILE, json.dumps({"weight_map": weight_map}, indent=1))
    else:
        (folder / INDEX_FILE).unlink(missing_ok=True)  # an earlier save's: it would go before the new file
    _write(folder / CONFIG_FILE, json.dumps(model.config.to_dict(), indent=2))
    for old in (folder / WEIGHTS_FILE, *folder.glob("model-*-of-*.safetensors")):
        if old.name not in files:
            old.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
