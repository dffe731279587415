"""Two processes share a look: they see what one sees, with less work each, and never wait for each other in vain."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import look_run
import numpy as np
import pytest
import ranks
import torch
from watched_run import rows_of, write_settings

from unigendet.training.watch import collect, deal

PROMPTS = "watch.prompts=['picture 1', 'picture', 'a picture']"
ANSWERS = ("watch.max_tokens=12", "watch.limit=6")
LOOKS = {
    # Odd numbers of images, prompts and batches.
    "verdicts": {"settings": [PROMPTS, "watch.count=1", "watch.limit=5", "watch.batch_size=2"]},
    "answers": {"settings": [PROMPTS, *ANSWERS, "watch.batch_size=2"]},
    # Every second image of process 1 alone, of both, of process 0 alone.
    "unreadable": {"settings": [*ANSWERS, "watch.prompts=[]", "watch.batch_size=1"], "broken": [1, 2, 3, 4]},
    "nothing readable": {"settings": [*ANSWERS, "watch.prompts=[]", "watch.batch_size=2"], "broken": [1, 3, 5]},
    "not finite": {"settings": [*ANSWERS, "watch.prompts=[]", "watch.batch_size=1"], "undefined": [3]},
    "one of each": {"settings": ["watch.prompts=['picture']", "watch.count=1", "watch.max_tokens=12", "watch.limit=1"]},
    "other files": {"settings": [PROMPTS, "watch.count=1", "watch.limit=6"], "poorer": 1},
}
TIMEOUT = 180  # seconds for two processes to do all that, of which they take a few; a collective fails after 60


@pytest.fixture(scope="module")
def folder(watched_data, tmp_path_factory):
    """Everything that two processes do in these tests, done at one start of them."""
    folder = tmp_path_factory.mktemp("looks")
    shutil.copytree(watched_data, folder / "data")
    write_settings(folder / "data", folder)
    for job in LOOKS.values():
        look_run.held_out(folder, job.get("broken", ()))
    (folder / "jobs.json").write_text(json.dumps(LOOKS))
    ranks.run(2, Path(look_run.__file__), folder, timeout=TIMEOUT)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Name → what one process sees."""
    return {name: look_run.look(folder, **job, output=folder / f"{name}, alone") for name, job in LOOKS.items()}


def found(folder, name):
    """What both processes found and did."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", LOOKS)
def test_two_processes_see_what_one_sees(folder, alone, name):
    """The same outcomes in the same order, hence scores; pictures but for rounding, as other images are in a batch."""
    expected = alone[name]
    for got in found(folder, name):
        assert got["scores"].keys() == expected["scores"].keys()
        for key in expected["scores"].keys() - {"seconds"}:
            assert got["scores"][key] == pytest.approx(expected["scores"][key], abs=1e-6), key
        for ours, theirs in zip(got["outcomes"], expected["outcomes"], strict=True):
            assert ours.probability == pytest.approx(theirs.probability, abs=1e-6)
            assert dataclasses.replace(ours, probability=theirs.probability, logit=theirs.logit) == theirs
        if expected["samples"] is None:
            assert got["samples"] is None
        else:
            assert np.abs(got["samples"].astype(int) - expected["samples"]).max() <= 1
    (ours,), (theirs,) = rows_of(folder / name), rows_of(folder / f"{name}, alone")
    assert list(ours) == list(theirs)
    same = ("images", "accuracy", "rouge_l", "undecided", "not_judged", "categories", "samples")
    assert [ours.get(key) for key in same] == [theirs.get(key) for key in same]
    pictures = [[file.name for file in path.glob("watch/*")] for path in (folder / name, folder / f"{name}, alone")]
    assert pictures[0] == pictures[1]


def test_what_is_to_be_seen(alone):
    """The frame of the other tests: pictures that differ, answers of different lengths, images without a verdict."""
    lengths = [len(outcome.explanation) for outcome in alone["answers"]["outcomes"]]
    assert all(a != b for a, b in zip(lengths[::2], lengths[1::2], strict=True))
    assert len(np.unique(alone["verdicts"]["samples"][..., 0])) > 10
    unread = {name: [o.error is not None for o in look["outcomes"]] for name, look in alone.items()}
    assert unread["unreadable"] == [False, True, True, True, True, False]
    assert unread["nothing readable"] == [False, True] * 3
    assert unread["not finite"] == [False, False, False, True, False, False]


@pytest.mark.parametrize("name", LOOKS)
def test_both_make_as_many_passes(folder, name):
    first, second = found(folder, name)
    assert first["passes"] == second["passes"]


def test_the_work_is_shared(folder, alone):
    """Each reads its own images; the odd one out is read twice. Batches of two, of five images and three prompts."""
    both = found(folder, "verdicts")
    images = alone["verdicts"]["read"]
    assert [one["read"] for one in both] == [images[::2], [*images[1::2], images[0]]]
    assert alone["verdicts"]["passes"] == 3 + 2 * 2
    assert [one["passes"] for one in both] == [2 + 1 * 2] * 2


@pytest.mark.parametrize("where", look_run.SIGNALS)
def test_a_signal_to_one_of_them_ends_the_look_of_both(folder, where):
    """After the same image or step of sampling; the run goes on and has all its looks."""
    first, second = found(folder, where)
    assert first == second
    assert (first["step"], first["stopped_by"], first["then"]) == (1, signal.SIGTERM, 3)
    assert first["seen"].count(1) == 1 < first["seen"].count(0)
    assert [row["step"] for row in rows_of(folder / where)] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_parts(count, size):
    """All equally long and, put together, every item once and in its place."""
    items = [f"item {i}" for i in range(count)]
    parts = [deal(items, SimpleNamespace(rank=rank, world_size=size)) for rank in range(size)]
    assert {len(part) for part in parts} == {-(-count // size)}
    assert collect(parts[0], count, SimpleNamespace(gather=lambda own: parts)) == items
