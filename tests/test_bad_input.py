"""Users' mistakes in settings and data, through the real command line: each ends with a line that says what is wrong,
where, and what it must be; with an exit code that is not 0, and without a traceback.
"""

import copy
import json
import shutil

import pytest
import yaml
from run_data import write_run_data, write_run_settings

from unigendet.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of 8×8 pixels, annotated for both tasks, a tokenizer, and the settings of a run on them."""
    folder = tmp_path_factory.mktemp("run")
    write_run_data(folder)
    write_run_settings(folder / "run.yaml", folder, output=None, total_steps=3)
    return folder


@pytest.fixture
def fails(folder, capfd):
    """Train with mistakes; the one line that it says. ``capfd``: data workers are processes of their own."""

    def train(*overrides, config="run.yaml", code=1):
        capfd.readouterr()
        try:
            ended = main(["train", "--config", str(folder / config), *overrides])
        except SystemExit as end:
            ended = end.code
        captured = capfd.readouterr()
        assert (ended, captured.out) == (code, "")
        assert "Traceback" not in captured.err
        line = captured.err.splitlines()[-1]
        assert line.startswith("unigendet train: " if code == 1 else "unigendet")
        return line

    return train


def annotate(folder, kind, change, name="changed.json"):
    """A changed copy of the annotations of ``kind`` as the override that trains on it."""
    entries = json.loads((folder / f"{kind}.json").read_text())
    change(entries)
    (folder / name).write_text(json.dumps(entries))
    return f"datasets.{kind}=[{{file: {folder / name}}}]"


def put(**values):
    return lambda entries: entries[3].update(values)


@pytest.mark.parametrize("kind", ["detection", "captions"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0); it must hold one list of objects"),
        (b'[{"image": "0.p', "is not JSON: Unterminated string"),
        (
            b'{"image": "0.png"}\n{"image": "1.png"}',
            "looks like JSON lines, an object a line; it must hold one list of objects: [ and ] around them and commas",
        ),
        (b'{"image":\n"0.png"}\n{}', "is not JSON: Extra data: line 3"),
        (b"\xff\xfe\x00", "is not JSON: 'utf-8' codec"),
        (b"{}", "holds a dict; it must hold a non-empty list"),
        (b"[]", "holds an empty list; it must hold a non-empty list"),
    ],
)
def test_a_file_that_holds_no_annotations(fails, folder, kind, content, message):
    (folder / "odd.json").write_bytes(content)
    line = fails(f"datasets.{kind}=[{{file: {folder / 'odd.json'}}}]")
    assert f"annotation file {folder / 'odd.json'} {message}" in line


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("detection", lambda e: e.insert(3, 7), "entry 3 is a int; it must be an object"),
        ("detection", put(label=2), "entry 3, field 'label' is 2; it must be 1 (real) or 0 (fake)"),
        ("detection", put(label="real"), "entry 3, field 'label' is 'real'; it must be 1 (real) or 0 (fake)"),
        ("detection", put(label=None), "entry 3, field 'label' is None; it must be 1 (real) or 0 (fake)"),
        ("detection", put(label=True), "entry 3, field 'label' is True; it must be 1 (real) or 0 (fake)"),
        ("detection", lambda e: e[3].pop("label"), "entry 3 has no field 'label'; it has ['cate', 'conversations', "),
        ("detection", lambda e: e[3].pop("cate"), "entry 3 has no field 'cate'"),
        ("detection", put(conversations="?"), "entry 3, field 'conversations' has the speakers '?'; it must be one"),
        ("detection", lambda e: e[3]["conversations"].pop(), "has the speakers ['human']; it must be one turn by"),
        (
            "detection",
            put(image="../0.png"),
            "entry 3, field 'image' is '../0.png'; it must be a path below image_root",
        ),
        (
            "captions",
            put(image_path="/0.png"),
            "entry 3, field 'image_path' is '/0.png'; it must be a path relative to",
        ),
        ("captions", put(image_path="/0.png"), "; or set image_root to '/' and write '0.png'"),
        ("captions", put(prompt=" "), "entry 3, field 'prompt' is ' '; it must be a non-empty string"),
        ("captions", put(prompt=["a"]), "entry 3, field 'prompt' is ['a']; it must be a non-empty string"),
    ],
)
def test_a_malformed_entry(fails, folder, kind, change, message):
    line = fails(annotate(folder, kind, change))
    assert message in line
    assert str(folder / "changed.json") in line


def test_the_other_task_s_annotations(fails, folder):
    line = fails(f"datasets.detection=[{{file: {folder / 'captions.json'}}}]")
    assert "captions.json, entry 0 has no field 'label'; it has ['image_path', 'prompt']" in line


def test_a_folder_of_images(fails, folder, capfd):
    """With an image_root, and with an empty part: the setting or the folder, and what to do."""
    data = folder / "labelled"
    for name in ("real", "fake"):
        (data / name).mkdir(parents=True)
    shutil.copy(folder / "0.png", data / "real")
    line = fails(f"datasets.detection=[{{file: {folder / 'detection.json'}}}, {{file: {data}, image_root: {folder}}}]")
    assert f"datasets.detection[1].image_root is '{folder}'; leave it out: {data} is a folder, which holds" in line
    line = fails(f"datasets.detection=[{{file: {data}}}]")
    assert f"folder {data / 'fake'} holds no images; put there fake images, or remove it: real/ is enough" in line
    watch = ("watch.every=1", f"output={folder / 'out'}", f"watch.detection={data}")
    line = fails(*watch, f"watch.image_root={folder}")
    assert f"watch.detection: watch.image_root is '{folder}'; leave it out: {data} is a folder, which holds" in line
    for command in (["calibrate", data], ["evaluate", "detection", "--data", data, "--out", folder / "scores"]):
        assert main([*map(str, command), "--model", str(folder), "--image-root", str(folder)]) == 1
        assert f"--image-root is '{folder}'; leave it out" in capfd.readouterr().err
    (data / "fake").rmdir()
    assert main(["train", "--config", str(folder / "run.yaml"), f"datasets.detection=[{{file: {data}}}]"]) == 0


def test_no_annotations(fails, folder):
    assert f"datasets.captions[0].file is '{folder}'; it must be a file" in fails(
        f"datasets.captions=[{{file: {folder}}}]"
    )
    assert f"folder {folder} holds 0.png, 1.png, " in fails(f"datasets.detection=[{{file: {folder}}}]")
    for kind, what in (("detection", "file or folder"), ("captions", "file")):
        lost = f"datasets.{kind}[0].file is 'lost.json'; there is no such {what}"
        assert lost in fails(f"datasets.{kind}=[{{file: lost.json}}]")
    line = fails("datasets.detection=[]", "datasets.captions=[]")
    assert "datasets.detection and datasets.captions are empty; GDUF needs annotation files" in line
    line = fails("stage=diga", "align_layer=2", "teacher_layer=3", "datasets.captions=[]")
    assert "datasets.captions is empty; DIGA needs annotation files with captions" in line
    real = annotate(folder, "detection", lambda entries: [entry.update(label=1) for entry in entries])
    line = fails(real.replace("}]", ", label: 0}]"))
    assert f"label is 0, and {folder / 'changed.json'} has no record with this label" in line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("kind", "field"), [("detection", "image"), ("captions", "image_path")])
def test_an_image_that_is_not_there(fails, folder, workers, kind, field):
    """Found in the middle of training, in a data worker or not: the image, the file and the entry are named."""
    lost = annotate(folder, kind, put(**{field: "lost.png"}))
    line = fails(lost, f"loader.num_workers={workers}", "total_steps=9", "loader.max_broken=0")
    assert line.startswith(f"unigendet train: image {folder / 'lost.png'} does not exist")
    assert f"({folder / 'changed.json'}, entry 3; image_root says where its images are)" in line
    assert line.endswith("(1 broken image; loader.max_broken allows 0)")


def test_an_image_that_is_none(fails, folder):
    (folder / "text.png").write_text("no image")
    line = fails(annotate(folder, "detection", put(image="text.png")), "total_steps=9", "loader.max_broken=0")
    assert f"image {folder / 'text.png'} cannot be decoded" in line
    assert line.endswith(f"({folder / 'changed.json'}, entry 3) (1 broken image; loader.max_broken allows 0)")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_broken_images_are_left_out_and_named_once(folder, workers, caplog):
    """By default a run goes on without them; beyond the limit the last of them ends it."""

    def change(entries):
        for i, name in ((1, "lost.png"), (4, "text.png")):
            entries[i]["image"] = name

    (folder / "text.png").write_text("no image")
    run = ["train", "--config", str(folder / "run.yaml"), annotate(folder, "detection", change),
           f"loader.num_workers={workers}", "total_steps=9"]  # fmt: skip
    assert main(run) == 0
    first, second = sorted((record.getMessage() for record in caplog.records), key=lambda text: "text.png" in text)
    assert f"image {folder / 'lost.png'} does not exist" in first
    assert f"image {folder / 'text.png'} cannot be decoded" in second
    assert f"({folder / 'changed.json'}, entry 4): left out (" in second
    caplog.clear()
    assert main([*run, "loader.max_broken=1"]) == 1
    assert len(caplog.records) == 1


def test_a_wrong_image_root(fails, folder):
    (folder / "other").mkdir()
    file = folder / "detection.json"
    line = fails(f"datasets.detection=[{{file: {file}, image_root: {folder / 'other'}}}]")
    assert f"image {folder / 'other'}/" in line
    assert "image_root says where" in line
    assert line.endswith(f"(so are all 6 images of {file})")
    line = fails(f"datasets.detection=[{{file: {file}, image_root: {folder / 'lost'}}}]")
    assert f"datasets.detection[0].image_root is '{folder / 'lost'}'; there is no such folder" in line


def test_texts_that_are_too_long(fails, folder):
    """One that the budget leaves out is no mistake. All of a file's are, and so is one beyond the model's positions."""
    long = "picture " * 100
    every = annotate(folder, "captions", lambda entries: [entry.update(prompt=long) for entry in entries])
    line = fails(every, "total_steps=9")
    assert "loader.max_sample_tokens is 150; the last 12 samples of " in line
    assert f"{folder / 'changed.json'}, which has 6, were all longer (this one has " in line
    room = ("loader.max_tokens=4000", "loader.max_sample_tokens=4000")
    line = fails(annotate(folder, "captions", put(prompt=long)), *room)
    assert f"({folder / '3.png'}).segments[0] reaches RoPE position" in line
    assert "config.max_position allows 511: its texts must be shorter" in line
    assert main(["train", "--config", str(folder / "run.yaml"), annotate(folder, "captions", put(prompt=long))]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_stops=3", "there is no setting 'total_stops'; is it 'total_steps' that is meant?"),
        ("optimizer.lrr=1", "there is no setting 'optimizer.lrr'; is it 'optimizer.lr' that is meant?"),
        ("optimiser.lr=1", "there is no setting 'optimiser'; is it 'optimizer' that is meant?"),
        ("losses.xyz=1", "there is no setting 'losses.xyz'; losses has mse, ce, label, diga"),
        ("datasets.captions=[{flie: a}]", "no setting 'datasets.captions[0].flie'; is it 'datasets.captions[0].file'"),
        ("total_steps=many", "total_steps is 'many'; it must be of type int"),
        ("total_steps=1.5", "total_steps is '1.5'; it must be of type int"),
        ("total_steps=null", "total_steps is None; it must be of type int"),
        ("recompute=perhaps", "recompute is 'perhaps'; it must be one of 'none', 'full', 'attention', 'selective'"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be of type float"),
        ("optimizer.betas=[0.9]", "optimizer.betas is '[0.9]'; it must be of type tuple with 2 elements"),
        ("optimizer=3", "optimizer is 3; it must be a group of settings: lr, betas, "),
        ("datasets.captions=a.json", "datasets.captions is 'a.json'; it must be a list, say [{file: …, "),
        ("datasets.captions=[os.path]", "datasets.captions[0] is 'os.path'; it must be a group of settings: file, "),
        ("total_steps=0", "total_steps is 0; it must be positive"),
        ("model.preset=big", "model.preset is 'big'; it must be one of ['bagel_7b', 'quickstart']"),
        ("model.tokenizer=lost", "model.tokenizer is 'lost'; there is no such folder"),
        ("model.tokenizer=null", "model.tokenizer is null; it must be a folder"),
        ("loader.max_sample_tokens=300", "loader.max_sample_tokens is 300; it must be in 1..max_tokens (200)"),
        ("loader.num_workers=-1", "loader.num_workers is -1; it must be at least 0"),
        ("device=warp", "device is 'warp'; it must be 'auto' or a device of this machine"),
    ],
)
def test_a_wrong_setting(fails, override, message):
    assert message in fails(override)


def test_an_output_folder_that_cannot_be(fails, folder):
    for output in (folder / "0.png", folder / "0.png" / "below" / "it"):
        line = fails(f"output={output}")
        assert f"output is '{output}'; it must be a folder, or be one that can be made" in line
        assert f"but {folder / '0.png'} is a file" in line


@pytest.mark.parametrize("argument", ["--speed=9", "--speed"])
def test_an_unknown_option(fails, argument):
    assert f"unrecognized arguments: {argument}" in fails(argument, code=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("total_steps: [", ", line 1: no YAML: expected the node content"),
        ("loader:\n\tmax_tokens: 3", ", line 2: no YAML: found character '\\t' that cannot start any token"),
        ("total_steps: 3\nseed: 1\ntotal_steps: 4", ", line 3: no YAML: 'total_steps' stands there twice"),
        ("optimizer: {lr: 1.0, lr: 2.0}", ", line 1: no YAML: 'lr' stands there twice"),
        ("", ": it holds nothing; it must hold settings, each as 'name: value'"),
        ("- stage\n- gduf", ": it holds \"['stage', 'gduf']\"; it must hold settings"),
        ("stage", ": it holds 'stage'; it must hold settings"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ": it is no text file; it must be a YAML file in UTF-8"),
        (b"seed: \x00", ": it is no text file; it must be a YAML file in UTF-8"),
        ("seed: 0\nlodaer: {seed: 1}", ": there is no setting 'lodaer'; is it 'loader' that is meant?"),
        ("watch: {evry: 1}", ": there is no setting 'watch.evry'; is it 'watch.every' that is meant?"),
        ("optimizer.lrr: 1", ": there is no setting 'optimizer.lrr'; is it 'optimizer.lr' that is meant?"),
        ("datasets:\n  detection: a.json", ": datasets.detection is 'a.json'; it must be a list, say [{file: …, "),
        ("optimizer: 3", ": optimizer is 3; it must be a group of settings: lr, "),
        ("optimizer:", ": optimizer is None; it must be a group of settings: lr, "),
        ("seed: [1, 2]", ": seed is '[1, 2]'; it must be of type int"),
    ],
)
def test_a_wrong_settings_file(fails, folder, content, message):
    (folder / "odd.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert fails(config="odd.yaml").startswith(f"unigendet train: settings of {folder / 'odd.yaml'}{message}")


def test_no_settings_file(fails, folder):
    assert f"settings file {folder / 'lost.yaml'} does not exist" in fails(config="lost.yaml")
    assert f"settings file {folder} is a folder; it must be a YAML file" in fails(config="")


def test_dotted_names_in_a_file_are_settings(folder):
    """What the command line takes may also stand in the file."""
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    dotted = copy.deepcopy(settings) | {"total_steps": 1, "optimizer.lr": 1e-3}
    (folder / "dotted.yaml").write_text(yaml.safe_dump(dotted))
    assert main(["train", "--config", str(folder / "dotted.yaml"), "optimizer.warmup_steps=0"]) == 0
