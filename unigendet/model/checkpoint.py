"""Weights under the published names: BAGEL's and UniGenDet's safetensors, single or sharded, in and out.

The model's parameters are fused (q, k, v in one matrix, gate and up in another); this file alone knows the published
names. A folder holds

* ours: ``config.json`` and ``model.safetensors`` (or shards with ``model.safetensors.index.json``);
* BAGEL's: ``llm_config.json``, ``vit_config.json`` and ``ema.safetensors``, which may be in shards too.

Nothing is guessed: a wrong path is an error, and every missing, unexpected or misshapen tensor.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unigendet.config import ModelConfig
from unigendet.files import naming, replaced_files
from unigendet.model.new_weights import draw_rows
from unigendet.model.rows import Part, Piece, find_pieces, read_rows, whole_shape
from unigendet.model.settings import CONFIG_FILE, LLM_FILE, has_own_config, inside_hint, load_config, require_whole
from unigendet.model.shards import CheckpointError, listed, open_tensors, outdated_names, shard_files, write_shards
from unigendet.model.unigendet import UniGenDet

OURS, PUBLISHED = "model", "ema"  # what files of weights are called in our folders, and in BAGEL's
OWN_WEIGHTS = tuple(outdated_names([OURS]))  # patterns of everything that a save may find of an earlier one
UNUSED = "latent_to_vit_connector."  # in the published files, used by nothing
PROJECTORS = {"mlp": "diga_mlp", "conv": "diga_conv"}  # φ's forms by their names in files
HEADS = {"class_head": "fake_cls_head", "align_head": PROJECTORS["mlp"]}  # what BAGEL's release lacks

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


def published_names(name: str) -> tuple[str, ...]:
    """Published names of our parameter ``name``; more than one where it is their concatenation along dimension 0."""
    for pattern, names in _COMPILED:
        if match := pattern.fullmatch(name):
            parts = {**match.groupdict(), "g": "_moe_gen" if match.groupdict().get("s") == "gen" else ""}
            return tuple(n.format(**parts) for n in names)
    raise KeyError(f"parameter {name!r} has no published name")


def published_parts(model: UniGenDet, others: Mapping[str, Tensor] | None = None) -> dict[str, Part]:
    """This process's rows of all weights under their published names; they share memory with the model.

    ``others``: by our name, rows that stand for this process's rows of a parameter: the averaged ones, say.
    """
    config = model.config
    qkv = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    parts: dict[str, Part] = {}
    for name, tensor in model.state_dict().items():
        names, part = published_names(name), Part.of(tensor)
        if others and name in others:
            part = dataclasses.replace(part, tensor=others[name])
        sizes = qkv if ".qkv." in name and name.startswith("decoder.") else [tensor.shape[0] // len(names)] * len(names)
        parts |= zip(names, part.split(sizes) if len(names) > 1 else [part], strict=True)
    return parts


def published_state_dict(model: UniGenDet) -> dict[str, Tensor]:
    """All weights of a model that is not divided, under their published names; they share memory with the model."""
    return {name: part.tensor for name, part in published_parts(model).items()}


def unused_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """What a published UniGenDet file holds for nothing: names and shapes, on the meta device."""
    hidden, tokens = config.hidden_size, config.latent.token_dim
    shapes = {"0.weight": (hidden, tokens), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {UNUSED + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def load_weights(model: UniGenDet, path: str | Path, *, initialize: Sequence[str] = ()) -> None:
    """Copy published weights from a folder or file into ``model`` (on a real device), converting to its dtypes.

    ``initialize``: published modules (say ``"fake_cls_head"``, ``"diga_mlp"``) that may be missing from the file as a
    whole and then keep the model's own initial weights. Where that is φ, the file's φ of another form is left aside.

    Raises:
        FileNotFoundError: there are no weights at ``path``.
        CheckpointError: tensors are missing, unexpected or misshapen, or a file is damaged.
    """
    load_parts(published_parts(model), path, initialize=initialize)


def load_parts(parts: Mapping[str, Part], path: str | Path, *, initialize: Sequence[str] = ()) -> None:
    """Copy published weights into ``parts``, those of all tensors of a model as of ``published_parts``.

    Other arguments, and errors: as in ``load_weights``.
    """
    found = find_tensors({name: part.shape for name, part in parts.items()}, path, initialize=initialize)
    read_rows(found, parts, as_published)  # only now: a checkpoint that does not fit leaves everything as it is


def check_weights(model: UniGenDet, path: str | Path, *, initialize: Sequence[str] = ()) -> None:
    """Raise ``load_weights``'s errors, and ValueError for an unknown module in ``initialize``; reads no tensor.

    ``model``: its sizes matter, so it may be on the ``meta`` device.
    """
    _published_modules(model, initialize)
    shapes = {name: part.shape for name, part in published_parts(model).items()}
    find_tensors(shapes, path, initialize=initialize)


def find_tensors(
    shapes: Mapping[str, Sequence[int]], path: str | Path, *, initialize: Sequence[str] = ()
) -> dict[str, list[Piece]]:
    """Where at ``path`` the rows of every tensor of a model are (``shapes``: by published name); reads no tensor.

    Arguments and errors as in ``load_weights``.
    """
    own = [module for module in PROJECTORS.values() if any(name.startswith(f"{module}.") for name in shapes)]
    asked = any(module in initialize for module in own)
    replaced = [f"{module}." for module in PROJECTORS.values() if asked and module not in own]
    stored = find_pieces(weight_files(path))
    found = {name: pieces for name, pieces in stored.items() if name in shapes}
    unexpected = [name for name in stored if name not in shapes and not name.startswith((UNUSED, *replaced))]
    misshapen = []
    for name, pieces in found.items():
        shape = _linear_shape(name, whole_shape(pieces))
        if shape != list(shapes[name]):
            misshapen.append(f"{name} is {shape}, the model needs {list(shapes[name])}")
    absent = [name for name in shapes if name not in found]
    whole = [m for m in initialize if all(n in absent for n in shapes if n.startswith(m + "."))]
    missing = [name for name in absent if not name.startswith(tuple(m + "." for m in whole))]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
        remedy = _remedy(missing, [*unexpected, *misshapen])
        raise CheckpointError(f"{path} does not fit the model. Tensors {'; '.join(lines)}. {remedy}")
    return found


def _remedy(missing: Sequence[str], others: Sequence[str]) -> str:
    """What to do about tensors that are missing and ``others`` that do not fit."""
    projectors = set(PROJECTORS.values())
    modules = list(dict.fromkeys(name.partition(".")[0] for name in missing))
    replaced = projectors - set(modules) if projectors & set(modules) else set()  # φ afresh leaves its other form aside
    others = [name for name in others if name.partition(".")[0] not in replaced]
    if not others and set(modules) <= {HEADS["class_head"], *projectors}:
        return f"To start {' and '.join(modules)} afresh, name them in initialize (training: model.initialize)"
    return "The weights must be those of a model with the settings beside them, or with those that were given"


def _is_kernel(name: str, shape: Sequence[int]) -> bool:
    return name.endswith("embeddings.patch_embedding.weight") and len(shape) == 4


def _linear_shape(name: str, shape: Sequence[int]) -> list[int]:
    """The shape of what ``as_published`` makes of a tensor."""
    return [shape[0], shape[1] * shape[2] * shape[3]] if _is_kernel(name, shape) else list(shape)


def as_published(name: str, value: Tensor) -> Tensor:
    """A tensor, or rows of it, in the published form: a patch embedding that is a conv kernel [out, C, p, p] becomes a
    linear weight in (row, column, channel) order.
    """
    return value.permute(0, 2, 3, 1).flatten(1) if _is_kernel(name, value.shape) else value


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files at ``path``, a file or a folder.

    Raises:
        FileNotFoundError: there are none, or not all that the index names.
        CheckpointError: the index is damaged, or a save was interrupted and cannot be finished.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    require_whole(path)
    published = (path / LLM_FILE).is_file() and not has_own_config(path)
    # BAGEL's folder also has a model.safetensors.index.json, for other programs.
    for stem in (PUBLISHED, OURS) if published else (OURS, PUBLISHED):
        if files := shard_files(path, stem):
            return files
    raise FileNotFoundError(
        f"no weights in {path}: it holds none of model.safetensors, ema.safetensors, and no index of their shards"
        f"{inside_hint(path)}"
    )


def stored_config(path: str | Path) -> ModelConfig:
    """As ``load_config``, with the heads that the weights hold where the settings, BAGEL's, know nothing of heads.

    For inference: BAGEL's release itself has neither head and generates without.
    """
    files = weight_files(path)
    config = load_config(path)
    if has_own_config(files[0].parent):
        return config
    names: set[str] = set()
    for file in files:
        with open_tensors(file) as tensors:
            names.update(tensors.keys())
    found = {field: any(name.startswith(module + ".") for name in names) for field, module in HEADS.items()}
    return dataclasses.replace(config, **found)


def load_pretrained(
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    initialize: Sequence[str] = (),
    shard: Callable[[UniGenDet], UniGenDet] | None = None,
) -> UniGenDet:
    """A model with the weights at ``path``.

    Args:
        path: folder or safetensors file.
        config: settings; default: those beside the weights.
        device: where the parameters go.
        dtype: of the parameters; default float32.
        initialize: modules that may be missing and are then freshly initialised, see ``load_weights``. Their weights
            are drawn on the CPU, so that they depend neither on the device nor on the number of processes.
        shard: divides a model on the ``meta`` device among processes and allocates this one's part
            (``training.parallel``); only this part is then read. Default: the model is whole, on ``device``.

    Raises:
        FileNotFoundError: no weights or no settings at ``path``.
        CheckpointError: the weights do not fit.
    """
    weight_files(path)  # before anything is built: a wrong path must not cost minutes
    config = config or load_config(path)
    with torch.device("meta"):
        model = UniGenDet(config)
    model = model.to(dtype or torch.float32)
    fresh = [copy.deepcopy(module) for module in _published_modules(model, initialize)]
    model = model.to_empty(device=device) if shard is None else shard(model)
    for whole, own in zip(fresh, _published_modules(model, initialize), strict=True):
        draw_rows(whole, own)
    load_weights(model, path, initialize=initialize)
    return model


def _published_modules(model: UniGenDet, names: Iterable[str]) -> list[nn.Module]:
    modules = {"fake_cls_head": model.class_head, PROJECTORS[model.config.align_projector]: model.align_head}
    unknown = [name for name in names if modules.get(name) is None]
    if unknown:
        optional = [name for name, module in modules.items() if module is not None]
        name = "initialize (training: model.initialize)"
        raise ValueError(f"{name} names {unknown}; the model's modules that may be missing are {optional}")
    return [modules[name] for name in names]


def save_pretrained(model: UniGenDet, folder: str | Path) -> None:
    """Write ``config.json`` and the weights under their published names, in shards of at most 5 GiB.

    A new folder appears whole. In one that is there, the earlier save stays whole until all of the new one is on the
    disk; should the process end while the files then change places, the next to load finishes that
    (``files.replaced_files``).

    Raises:
        OSError: a file cannot be written; names it. The earlier save is untouched.
    """
    with replaced_files(folder, OWN_WEIGHTS) as new:
        write_pretrained(model, new)


def write_pretrained(model: UniGenDet, folder: Path) -> None:
    """As ``save_pretrained``, straight into a folder of which nobody reads yet."""
    write_weights(model, folder)
    write_config(model.config, folder)


def write_weights(model: UniGenDet, folder: Path) -> None:
    """Write the weights alone."""
    parts = published_state_dict(model)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in parts.items()}
    # A copy: parts of one fused parameter share memory, which a safetensors file cannot express.
    write_shards(sizes, lambda name: parts[name].detach().to("cpu", copy=True).contiguous(), folder, OURS)


def write_config(config: ModelConfig, folder: Path) -> None:
    """Write ``config.json`` alone."""
    with naming(folder / CONFIG_FILE):
        (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
