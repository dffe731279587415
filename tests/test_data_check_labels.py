"""``unigendet data check``: labels that contradict answers or each other, images that are met twice, held-out data."""

import functools

import pytest
from checked_data import annotate, check_data, write_checked_data
from run_data import write_run_data

from unigendet.data.consistency import RealPaths


@pytest.fixture
def folder(tmp_path):
    return write_checked_data(tmp_path)


@pytest.fixture
def checked(capsys, folder):
    return functools.partial(check_data, capsys, folder)


def answer(folder, i, text, **values):
    turns = [{"from": "human", "value": "<image>Real?"}, {"from": "gpt", "value": text}]
    annotate(folder, "detection", i, conversations=turns, **values)


@pytest.mark.parametrize("balance", ["false", "true"])
def test_labels_that_contradict_their_answers(checked, folder, balance):
    answer(folder, 0, "This is a real image. The digit …")
    answer(folder, 1, "this is a FAKE image")
    answer(folder, 2, "The picture looks like what a generator makes of it. " * 3)
    result, found = checked(f"datasets.detection=[{{file: {folder / 'detection.json'}, balance: {balance}}}]")
    assert result.code == 1
    wrong = [one for source in found["sources"] for one in source["contradictions"]]
    assert sorted((one["where"], one["label"], one["text"]) for one in wrong) == [
        (f"{folder / 'detection.json'}, entry 0", 0, "This is a real image. The digit …"),
        (f"{folder / 'detection.json'}, entry 1", 1, "this is a FAKE image"),
    ]
    line = f"{folder / 'detection.json'}, entry 1: label is 1 (real), but the answer says fake: 'this is a FAKE image'"
    assert line in result.lines
    (undecided,) = (one for source in found["sources"] for one in source["undecided"])
    assert (undecided["where"], len(undecided["text"])) == (f"{folder / 'detection.json'}, entry 2", 81)
    (note,) = (line for line in result.lines if line.startswith("  note"))
    assert note.startswith(
        "  note     1 answer has no verdict (This is a real image, or a fake one), such as 'The pict"
    )
    assert result.lines[-1] == "2 labels contradict their answers"


def test_answers_without_a_verdict_are_no_mistake(checked, folder):
    for i in range(6):
        answer(folder, i, "It is hard to say.")
    result, found = checked()
    assert (result.code, found["ok"]) == (0, True)
    assert len(found["sources"][0]["undecided"]) == 6
    assert result.lines[-1] == "nothing is broken in 12 samples"


def test_repeated_images(checked, folder):
    """By another name, too; with both labels it is a mistake."""
    (folder / "again.png").symlink_to(folder / "3.png")
    annotate(folder, "detection", 1, image="again.png")
    annotate(folder, "captions", 1, image_path="0.png")
    result, found = checked()
    assert result.code == 0
    labelled, captions = found["sources"]
    assert labelled["repeated"] == [{"image": str(folder / "3.png"), "times": 2}]
    assert captions["repeated"] == [{"image": str(folder / "0.png"), "times": 2}]
    assert f"  note     1 image occurs more than once, such as {folder / '3.png'} (2 times)" in result.lines
    annotate(folder, "detection", 0, image="3.png")
    result, found = checked()
    assert result.code == 1
    real, fake = (f"{folder / 'detection.json'}, entry {i}" for i in (1, 0))
    assert found["both_labels"] == [{"image": str(folder / "3.png"), "real": real, "fake": fake}]
    assert f"{folder / '3.png'} is real ({real}) and fake ({fake})" in result.lines
    assert result.lines[-1] == "1 image has both labels"


def test_both_labels_in_two_data_sets(checked, folder):
    (folder / "labelled" / "real").mkdir(parents=True)
    (folder / "labelled" / "real" / "0.png").symlink_to(folder / "0.png")
    data = f"[{{file: {folder / 'detection.json'}}}, {{file: {folder / 'labelled'}}}]"
    result, found = checked(f"datasets.detection={data}")
    assert result.code == 1
    (both,) = found["both_labels"]
    assert both["real"] == str(folder / "labelled" / "real" / "0.png")


