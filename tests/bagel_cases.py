"""A batch for the stand-in of BAGEL, what it gives, and how equal two results must be."""

import torch
from bagel_stand_in import Outer, Sizes

from unigendet.integrations import bagel_forward

TOLERANCE = 1e-5  # of the largest value: the arithmetic is float32 in another order
# Padding is the last sample, as BAGEL's data sets write it.
SAMPLES = [
    [(6, "causal"), (9, "noise")],
    [(5, "causal"), (11, "full"), (7, "causal")],
    [(1, "causal")],
    [(4, "full"), (6, "noise"), (3, "causal")],
]
PADDING = 12
GENERATION = [*range(7, 14), *range(21, 30), *range(44, 48)]


def batch(latents=True, seed=0):
    """The arguments of the outer model; text rows in any order."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(n for sample in SAMPLES for n, _ in sample)
    gen = torch.tensor(GENERATION)
    text = [row for row in range(tokens) if not latents or row not in GENERATION]
    text = torch.tensor(text)[torch.randperm(len(text), generator=generator)]
    optional = {"packed_latents": torch.randn(len(gen), 6, generator=generator), "packed_vae_token_indexes": gen}
    return {
        "sequence_length": tokens,
        "packed_text_ids": torch.randint(40, (len(text),), generator=generator),
        "packed_text_indexes": text,
        "sample_lens": [*(sum(n for n, _ in sample) for sample in SAMPLES), PADDING],
        "packed_position_ids": torch.randint(20, (tokens,), generator=generator),
        "split_lens": [*(n for sample in SAMPLES for n, _ in sample), PADDING],
        "attn_modes": [*(mode for sample in SAMPLES for _, mode in sample), "causal"],
        **(optional if latents else {}),
    }


def outer(seed=0, **sizes):
    torch.manual_seed(seed)
    return Outer(Sizes(**sizes))


def decoder_of(model):
    return model.language_model.model


def gradients(model, arguments):
    """The output, and the gradients of a weighted sum of it by parameter; zeros where there is none."""
    model.zero_grad()
    out = model(**arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (out * weight).sum().backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return {"output": out.detach(), **grads}


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        error = (found[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-3), f"{name}: {error}"


def counting_layers(monkeypatch):
    """A function that tells how often a layer ran on the ops so far.

    A replacement that is never called would pass every comparison.
    """
    calls, original = [], bagel_forward.rms_norm
    monkeypatch.setattr(bagel_forward, "rms_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
    return lambda: len(calls) // 2
