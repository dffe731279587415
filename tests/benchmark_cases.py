"""Packs with every kind of sample and a small model, for the tests of the baseline and of the counts of work."""

import dataclasses

import torch

from benchmarks import packs, published, traces
from unigendet.config import quickstart
from unigendet.model.losses import NoisedLatents, noise_latents, sample_timesteps
from unigendet.model.unigendet import UniGenDet

ALIGN, TEACHER = 2, 3
Segment = traces.Segment


def image(rows, columns, mode="full", *, latent=True):
    return Segment(rows * columns + 2, mode, latent, (rows, columns))


def text(tokens):
    return Segment(tokens, "causal")


def vit(rows, columns):
    return image(rows, columns, latent=False)


DETECTIONS = ((image(3, 4), vit(4, 3), text(5), text(9)), (image(2, 2), vit(1, 4), text(4), text(2)))
GENERATIONS = ((text(6), image(3, 4, "noise")), (text(2), image(2, 3, "noise")), (text(5), image(1, 1, "noise")))
TEACHERS = ((image(3, 4), text(7), vit(4, 3)), (image(2, 3), text(3), vit(2, 2)), (image(1, 1), text(6), vit(3, 1)))
TWO_IMAGES = (text(3), image(2, 3, "noise"), image(3, 1, "noise"), text(4))
EDIT = (image(2, 2), vit(2, 3), text(4), image(2, 4, "noise"))
GDUF = {
    "mixed": (DETECTIONS[0], GENERATIONS[0], TWO_IMAGES, DETECTIONS[1], EDIT, (text(6),)),
    "detection": DETECTIONS,
    "generation": GENERATIONS,
    "text": ((text(7),), (text(3),)),  # no token of the generation stream
}


def tiny_model(dtype):
    """Four layers of the quickstart's; weights let every input and both streams' own matter."""
    torch.manual_seed(0)
    model = UniGenDet(dataclasses.replace(quickstart(), num_layers=4)).to(dtype)
    with torch.no_grad():  # norm weights of 1 and biases of 0 would hide a mix-up of streams
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        torch.nn.init.normal_(model.llm2vae.weight, std=0.2)
    model.backend = "torch"
    return model


def prepared(samples, model, dtype=torch.float64):
    """A pack in both forms, and its noised latents."""
    trace = traces.Trace("test", samples)
    batch = packs.pack_of(trace, model.config)
    latents = NoisedLatents(None, None, None)
    if batch.latent_sizes:
        generator = torch.Generator().manual_seed(1)
        times = sample_timesteps(batch, 1.0, generator)
        shape = (batch.latent_positions.shape[0], model.config.latent.token_dim)
        latents = noise_latents(model, batch, times, torch.randn(shape, generator=generator))
    return batch, published.PublishedPack.of(batch, trace.splits, dtype), latents
