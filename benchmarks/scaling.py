"""Whether cost follows the useful work: attention, and a decoder layer, over packs that differ in one respect.

=============== ====================================================================================================
``tokens``      packs of 4k to 128k tokens, of detection and generation samples of one kind of size
``image_size``  detection samples with square images of 128 to 1024 pixels, as many as fit
``text_share``  samples of 2,048 tokens, of which a share is text and the rest a latent image
``samples``     one pack's tokens in 1 to 256 samples, each half text, half images
=============== ====================================================================================================

Forward and backward together; a layer on CPUs up to 32k tokens, where one takes seconds. Cost per useful operation
should stay flat: more time should mean more work, not another shape of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from . import attention, decoder_layer, packs, traces
from .candidate import Candidate
from .harness import CannotRun
from .traces import Sample, Segment, Trace

TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
IMAGE_SIDES = (128, 256, 512, 768, 1024)
TEXT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = (1, 4, 16, 64, 256)
SHARE_SAMPLE = 2048  # tokens of a sample in ``text_share``
MOST_TOKENS_OF_A_LAYER = 32768  # on CPUs
CANDIDATES = ("triton", "flash", "torch", "cpp", "sdpa_dense_mask")  # without those that compile anew for every pack


def sweeps(size: str, *, on_gpu: bool) -> Iterator[tuple[str, float, Trace]]:
    """(sweep, x, pack); one pack has 32k tokens on GPUs and 8k on CPUs, but for ``tokens``."""
    if size != "full":
        for tokens in (256,) if size == "tiny" else (2048, 4096):
            yield "tokens", tokens, _trace("tokens", tokens, tokens_pack(tokens))
        return
    total = 32768 if on_gpu else 8192
    for tokens in TOKENS:
        yield "tokens", tokens, _trace("tokens", tokens, tokens_pack(tokens))
    for side in IMAGE_SIDES:
        yield "image_size", side, _trace("image_size", side, image_pack(side, total))
    for share in TEXT_SHARES:
        yield "text_share", share, _trace("text_share", share, share_pack(share, total))
    for number in SAMPLES:
        yield "samples", number, _trace("samples", number, equal_pack(number, total))


def _trace(sweep: str, x: float, samples: tuple[Sample, ...]) -> Trace:
    return Trace(f"{sweep}_{x:g}", samples)


def tokens_pack(tokens: int) -> tuple[Sample, ...]:
    """Samples of the trace ``gduf_4k``'s kind up to a number of tokens; one at least."""
    return traces.fill_for_cpus(tokens) or (image_sample(64),)


def image_sample(side: int) -> Sample:
    """A detection sample with a square image of ``side`` pixels (docs/model.md §2)."""
    latent, vit = side // traces.LATENT_PATCH, min(side, traces.VIT_LARGEST) // traces.VIT_PATCH
    return (
        Segment(latent * latent + 2, "full", True, (latent, latent)),
        Segment(vit * vit + 2, "full", False, (vit, vit)),
        Segment(40, "causal"),
        Segment(120, "causal"),
    )


def image_pack(side: int, total: int) -> tuple[Sample, ...]:
    """As many samples with that image as fit into ``total`` tokens; one at least."""
    sample = image_sample(side)
    return (sample,) * max(1, total // sum(segment.tokens for segment in sample))


def share_pack(share: float, total: int) -> tuple[Sample, ...]:
    """Samples of 2,048 tokens: a text, then a latent image in rows of 32 tokens and its two delimiters."""
    rows = round((1 - share) * (SHARE_SAMPLE - 2) / 32)
    image = (Segment(32 * rows + 2, "noise", True, (rows, 32)),) if rows else ()
    text = SHARE_SAMPLE - sum(segment.tokens for segment in image)
    words = (Segment(text, "causal"),) if text > 2 else ()
    return ((*words, *image),) * (total // SHARE_SAMPLE)


def equal_pack(number: int, total: int) -> tuple[Sample, ...]:
    """``number`` equal samples: half a text, half square latent images of at most 64 tokens a side."""
    each = total // number
    side = min(64, math.isqrt(each // 2))
    image = Segment(side * side + 2, "noise", True, (side, side))
    images = (image,) * max(1, each // 2 // side**2)
    return ((Segment(each - sum(i.tokens for i in images), "causal"), *images),) * number


def cases(device: torch.device, size: str) -> Iterator[attention.Case]:
    """Attention with BAGEL-7B's heads and a layer of its width on GPUs, small ones on CPUs."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads, head_dim = ((28, 4), 128) if on_gpu else ((4, 2), 32)
    for sweep, x, trace in sweeps(size, on_gpu=on_gpu):
        columns = {"sweep": sweep, "x": x}
        yield attention.case(
            device, dtype, trace, heads, head_dim, directions=("both",), only=CANDIDATES, columns=columns
        )
    config = packs.bagel_width(1) if on_gpu else packs.small_config(256, 1, heads=4, kv_heads=2, intermediate=704)
    for sweep, x, trace in sweeps(size, on_gpu=on_gpu):
        columns = {"sweep": sweep, "x": x}
        layer = decoder_layer.case(device, dtype, trace, config, directions=("both",), columns=columns)
        if not on_gpu and trace.layout.num_queries > MOST_TOKENS_OF_A_LAYER:
            layer = dataclasses.replace(layer, candidates=dict.fromkeys(layer.candidates, _too_many_tokens), truth=None)
        yield layer


def _too_many_tokens() -> Candidate:
    raise CannotRun(f"a layer of more than {MOST_TOKENS_OF_A_LAYER:,} tokens takes too long on a CPU")
