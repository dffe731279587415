"""Resuming a run with its data: the same numbers, bit for bit, in both stages, with and without data workers."""

import pytest
import torch
from run_process import history, same_state, write_run
from safetensors.torch import load_file

from unigendet.training.config import load_train_config
from unigendet.training.run import build_trainer
from unigendet.training.state import checkpoints


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_every_tensor_of_a_resumed_run_is_that_of_the_run(tmp_path, stage, workers):
    """Six steps, or three, a checkpoint, everything made anew, and three more: weights, average, frozen teacher,
    optimizer, random state, loader position and learning rates are the same, bit for bit."""
    file = write_run(tmp_path, stage=stage, save_every=3, keep_checkpoints=9)

    def trainer(name, resume=False):
        overrides = [f"output={tmp_path / name}", f"loader.num_workers={workers}"]
        return build_trainer(load_train_config(file, overrides), resume=resume, quiet=True)

    whole, first = trainer("whole"), trainer("parts")
    whole.run()
    first.run(until=3)
    first.train_step(next(iter(first.batches)))  # what is done after the checkpoint is lost
    second = trainer("parts", resume=True)
    assert second.state.step == 3
    second.run()
    pairs = list(zip(checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "parts"), strict=True))
    assert [pair[0].name for pair in pairs] == ["step-000003", "step-000006"]
    for pair in pairs:
        same_state(*pair)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    lrs = [row["lr"] for row in history(tmp_path / "parts")]
    assert len(set(lrs[2:])) == 4  # the schedule moves in every step, so a wrong place in it would show
    end = pairs[1][0]
    if stage == "diga":
        start = load_file(pairs[0][0] / "stage.safetensors")
        assert all(torch.equal(tensor, start[name]) for name, tensor in load_file(end / "stage.safetensors").items())
    moments = load_file(end / "optimizer.safetensors")
    assert {name.rpartition(".")[2] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
