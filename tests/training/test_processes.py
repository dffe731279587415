"""How a run learns of its processes: which device each takes, and what is said when they do not fit."""

import os

import pytest
import ranks
import torch
import torch.distributed as dist
from run_data import write_run_data, write_run_settings

from unigendet.training.config import ParallelConfig, TrainConfig
from unigendet.training.failures import ToldElsewhere
from unigendet.training.parallel import Parallel, processes


class Reached(Exception):
    """The processes meet: what comes before it is done."""


@pytest.fixture
def machine(monkeypatch):
    """One of 8 processes on a machine of two GPUs, up to where they meet; the devices that were chosen."""
    chosen = []

    def choose(number):
        if number > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        chosen.append(number)

    def meet(*arguments, **options):
        raise Reached

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(dist, "init_process_group", meet)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return chosen


def enter(**settings):
    with processes(TrainConfig(**settings)):
        pass


def test_more_processes_than_gpus_on_the_cpu(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(Reached):
        enter(device="cpu")
    assert machine == []


def test_each_process_takes_its_gpu_before_anything_else_is_on_one(machine):
    with pytest.raises(Reached):
        enter(device="auto")
    assert machine == [1]


def test_one_gpu_for_all_is_refused(machine):
    with pytest.raises(ValueError, match=r"device is 'cuda:0'; it must be 'auto', 'cuda' or 'cpu' with several proc"):
        enter(device="cuda:0")
    assert machine == []


def test_who_forgets_torchrun_is_told_of_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mesh = r"parallel\.shard is 8; it must be 1, so that .* is the number of processes \(1\)"
    with pytest.raises(ValueError, match=mesh + r"\. torchrun .*: torchrun --nproc-per-node 8 -m unigendet train …$"):
        enter(device="cpu", parallel=ParallelConfig(shard=8))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=mesh + "$"):
        enter(device="cpu", parallel=ParallelConfig(shard=8))


def test_a_command_without_torchrun(tmp_path):
    write_run_data(tmp_path)
    file = write_run_settings(tmp_path / "run.yaml", tmp_path, None, parallel={"shard": 2})
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    assert "RANK" not in environment
    code = ranks.subprocess.run(
        [ranks.sys.executable, "-m", "unigendet", "train", "--config", str(file)],
        env=environment | {"PYTHONPATH": str(ranks.PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert code.returncode == 1
    assert code.stderr.count("\n") == 1
    assert "torchrun --nproc-per-node 2 -m unigendet train …" in code.stderr


def failing(rank, texts):
    """Process ``rank`` among ``texts``, each the error of one of them or None; it makes 1 or fails."""

    class Others(Parallel):
        def gather(self, value):
            assert value == texts[rank]
            return texts

    def make():
        if texts[rank] is None:
            return 1
        raise ValueError(texts[rank].removeprefix("ValueError: "))

    return Others(rank=rank, world_size=len(texts)), make


def test_an_error_that_all_have_is_told_by_the_first():
    texts = ["ValueError: seed is -1"] * 2
    parallel, make = failing(0, texts)
    with pytest.raises(ValueError, match=r"^seed is -1$"):
        parallel.alike(make)
    parallel, make = failing(1, texts)
    with pytest.raises(ToldElsewhere) as caught:
        parallel.alike(make)
    assert caught.value.code == 1
    assert str(caught.value) == "seed is -1"


@pytest.mark.parametrize("others", [None, "ValueError: seed is -2"])
def test_an_error_of_one_process_is_never_lost(others):
    texts = [others, "ValueError: seed is -1"]
    parallel, make = failing(1, texts)
    with pytest.raises(ValueError, match=r"^seed is -1$"):
        parallel.alike(make)
    assert Parallel().alike(lambda: 1) == 1


def test_two_processes_tell_of_a_mistake_once(tmp_path):
    write_run_data(tmp_path)
    file = write_run_settings(tmp_path / "run.yaml", tmp_path, tmp_path / "out")
    empty = ("datasets.captions=[]", "datasets.detection=[]")
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*agent, "-m", "unigendet", "train", "--config", file, *empty)
    ((code, _, err),) = ranks.finish(ranks.start(1, *command), timeout=120)
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("unigendet train: ")]
    message = "datasets.detection and datasets.captions are empty; GDUF needs annotation files (in process 0 of 2)"
    assert said == [f"unigendet train: {message}"]
    assert "rank      : 0 " in err.partition("Root Cause")[2]  # torchrun has stopped the other one, not this
    assert not (tmp_path / "out").exists()
