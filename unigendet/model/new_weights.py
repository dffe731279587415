"""New weights where parameters are divided among processes: drawn one module at a time, so that none holds them whole.

Every process draws all of them, on the CPU and in the order in which a whole model does, and keeps its own rows. So
they depend on the seed alone: not on the device, nor on the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from unigendet.config import ModelConfig
from unigendet.model.rows import Part
from unigendet.model.unigendet import UniGenDet, init_weights, position_tables


@torch.no_grad()
def new_model(config: ModelConfig, shard: Callable[[UniGenDet], UniGenDet]) -> UniGenDet:
    """``UniGenDet(config)``, drawn on the CPU, of which this process has its part.

    ``shard`` divides a model on the ``meta`` device among processes and allocates this one's part
    (``training.parallel``).
    """
    with torch.device("meta"):
        whole = UniGenDet(config)
    model = shard(copy.deepcopy(whole))
    for _, part in _materialised(whole):
        part.reset_parameters()  # what modules draw when they are made: nobody sees it, but the generator moves on
    draw_rows(whole, model)
    model.scale_new_weights()
    for name, table in position_tables(config).items():
        getattr(model, name).copy_(table)
    return model


@torch.no_grad()
def draw_rows(whole: nn.Module, own: nn.Module) -> None:
    """``init_weights`` of ``whole``, on the ``meta`` device; ``own``, the same module, gets the rows that it holds."""
    for name, part in _materialised(whole):
        init_weights(part)
        parameters = own.get_submodule(name).parameters(recurse=False)
        for drawn, parameter in zip(part.parameters(recurse=False), parameters, strict=True):
            rows = Part.of(parameter)
            rows.tensor.copy_(drawn[rows.row : rows.end])


def _materialised(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters themselves, each on the CPU, uninitialised, until the next one comes.

    All of them have the same memory, as much as the largest needs: what is freed need not come back to be used again.
    """
    own = {name: dict(part.named_parameters(recurse=False)) for name, part in module.named_modules()}
    most = max(sum(parameter.numel() for parameter in parameters.values()) for parameters in own.values())
    memory = torch.empty(most, dtype=next(module.parameters()).dtype, device="cpu")
    for name, parameters in own.items():
        if not parameters:
            continue
        part, first = module.get_submodule(name), 0
        for key, parameter in parameters.items():
            room = memory[first : first + parameter.numel()]
            setattr(part, key, nn.Parameter(room.view(parameter.shape)))
            first += parameter.numel()
        yield name, part
        for key, parameter in parameters.items():
            setattr(part, key, parameter)
