"""Loading, saving and resuming by several processes: each reads and writes its rows, and the run is the same run."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
import ranks
import state_run
import torch
from run_process import same_state
from safetensors.torch import load_file, save_file
from training_fixtures import tiny_model

from unigendet.model.checkpoint import PROJECTORS, load_pretrained, published_state_dict, save_pretrained
from unigendet.model.export import export_weights
from unigendet.model.rows import Part, find_pieces, read_rows, whole_shape
from unigendet.model.shards import CheckpointError, shard_files
from unigendet.training.parallel import Parallel
from unigendet.training.saving import dealt
from unigendet.training.state import checkpoints

PROGRAM = Path(state_run.__file__)
STAGES = ("gduf", "diga")
LOADS = {"file": {}, "shards": {}, "bf16": {"dtype": "bfloat16"}, "kernel": {}}
FRESH = ["fake_cls_head", "diga_conv"]
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"


def new_model():
    torch.manual_seed(3)
    model = tiny_model(**state_run.UNEVEN)
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)
    return model


def write_checkpoints(folder):
    """The same weights in every form: one file, shards, with a conv kernel, and without heads."""
    model = new_model()
    save_pretrained(model, folder / "file")
    shutil.copytree(folder / "file", folder / "bf16")
    weights = load_file(folder / "file" / "model.safetensors")
    for name in ("shards", "kernel", "fresh"):
        (folder / name).mkdir()
        shutil.copy(folder / "file" / "config.json", folder / name)
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in files if files[name] == file}, folder / "shards" / file)
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    rows = weights[PATCHES]
    kernel = rows.unflatten(1, (2, 2, 1)).permute(0, 3, 1, 2).contiguous()
    save_file(weights | {PATCHES: kernel}, folder / "kernel" / "model.safetensors")
    optional = ("fake_cls_head.", *(f"{module}." for module in PROJECTORS.values()))
    rest = {name: value for name, value in weights.items() if not name.startswith(optional)}
    save_file(rest, folder / "fresh" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that two processes do in these tests, done at one start of them; beside it, what one process did."""
    folder = tmp_path_factory.mktemp("state")
    write_checkpoints(folder)
    source = {"source": str(folder / "file")}
    jobs = [{"job": "load", "name": n, "path": str(folder / n), "out": str(folder), **o} for n, o in LOADS.items()]
    fresh = {"initialize": FRESH, "config": {"align_projector": "conv"}}
    jobs.append({"job": "load", "name": "fresh", "path": str(folder / "fresh"), "out": str(folder), **fresh})
    for stage in STAGES:
        here, one, two = {"stage": stage} | source, folder / f"{stage}-one", folder / f"{stage}-two"
        state_run.train(Parallel(), output=str(one), accumulate=2, **here)
        jobs.append({"job": "train", "output": str(two), **here})
        for name, resume in (("again", two), ("taken-over", one)):
            point = str(resume / "checkpoints" / "step-000003")
            jobs.append({"job": "train", "output": str(folder / f"{stage}-{name}"), "resume": point, **here})
    groups = {"parallel": {"replicate": 2}}
    copies = {"stage": "gduf", **groups, **source}
    jobs.append({"job": "train_counting", "output": str(folder / "groups"), **copies})
    point = str(folder / "groups" / "checkpoints" / "step-000003")
    jobs.append({"job": "train", "output": str(folder / "groups-again"), "resume": point, **copies})
    jobs.append({"job": "train_while_writing", "output": str(folder / "held"), "stage": "gduf", **source})
    jobs.append({"job": "full_disk", "failing": 1, "output": str(folder / "full"), "stage": "gduf", **source})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks.run(2, PROGRAM, folder)
    square = {"job": "train_counting", "output": str(folder / "square"), "total_steps": 3, **copies}
    (folder / "jobs.json").write_text(json.dumps([square]))
    ranks.run(4, PROGRAM, folder)
    return folder


