"""BAGEL's decoder on our ops: ``accelerate(model)``, and ``restore(model)`` to undo it.

``model`` is one that has the modules and call signatures of BAGEL (arXiv 2505.14683) with ``Qwen2MoTDecoderLayer``: two
weight sets side by side in every layer, the second with the suffix ``_moe_gen``. Its parameters stay where they are,
under their names. What changes is three kinds of ``forward``, as attributes of the instances:

* the outer model's takes split lengths and modes out of its arguments and passes on a :class:`SplitMask` where a mask
  would go, so that no mask is built;
* the inner model's (``forward_train``, ``forward_inference`` and UniGenDet's ``forward_diga``) make the pass's
  ``Layout``, sort the rows by stream, let the original go through the layers, and sort the result back;
* a layer's is ``rms_norm``, ``stream_linear``, ``qk_norm_rope``, ``symbiotic_attention`` and ``swiglu`` on rows that
  are sorted by stream. It gathers and scatters nothing.

A replacement keeps nothing but its instance, and finds the original on that one's class. So a deep copy of an
accelerated model is an accelerated model of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from unigendet.integrations.bagel_forward import (
    GENERATION,
    DecoderForward,
    LayerForward,
    OuterForward,
    Projections,
    SplitMask,
    hook_problems,
)
from unigendet.integrations.fused import fuse

__all__ = ["SplitMask", "accelerate", "restore"]

_OUTER_ARGUMENTS = ("sequence_length", "sample_lens", "split_lens", "attn_modes", "nested_attention_masks")
_DECODER_FORWARDS = ("forward_train", "forward_diga", "forward_inference")
_NEEDED_FORWARDS = ("forward_train", "forward_inference")
_NORMS = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
_SHOWN_PROBLEMS = 12


def accelerate(model: nn.Module) -> nn.Module:
    """Let ``model`` compute its decoder with this package's ops, with equal outputs and gradients.

    Args:
        model: the outer model (with ``language_model``), its ``Qwen2ForCausalLM``, or that one's ``Qwen2Model``. Only
            the outer one takes splits out of its arguments; the others must be given a :class:`SplitMask`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has another structure; the message lists what is missing or unknown.
    """
    outer, decoder = _find(model)
    layers = [_unwrapped(layer) for layer in decoder.layers]
    replacements = list(_replacements(outer, decoder, layers))
    problems = list(_model_problems(outer, decoder))
    for i, layer in enumerate(layers):
        problems += [f"layers.{i}.{problem}" for problem in _layer_problems(layer)]
    for module, name, function in replacements:
        if name in vars(module) and not _is_known(module, name, function):
            problems.append(f"{type(module).__name__}.{name} is replaced already, by something else")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
        more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ValueError(f"model must be built like BAGEL with Qwen2MoTDecoderLayer:\n  {shown}{more}")
    for layer in layers:
        for stream in (stream for projection in Projections.of(layer) for stream in projection):
            fuse([module.weight for module in stream])
            if stream[0].bias is not None:
                fuse([module.bias for module in stream])
    for module, name, function in replacements:
        setattr(module, name, MethodType(function, module))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: ``model`` computes as its classes say. Its parameters are left alone."""
    outer, decoder = _find(model)
    layers = [_unwrapped(layer) for layer in decoder.layers]
    for module, name, function in _replacements(outer, decoder, layers):
        if _is_known(module, name, function):
            delattr(module, name)
    return model


def _replacements(
    outer: nn.Module | None, decoder: nn.Module, layers: list[nn.Module]
) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """(module, name of its method, what takes the method's place)."""
    if outer is not None:
        yield outer, "forward", OuterForward.forward
    for name in _DECODER_FORWARDS:
        if hasattr(type(decoder), name):
            yield decoder, name, getattr(DecoderForward, name)
    for layer in layers:
        yield layer, "forward", LayerForward.forward


def _is_known(module: nn.Module, name: str, function: Callable[..., Any]) -> bool:
    """Whether the instance's attribute is ``function``, or the class's own method.

    The latter is what ours becomes when a whole model is saved and loaded.
    """
    found = getattr(vars(module).get(name), "__func__", None)
    return found is not None and found in (function, getattr(type(module), name))


def _find(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """(the outer model, if ``model`` is one; the inner model)."""
    causal = getattr(model, "language_model", model)
    decoder = getattr(causal, "model", causal)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(
            f"model is a {type(model).__name__}; it must have language_model.model.layers, model.layers or layers"
        )
    return (model if causal is not model else None), decoder


def _unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside PyTorch's wrapper for activation checkpointing."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def _model_problems(outer: nn.Module | None, decoder: nn.Module) -> Iterator[str]:
    name = type(decoder).__name__
    yield from (f"{name} has no {method}" for method in _NEEDED_FORWARDS if not hasattr(type(decoder), method))
    act = getattr(getattr(decoder, "config", None), "hidden_act", None)
    if act not in ("silu", "swish"):
        yield f"{name}.config.hidden_act is {act!r}; it must be 'silu'"
    if outer is not None:
        known = inspect.signature(type(outer).forward).parameters
        name = type(outer).__name__
        yield from (
            f"{name}.forward has no argument {argument}" for argument in _OUTER_ARGUMENTS if argument not in known
        )


def _layer_problems(layer: nn.Module) -> Iterator[str]:
    """What a layer lacks, or has and would be passed over."""
    eps = getattr(getattr(layer, "input_layernorm", None), "variance_epsilon", None)
    for suffix in ("", GENERATION):
        linear = [f"self_attn.{name}{suffix}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linear += [f"mlp{suffix}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        norms = [f"{name}{suffix}" for name in _NORMS]
        modules = {name: _get(layer, name) for name in (*linear, *norms)}
        yield from (f"{name} is missing" for name, module in modules.items() if module is None)
        for name in linear:
            if modules[name] is not None and type(modules[name]) is not nn.Linear:
                yield f"{name} is a {type(modules[name]).__name__}; it must be a Linear"
        for name in norms:
            if modules[name] is not None and not isinstance(getattr(modules[name], "weight", None), Tensor):
                yield f"{name} is a {type(modules[name]).__name__}; it must be an RMSNorm with a weight"
            elif modules[name] is not None and getattr(modules[name], "variance_epsilon", None) is None:
                yield f"{name} is a {type(modules[name]).__name__} without variance_epsilon; it must have one"
            elif modules[name] is not None and eps not in (None, modules[name].variance_epsilon):
                yield f"{name}.variance_epsilon is not that of input_layernorm, {eps}"
        for group in (linear[:3], linear[4:6]):
            if len({getattr(modules[name], "bias", None) is None for name in group}) > 1:
                yield f"{', '.join(group)}: all or none of them must have a bias"
    yield from hook_problems(layer)


def _get(layer: nn.Module, path: str) -> nn.Module | None:
    module = layer
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
