"""The code of docs/integrations.md runs."""

import re
from pathlib import Path

import pytest
import torch
from bagel_stand_in import Outer, Sizes

pytest.importorskip("transformers")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_a_stock_model_with_a_layout(capsys):
    exec(BLOCKS[0], {})
    assert capsys.readouterr().out == "torch.Size([1, 40, 100])\n"


def test_a_model_like_bagel():
    torch.manual_seed(0)
    model = Outer(Sizes())
    batch = {
        "sequence_length": 9,
        "packed_text_ids": torch.arange(9),
        "packed_text_indexes": torch.arange(9),
        "sample_lens": [4, 5, 3],
        "packed_position_ids": torch.arange(9),
        "split_lens": [4, 3, 2, 3],
        "attn_modes": ["causal", "full", "causal", "causal"],
    }
    names = {"model": model, "batch": batch}
    exec(BLOCKS[1], names)
    assert model.built_masks == 0
    torch.testing.assert_close(names["outputs"], model(**batch), rtol=1e-5, atol=1e-5)
    assert model.built_masks == 1


def test_there_is_no_other_code():
    assert len(BLOCKS) == 2