def contents(checkpoint):
    """All tensors of a checkpoint, whole, by where they are and their names."""
    found = {}
    for inside, stem in (("model", "model"), ("ema", "model"), (".", "optimizer"), (".", "stage")):
        pieces = find_pieces(shard_files(checkpoint / inside, stem))
        tensors = {name: torch.full(whole_shape(of), torch.nan) for name, of in pieces.items()}
        read_rows(pieces, {name: Part.of(tensor) for name, tensor in tensors.items()})
        found |= {f"{inside}/{stem}/{name}": tensor for name, tensor in tensors.items()}
    return found


def assert_close(left, right, tolerance):
    left, right = contents(left), contents(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", LOADS)
def test_processes_read_their_rows(folder, name):
    """Of rows that cannot be shared evenly, in every form of a checkpoint."""
    loaded, expected = torch.load(folder / f"load-{name}.pt"), new_model().state_dict()
    dtype = getattr(torch, LOADS[name].get("dtype", "float32"))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.items())
    assert {value.dtype for key, value in loaded.items() if not key.endswith("table")} == {dtype}


def test_new_modules_are_those_of_one_process(folder):
    state_run.load(Parallel(), "alone", folder / "fresh", folder, initialize=FRESH, config={"align_projector": "conv"})
    loaded, expected = torch.load(folder / "load-fresh.pt"), torch.load(folder / "load-alone.pt")
    assert any(name.startswith("align_head.conv") for name in loaded)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_resume_themselves(folder, stage):
    """Three steps, a checkpoint, everything made anew, three more: bit for bit the six steps."""
    first, again = (folder / f"{stage}-{name}" / "checkpoints" / "step-000006" for name in ("two", "again"))
    same_state(first, again)
    assert any(value.any() for name, value in contents(first).items() if name.startswith("./optimizer"))


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_take_over_from_one(folder, stage):
    one, other = (folder / f"{stage}-{name}" / "checkpoints" / "step-000006" for name in ("one", "taken-over"))
    assert_close(one, other, 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_takes_over_from_two(folder, stage, tmp_path):
    two = folder / f"{stage}-two" / "checkpoints"
    run = {"source": None, "stage": stage, "accumulate": 2, "output": str(tmp_path)}
    state_run.train(Parallel(), resume=two / "step-000003", **run)
    assert_close(two / "step-000006", tmp_path / "checkpoints" / "step-000006", 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_processes_is_that_of_one(folder, stage, tmp_path):
    """The same tensors, and the noise of both processes' packs."""
    one, two = (folder / f"{stage}-{name}" / "checkpoints" / "step-000003" for name in ("one", "two"))
    assert_close(one, two, 1e-6)
    records = [json.loads((path / "training.json").read_text()) for path in (one, two)]
    for record in records:
        record.pop("settings")
    assert records[0] == records[1]
    assert len(records[0]["generators"]) == 2
    with pytest.raises(
        CheckpointError, match=r"2 packs per step, this one has 1; resume it with as many \(accumulate=2"
    ):
        state_run.trainer(Parallel(), None, two, stage=stage)


def test_weights_of_two_processes_are_a_model(folder, tmp_path):
    """Its averaged weights start a next stage, judge images, and are exported under the published names, whole."""
    ema = folder / "gduf-two" / "checkpoints" / "step-000006" / "ema"
    held = {f.name for f in ema.iterdir()}
    parts = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert held == {"config.json", "note.txt", "model.safetensors.index.json"} | parts
    expected = contents(ema.parent)
    model = load_pretrained(ema)
    for name, value in published_state_dict(model).items():
        assert torch.equal(value, expected[f"ema/model/{name}"]), name
    assert not torch.equal(model.vae2llm.weight, load_pretrained(ema.parent / "model").vae2llm.weight)
    export_weights(ema, tmp_path)
    exported = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in published_state_dict(model).items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_reads_the_weights_too(folder):
    """The places of the rows are in the files as its own reader expects them."""
    import torch.distributed.checkpoint as dcp

    path = folder / "gduf-two" / "checkpoints" / "step-000006" / "model"
    expected = published_state_dict(load_pretrained(path))
    state = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_rows_that_several_processes_hold_are_written_once(folder):
    """HSDP with groups of one process: whole tensors, about half of the bytes in each process's file."""
    path = folder / "groups" / "checkpoints" / "step-000006"
    assert_close(folder / "gduf-one" / "checkpoints" / "step-000006", path, 1e-6)
    files = shard_files(path, "optimizer")
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * sum(sizes)
    assert all(len(pieces) == 1 for pieces in find_pieces(files).values())


@pytest.mark.parametrize(("output", "shards"), [("groups", 1), ("square", 2)])
def test_copies_deal_what_they_hold_alike(folder, output, shards):
    """Each makes host copies of about half of its rows, and of no part that another copy of the model writes."""
    found = json.loads((folder / output / "staged.json").read_text())
    assert len(found) == 2 * shards
    for held, staged in found:
        assert 0.45 * held < sum(staged.values()) < 0.55 * held
    for (held, one), (_, other) in zip(found[:shards], found[shards:], strict=True):  # a row of the mesh is a copy
        assert not one.keys() & other.keys()
        assert sum(one.values()) + sum(other.values()) == held


def test_copies_resume_themselves(folder):
    same_state(*(folder / name / "checkpoints" / "step-000006" for name in ("groups", "groups-again")))


def test_a_checkpoint_of_copies_in_shards_is_that_of_one(folder, tmp_path):
    run = {"source": str(folder / "file"), "stage": "gduf", "accumulate": 4, "output": str(tmp_path), "total_steps": 3}
    state_run.train(Parallel(), **run)
    assert_close(*(path / "checkpoints" / "step-000003" for path in (tmp_path, folder / "square")), 1e-6)


def test_every_part_is_dealt_once():
    """The loads differ by no more than a part: the same deal in all processes, whatever the order of their parts."""
    sizes = {f"part {i}": (7 * i) % 23 for i in range(40)}
    for copies in (1, 2, 3, 64):
        deals = [dealt(dict(sorted(sizes.items(), reverse=copy % 2)), copy, copies) for copy in range(copies)]
        assert sorted(name for deal in deals for name in deal) == sorted(sizes)
        loads = [sum(sizes[name] for name in deal) for deal in deals]
        assert max(loads) - min(loads) <= max(sizes.values())


def test_training_goes_on_while_files_are_written(folder):
    """The run of this job held its files back until its next step: it is the same run, and both its saves are whole."""
    for step in ("step-000003", "step-000006"):
        same_state(*(folder / name / "checkpoints" / step for name in ("gduf-two", "held")))


def test_a_disk_that_is_full_in_one_process(folder):
    """All processes say so, with what to do; nothing is left of the save, and the one before is whole."""
    output = folder / "full"
    found = [path.name for path in (output / "checkpoints").iterdir()]
    assert found == ["step-000003"]
    same_state(folder / "gduf-two" / "checkpoints" / "step-000003", output / "checkpoints" / "step-000003")
    for rank in range(2):
        message = (output / f"error-{rank}").read_text()
        assert message.startswith("after step 7: cannot write ")
        assert "-00002-of-00002.safetensors (No space left on device); the last good checkpoint is " in message
        assert "step-000003: make room, then resume the run (--resume)" in message


def test_a_process_that_fails_while_a_checkpoint_is_written(folder, tmp_path):
    """The other one says so at once, the checkpoint is completed, and both end by the error of the one that failed."""
    out, go = tmp_path / "out", tmp_path / "go"
    job = {"job": "fails_while_saving", "source": str(folder / "file"), "stage": "gduf", "output": str(out)}
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"go": str(go)}]))
    started = ranks.start(2, PROGRAM, tmp_path)
    said = next(line for line in started[0].stderr if "ends, because" in line)
    assert said == (
        "unigendet train: process 0 ends, because process 1 failed: the disk is gone; the checkpoint that is being "
        "written is completed first\n"
    )
    assert checkpoints(out) == []
    assert [process.poll() for process in started] == [None, None]
    go.touch()
    (other, _, rest), (code, _, err) = ranks.finish(started, timeout=120)
    assert (other, code) == (1, 1)
    assert "[rank1]: OSError: the disk is gone\n[rank1]: in process 1 of 2\n" in err
    assert "Traceback" not in rest
    same_state(folder / "gduf-two" / "checkpoints" / "step-000003", out / "checkpoints" / "step-000003")