@pytest.fixture
def looks(folder):
    """Held-out images, and the settings with which a run looks at them."""
    (folder / "held_out").mkdir()
    write_run_data(folder / "held_out")
    (folder / "prompts.txt").write_text("a picture\nanother\n")
    held_out = folder / "held_out" / "detection.json"
    return ["watch.every=1", f"watch.detection={held_out}", f"watch.prompts_file={folder / 'prompts.txt'}"]


def test_held_out_images(checked, folder, looks):
    plain = checked()[1]
    assert (plain["held_out"], plain["prompts"]) == (None, None)
    assert checked(*looks[1:])[1] == plain  # a run that never looks
    result, found = checked(*looks)
    assert result.code == 0
    held_out = found["held_out"]
    assert (held_out["kind"], held_out["records"], held_out["checked"]) == ("held_out", 6, 6)
    assert (held_out["labels"], held_out["tokens"], found["prompts"]) == ({"real": 3, "fake": 3}, None, 2)
    assert result.lines[-1] == "nothing is broken in 12 samples and 6 held-out images"
    for name in ("sources", "packs"):
        assert found[name] == plain[name]
    (folder / "held_out" / "0.png").write_text("no image")
    (folder / "held_out" / "5.png").unlink()
    result, found = checked(*looks)
    assert result.code == 1
    assert [one["where"] for one in found["held_out"]["broken"]] == [
        f"{folder / 'held_out' / 'detection.json'}, entry {i}" for i in (0, 5)
    ]
    assert result.lines[-1] == "2 of 6 held-out images are broken"
    result, found = checked(*looks, "watch.limit=2")  # entries 0 and 1
    assert found["held_out"]["checked"] == 2
    assert result.lines[-1] == "1 of 2 held-out images are broken"


def test_held_out_images_that_are_trained_on(checked, folder, looks):
    (folder / "held_out" / "4.png").unlink()
    (folder / "held_out" / "4.png").symlink_to(folder / "2.png")
    result, found = checked(*looks)
    assert result.code == 0
    assert [source["held_out_too"] for source in found["sources"]] == [[str(folder / "2.png")]] * 2
    assert (
        f"  note     1 image is among the held-out ones too, such as {folder / '2.png'}: scores on them say little"
        in (result.lines)
    )


def test_held_out_data_of_no_use(checked, folder, looks):
    result, found = checked(*looks, f"watch.image_root={folder / 'tokenizer'}")
    line = (
        f"{folder / 'held_out' / 'detection.json'}: all 6 images are missing, the first is "
        f"{folder / 'tokenizer' / '0.png'}; watch.image_root says what its paths are relative to"
    )
    assert line in result.lines
    assert found["packs"]["packed"] == 500
    (folder / "prompts.txt").write_text("# nothing\n")
    annotate(folder / "held_out", "detection", 2, label=7)
    result, found = checked(*looks)
    assert result.code == 1
    assert found["unread"] == [f"watch.prompts_file: {folder / 'prompts.txt'} holds no prompt"]
    assert result.lines[-1] == "1 entry is malformed; 1 file or folder is of no use"
    result, found = checked(looks[0], f"watch.detection={folder / 'lost'}")
    assert found["held_out"]["error"] == f"watch.detection is '{folder / 'lost'}'; there is no such file or folder"
    assert result.lines[-1] == "1 file or folder is of no use"


def test_real_paths(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    (tmp_path / "a" / "link.png").symlink_to("x.png")
    (tmp_path / "b").symlink_to("a")
    real_path = RealPaths()
    for name in ("a/x.png", "a/link.png", "b/x.png", "b/link.png", "a/lost.png", "lost/x.png"):
        assert real_path(tmp_path / name) == str((tmp_path / name).resolve())
