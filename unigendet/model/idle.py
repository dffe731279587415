"""Terms that are zero and make gradients of zeros, for modules that a pack has no use for.

Where several processes share a model's parameters, all of them gather a parameter and sum its gradient, or none does.
A process whose pack has no ViT image, say, must therefore take part in what the others do with the ViT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def nothing_from(*modules: nn.Module) -> Tensor:
    """A scalar 0 whose gradient is zeros for every parameter of ``modules`` that learns."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    empty = [p.flatten()[:0].sum() for p in parameters]
    return torch.stack(empty).sum() if empty else torch.zeros((), device=next(modules[0].parameters()).device)