def test_processes_that_are_killed_while_they_save(folder, tmp_path):
    """The checkpoint before is whole, and a run goes on from it to the same end."""
    job = {"job": "killed", "source": str(folder / "file"), "stage": "gduf", "output": str(tmp_path / "out")}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    ended = ranks.finish(ranks.start(2, PROGRAM, tmp_path))
    assert -signal.SIGKILL in [code for code, _, _ in ended], ended
    assert all(code != 0 for code, _, _ in ended)
    left = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    assert sorted(left) == [".step-000006.partial", "step-000003"]
    (point,) = checkpoints(tmp_path / "out")
    same_state(folder / "gduf-two" / "checkpoints" / "step-000003", point)
    run = {"source": None, "stage": "gduf", "accumulate": 2, "output": str(tmp_path / "out")}
    state_run.train(Parallel(), resume=point, **run)
    assert_close(folder / "gduf-two" / "checkpoints" / "step-000006", checkpoints(tmp_path / "out")[-1], 1e-6)
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of a checkpoint that two processes wrote."""
    return Path(shutil.copytree(folder / "gduf-two" / "checkpoints" / "step-000003", tmp_path / "step-000003"))


def resume(path):
    return state_run.trainer(Parallel(), None, path, stage="gduf", accumulate=2)


@pytest.mark.parametrize("file", ["model/model", "ema/model", "optimizer"])
def test_a_missing_file_is_named(damaged, file):
    resume(damaged)
    (damaged / f"{file}-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names shards that are not there: .*-00002-of-00002\.safetensors"):
        resume(damaged)


@pytest.mark.parametrize(("change", "message"), [(-1, "again in"), (1, r"rows \d+ to \d+ are missing")])
def test_rows_must_make_up_a_tensor(damaged, change, message):
    """Files of different checkpoints, or of a run with another number of processes, are never mixed."""
    file = damaged / "optimizer-00002-of-00002.safetensors"
    content = file.read_bytes()
    name = b"embed_tokens.weight.exp_avg"
    start = content.index(b"[", content.index(name, content.index(b"DCP_SHARDING_INFO")))
    row = int(content[start + 1 : content.index(b",", start)])
    assert len(str(row)) == len(str(row + change))
    file.write_bytes(content[: start + 1] + str(row + change).encode() + content[start + 1 + len(str(row)) :])
    with pytest.raises(
        CheckpointError, match=rf"does not hold whole tensors: embed_tokens\.weight\.exp_avg \(.*{message}"
    ):
        resume(damaged)


def test_rows_of_parts():
    """Every row of every block of a tensor is in one part, wherever the tensor was cut."""
    whole = torch.arange(24).view(12, 2)
    for cuts in itertools.combinations_with_replacement(range(13), 2):
        parts = [Part(whole[a:b], a, (12, 2)) for a, b in itertools.pairwise((0, *cuts, 12))]
        for number, size in enumerate((6, 2, 4)):
            blocks = [part.split((6, 2, 4))[number] for part in parts]
            assert all(block.shape == (size, 2) for block in blocks)
            held = [block for block in blocks if len(block.tensor)]
            assert torch.equal(torch.cat([b.tensor for b in held]), whole.split((6, 2, 4))[number])
            assert [block.row for block in held] == list(
                itertools.accumulate((len(b.tensor) for b in held), initial=0)
            )[:-1]
