"""New weights of several processes: those of one, bit for bit, and never whole in any of them."""

import json
from pathlib import Path

import new_run
import pytest
import ranks
import torch
from training_fixtures import tiny_config

from unigendet.model.new_weights import draw_rows
from unigendet.model.unigendet import UniGenDet, init_weights

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes made."""
    folder = tmp_path_factory.mktemp("new")
    ranks.run(2, Path(new_run.__file__), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "model"), [*((name, name) for name in (*new_run.MODELS, "preset")), ("copies", "mlp")]
)
def test_new_weights_are_those_of_one_process(folder, name, model):
    """Position tables and the generator's state too, so all that is drawn later is the same."""
    found, expected = torch.load(folder / f"{name}.pt"), new_run.alone(model)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_no_process_holds_all_new_weights(folder):
    """Its own part and one module at a time, which here is small; the rest is what running the program takes."""
    for rank in range(2):
        found = json.loads((folder / f"memory-{rank}.json").read_text())
        largest = 4 * new_run.LARGE.vocab_size * new_run.LARGE.hidden_size
        assert found["share"] == pytest.approx(found["whole"] / 2, rel=0.02)
        assert found["whole"] > 200 * MIB
        assert 0.9 * found["share"] < found["grown"] < found["share"] + largest + 16 * MIB


def test_weights_that_are_drawn_are_those_of_init_weights():
    """Without processes: the rows of a whole module are all of them."""
    own = UniGenDet(tiny_config()).requires_grad_(False)
    with torch.device("meta"):
        whole = UniGenDet(tiny_config())
    torch.manual_seed(3)
    draw_rows(whole, own)
    expected = UniGenDet(tiny_config())
    torch.manual_seed(3)
    init_weights(expected)
    for (name, parameter), other in zip(own.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert all(parameter.is_meta for parameter in whole.parameters())
