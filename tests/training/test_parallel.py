"""Several processes train as one: the numbers of one process that has all their packs."""

import json
import math
from pathlib import Path

import pytest
import rank_run
import ranks
import torch

from unigendet.training.config import ParallelConfig, TrainConfig
from unigendet.training.parallel import Parallel, mesh_shape, processes

PROGRAM = Path(rank_run.__file__)
COMMON = {
    "total_steps": 5,
    "align_layer": 2,
    "teacher_layer": 3,
    "device": "cpu",
    "ema_decay": 0.5,
    # A large eps: some gradients (of keys' biases) are zero but for rounding, and Adam makes steps of them otherwise.
    "optimizer": {"lr": 3e-3, "eps": 1e-3, "warmup_steps": 0},
}
RUNS = {
    "gduf": {"stage": "gduf"},
    "diga": {"stage": "diga"},
    "groups": {"stage": "gduf", "parallel": {"replicate": 2}},  # HSDP with groups of one process
    "accumulated": {"stage": "gduf", "accumulate": 2, "total_steps": 3},
    "copies": {"stage": "gduf", "accumulate": 3, "total_steps": 3, "parallel": {"replicate": 2}},
    "aligned": {"stage": "diga", "accumulate": 2, "total_steps": 2, "parallel": {"replicate": 2}},
    "full": {"stage": "diga", "recompute": "full"},
    "selective": {"stage": "gduf", "recompute": "selective"},
    "skipped": {"stage": "gduf", "nan": 0, "on_nonfinite": "skip"},
    "bf16": {"stage": "gduf", "precision": "bf16"},
}
FOUR = {"hsdp": {"stage": "gduf", "accumulate": 2, "total_steps": 3, "parallel": {"replicate": 2}}}
REDUCED = {"bf16"}  # these have other numbers, of which only some are looked at
LOSSES = {"loss", "mse", "ce", "label", "diga"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name → what two processes, or four, made of the run."""
    folder = tmp_path_factory.mktemp("ranks")
    for count, runs in ((2, RUNS), (4, FOUR)):
        ranks.run(count, PROGRAM, folder, json.dumps({name: COMMON | run for name, run in runs.items()}))
    found = {name: torch.load(folder / f"{name}.pt") for name in RUNS | FOUR}
    return found | {f"timeouts-{n}": json.loads((folder / f"timeouts-{n}.json").read_text()) for n in (2, 4)}


@pytest.mark.parametrize("name", sorted(RUNS.keys() - REDUCED | FOUR.keys()))
def test_several_processes_are_one(outcomes, name):
    got, run = outcomes[name], COMMON | (RUNS | FOUR)[name]
    alone = {key: value for key, value in run.items() if key != "parallel"}
    alone["accumulate"] = (4 if name in FOUR else 2) * run.get("accumulate", 1)
    expected = rank_run.outcome(rank_run.train(alone, Parallel()))
    assert [row.keys() for row in got["history"]] == [row.keys() for row in expected["history"]]
    for theirs, ours in zip(expected["history"], got["history"], strict=True):
        for key in theirs.keys() & LOSSES:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (ours["step"], key)
        assert ours["tokens"] == theirs["tokens"]
        if "grad_norm" in theirs:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert got["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][key], gradient, rtol=1e-5, atol=1e-6, msg=key)
    for part in ("weights", "averaged"):
        for key, weight in expected[part].items():
            torch.testing.assert_close(got[part][key], weight, rtol=1e-5, atol=1e-6, msg=f"{part} {key}")


@pytest.mark.parametrize("count", [2, 4])
def test_every_group_has_the_timeout_of_the_settings(outcomes, count):
    """PyTorch's default for this backend would be 30 minutes."""
    groups = ("copies replicate", "copies shard", "one shard", "host")
    assert outcomes[f"timeouts-{count}"] == dict.fromkeys(groups, 7)


def test_a_skipped_step_leaves_the_weights(outcomes):
    """The NaN of one process's pack is the step's; nobody updates, and the run goes on."""
    rows = outcomes["skipped"]["history"]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 0, 0, 0]
    assert "loss" not in rows[1]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(p.isfinite().all() for p in outcomes["skipped"]["weights"].values())


def test_bfloat16_copies_of_float32_weights(outcomes):
    """Weights, gradients and averages stay float32; losses are those of float32 to bfloat16's three digits."""
    low, full = outcomes["bf16"], outcomes["gduf"]
    for part in ("weights", "gradients", "averaged"):
        assert {tensor.dtype for tensor in low[part].values()} == {torch.float32}
    assert low["history"][0]["loss"] == pytest.approx(full["history"][0]["loss"], rel=2e-2)
    assert low["history"][0]["loss"] != full["history"][0]["loss"]


def ended(settings):
    """What became of two processes that are to fail."""
    return ranks.finish(ranks.start(2, PROGRAM, "nowhere", json.dumps({"only": COMMON | settings})))


def test_a_process_that_fails_ends_the_job():
    """Process 1 fails in its second batch, when 0 waits for it. Under torchrun, which names it."""
    runs = json.dumps({"only": COMMON | {"stage": "gduf", "fail": 1}})
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ((code, _, err),) = ranks.finish(ranks.start(1, *agent, PROGRAM, "nowhere", runs))
    assert code != 0
    assert "[rank1]: OSError: the disk is gone" in err
    assert "process 0 ends, because process 1 failed: the disk is gone" in err
    assert "rank      : 1 " in err.partition("Root Cause")[2]


def test_numbers_that_are_not_finite_end_the_run():
    """Both processes end with the same error, which names the samples of the one that has them."""
    for code, _, err in ended({"stage": "gduf", "nan": 0}):
        assert code != 0
        what = (
            "step 2 is not finite (loss = nan, ce = nan, label = nan, grad_norm = nan); the weights are those of step 1"
        )
        assert f"{what}. Samples of the batch: d 2.0\n" in err


@pytest.mark.parametrize(
    ("settings", "world", "shape"),
    [({}, 8, (1, 8)), ({"replicate": 2}, 8, (2, 4)), ({"shard": 4, "replicate": 4}, 16, (4, 4)), ({}, 1, (1, 1))],
)
def test_meshes(settings, world, shape):
    assert mesh_shape(ParallelConfig(**settings), world) == shape


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"replicate": 3}, 8, r"parallel.replicate is 3; it must be a divisor of the number of processes \(8\)"),
        (
            {"shard": 3},
            8,
            r"parallel.shard is 3; it must be 8, so that parallel.replicate \(1\) times it is the number",
        ),
        ({"replicate": 2}, 1, r"parallel.replicate is 2; it must be a divisor of the number of processes \(1\)"),
    ],
)
def test_meshes_that_do_not_fit(settings, world, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(ParallelConfig(**settings), world)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_offload": True}, "parallel.cpu_offload is True; it must be false on a CPU"),
        ({"shard": 2}, "parallel.shard is 2; it must be 1"),
    ],
)
def test_what_one_process_cannot_do(settings, message):
    with (
        pytest.raises(ValueError, match=message),
        processes(TrainConfig(device="cpu", parallel=ParallelConfig(**settings))),
    ):
        pass
