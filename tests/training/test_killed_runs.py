"""A run that is killed again and again, also in the middle of a save, ends bit for bit as one that never was.

Every attempt is the real command in a process of its own, which SIGKILLs itself at the n-th call of a certain function
(``wrapped_run.py``); n is drawn with a fixed seed. What the functions are called for: ``replace`` puts files and
folders in place, ``fsync`` comes before it, ``save_file`` writes weights, ``unlink`` removes what an old checkpoint
held, ``row`` appends to the metric file, ``step`` trains.
"""

import random
import re

import pytest
from run_process import PACKAGE, finish, history, killed, run, same_state, start, write_run

from unigendet.model.checkpoint import load_pretrained
from unigendet.training.state import EMA, MODEL, checkpoints

STEPS = 6
SAVES = {"save_every": 1, "keep_checkpoints": 2, "total_steps": STEPS}
FILES = 3  # that hold tensors in a GDUF checkpoint: model, average, optimizer


def attempts():
    """Mishaps in the order in which a run meets them: so that each comes true, its call number is small enough."""
    draw = random.Random(0)
    return [
        f"kill:save_file:{draw.randint(1, FILES)}:within",  # in the first save: nothing is there yet
        f"kill:replace:{draw.randint(2, 3)}:before",  # the first step's checkpoint, or its metrics, lack their name
        f"kill:row:{draw.randint(1, 2)}:after",
        f"kill:save_file:{FILES + draw.randint(1, FILES)}:within",  # in the second save of this attempt
        f"kill:unlink:{draw.randint(2, 5)}:before",  # in the middle of removing the oldest checkpoint
        f"kill:fsync:{draw.randint(3, 12)}:after",
        f"kill:step:{draw.randint(1, 2)}:after",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was never killed, and the settings of all."""
    folder = tmp_path_factory.mktemp("killed")
    file = write_run(folder, **SAVES)
    code, err = run("train", "--config", file, f"output={folder / 'whole'}")
    assert code == 0, err
    return file, folder / "whole"


def resume_or_start(file, output, wrapped=(), *overrides):
    """One attempt: go on where there is a checkpoint, start where there is none."""
    again = ["--resume"] if checkpoints(output) else []
    return run("train", "--config", file, f"output={output}", *overrides, *again, wrapped=wrapped)


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(runs):
    file, whole = runs
    output, seen = whole.parent / "parts", []
    for number, mishap in enumerate(attempts()):
        workers = f"loader.num_workers={number % 2}"  # none or one: the same data
        code, err = resume_or_start(file, output, [mishap], workers)
        assert killed(code), (mishap, code, err)
        left = checkpoints(output)
        for path in left:  # at every moment what is there is whole
            load_pretrained(path / MODEL)
            load_pretrained(path / EMA)
        hidden = [p.name for p in (output / "checkpoints").glob(".*")] if output.exists() else []
        seen.append(("saving", "removing")["unlink" in mishap] if hidden else "between")
    assert {"saving", "removing", "between"} == set(seen)
    code, err = resume_or_start(file, output)
    assert code == 0, err
    assert [p.name for p in checkpoints(output)] == [p.name for p in checkpoints(whole)]
    for left, right in zip(checkpoints(whole), checkpoints(output), strict=True):
        same_state(left, right)
    assert history(output) == history(whole)
    assert not list(output.rglob(".*"))


@pytest.mark.slow
def test_a_killed_run_of_the_second_stage(runs):
    """DIGA: the frozen teacher is that of the start, though the weights that it was copied from have gone on."""
    file, whole = runs
    stage = ["stage=diga", "keep_checkpoints=1", "total_steps=3"]
    processes = [
        start("train", "--config", file, *stage, f"output={whole.parent / name}", wrapped=wrapped)
        for name, wrapped in (("diga", ()), ("diga parts", ["kill:save_file:7:within"]))
    ]
    (code, err), (code2, err2) = map(finish, processes)
    assert code == 0, err
    assert killed(code2), err2
    output = whole.parent / "diga parts"
    assert [p.name for p in checkpoints(output)] == ["step-000001"]
    assert (checkpoints(output)[0] / "stage.safetensors").is_file()
    code, err = resume_or_start(file, output, (), *stage)
    assert code == 0, err
    same_state(checkpoints(whole.parent / "diga")[0], checkpoints(output)[0])
    assert history(output) == history(whole.parent / "diga")


def test_nothing_in_the_package_unpickles():
    """Whoever is given a checkpoint, a model or annotations must not run code by reading them."""
    words = ("pickle", "torch.load(", "torch.save(", "allow_pickle=True", "joblib", "dill", "marshal", "shelve")
    sources = list(PACKAGE.rglob("*.py"))
    assert len(sources) > 50
    for file in sources:
        code = "\n".join(line.partition("#")[0] for line in file.read_text().splitlines())
        # Inception's weights exist as a PyTorch file only; this way of loading reads tensors and runs nothing.
        code = re.sub(r"\btorch\.load\([^()]*, weights_only=True\)", "", code)
        found = [word for word in words if re.search(rf"\b{re.escape(word)}", code)]
        name = file.relative_to(PACKAGE).as_posix()
        if name == "data/parcel.py":  # between a run's own processes, as PyTorch's DataLoader does it; reads no file
            assert found == ["pickle"]
            assert not re.search(r"(?<!def )\bopen\(|\bPath\b", code)
            continue
        assert not found, f"{name}: {found}"
