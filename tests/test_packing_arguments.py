"""What a pack cannot be made of: every error names the sample, the segment and what it must be."""

import numpy as np
import pytest
import torch
from packing_cases import CONFIG, image

from unigendet.packing import ConditionDropout, LatentImage, Sample, Text, VitImage, pack

TEXT, ANSWER = Text([5]), Text([6], loss=True)
LATENT = LatentImage(image(4, 1, 2))


@pytest.mark.parametrize(
    ("packed", "options", "message"),
    [
        ([], {}, "samples is empty; a pack needs at least one sample"),
        ([Sample(())], {}, r"samples\[0\] has no segments left; a sample needs at least one"),
        (
            [Sample((TEXT,)), Sample((TEXT,), label=2, name="b.png")],
            {},
            r"samples\[1\] \(b.png\).label is 2; it must be",
        ),
        ([Sample((TEXT,), label=0)], {}, r"samples\[0\] has a label but no text with loss"),
        (
            [Sample((TEXT, "x"), name="n")],
            {},
            r"samples\[0\] \(n\).segments\[1\] is a str; it must be a Text, VitImage or",
        ),
        ([Sample((Text([50]),), name="n")], {}, r"samples\[0\] \(n\).segments\[0\] has the token id 50; .* \[0, 50\)"),
        ([Sample((TEXT, Text([7, -1])))], {}, r"samples\[0\].segments\[1\] has the token id -1"),
        (
            [Sample((TEXT,)), Sample((TEXT, Text([7] * 60)), name="long")],
            {},
            r"samples\[1\] \(long\).segments\[1\] reaches RoPE position 64; config.max_position allows 63",
        ),
        (
            [Sample((TEXT, VitImage(image(4, 1, 1))), name="v")],
            {},
            r"samples\[0\] \(v\).segments\[1\].pixels has shape \[4, 2, 2\]; it must be \[3, 2·rows, 2·columns\]",
        ),
        ([Sample((VitImage(torch.zeros(3, 2, 3)),))], {}, r"segments\[0\].pixels has shape \[3, 2, 3\]"),
        ([Sample((VitImage(torch.zeros(3, 0, 2)),))], {}, r"segments\[0\].pixels has shape \[3, 0, 2\]"),
        ([Sample((VitImage(torch.zeros(2, 2)),))], {}, r"segments\[0\].pixels has shape \[2, 2\]"),
        (
            [Sample((VitImage(image(3, 1, 1).byte()),))],
            {},
            r"segments\[0\].pixels has dtype torch.uint8; it must be fl",
        ),
        (
            [Sample((LatentImage(image(3, 1, 1)),))],
            {},
            r"segments\[0\].latent has shape \[3, 2, 2\]; it must be \[4, 2",
        ),
        ([Sample((VitImage(image(3, 1, 4)),))], {}, r"has 1×4 patches; the model's position table holds 3 a side"),
        ([Sample((LatentImage(image(4, 6, 1)),))], {}, r"has 6×1 patches; the model's position table holds 5 a side"),
        ([Sample((TEXT,))], {"dropout": ConditionDropout()}, "rng is None; condition dropout needs a numpy Generator"),
        (
            [Sample((Text([5], droppable=True),), name="gone")],
            {"dropout": ConditionDropout(1, 1, 1), "rng": np.random.default_rng(0)},
            r"samples\[0\] \(gone\) has no segments left",
        ),
        ([Sample((TEXT,))], {"cached": [1, 1]}, "cached has 2 entries; it must have one per sample: 1"),
        ([Sample((TEXT,))], {"cached": [4]}, r"cached\[0\] is 4; it must be in \[0, 3\]"),
        ([Sample((TEXT,))], {"cached": [-1]}, r"cached\[0\] is -1; it must be in \[0, 3\]"),
        (
            [Sample((TEXT, LATENT), name="z")],
            {"cached": [5]},
            r"cached ends 2 tokens into samples\[0\] \(z\).segments\[1\]; an image of 4 tokens is cached whole or not",
        ),
        (
            [Sample((TEXT, ANSWER), label=1)],
            {"cached": [4]},
            r"cached ends 1 tokens into samples\[0\].segments\[1\]; the real/fake head of a labelled sample reads",
        ),
        ([Sample((TEXT,))], {"capacity": [2]}, r"capacity\[0\] is 2; it must be at least 3"),
    ],
)
def test_bad_arguments(packed, options, message):
    with pytest.raises(ValueError, match=message):
        pack(packed, CONFIG, **options)


def test_bad_dropout():
    with pytest.raises(ValueError, match=r"dropout.vit is 1.5; it must be a probability in \[0, 1\]"):
        ConditionDropout(vit=1.5)
