"""The whole study with a handful of steps: what it leaves, that it goes on where it stopped, and what it refuses.

Whether any arm is better is not tested here.
"""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from unigendet.cli import main
from unigendet.config_file import load_settings
from unigendet.data import quickstart as quickstart_data
from unigendet.data.quickstart import load_digits
from unigendet.quickstart import default_config
from unigendet.study import run as study_run
from unigendet.study import work as study_work
from unigendet.study.config import StudyConfig
from unigendet.study.run import MARK, run

STAGE = {
    "ema_decay": 0.5,
    "model": {"preset": "quickstart"},
    "loader": {"max_tokens": 300, "max_sample_tokens": 200},
}
QUICKSTART = {
    "fakes_per_real": 1,
    "batch_size": 800,
    "shown": 2,
    "guidance": {"num_timesteps": 2, "text_scale": 1.5, "interval": [0.0, 1.0], "timestep_shift": 1.0},
    "gduf": {**STAGE, "stage": "gduf", "total_steps": 2},
    "diga": {**STAGE, "stage": "diga", "total_steps": 2, "align_layer": 2, "teacher_layer": 3},
}
ARMS = {
    "latents": {"title": "GDUF", "controls": ["no_latents"]},
    "no_latents": {"title": "GDUF blind", "overrides": ["gduf.datasets.detection_latents=false"]},
    "still": {"title": "no alignment", "after": "latents", "overrides": ["diga.losses.diga=0"]},
    "conv": {
        "title": "convolution",
        "after": "latents",
        "overrides": ["diga.model.align_projector=conv", "diga.model.initialize=[diga_conv]"],
        "controls": ["still"],
    },
}
PRIMARY = [{"arm": "conv", "control": "still", "metric": "frechet"}]
TESTED = 60  # instead of 397 test images
PER_CLASS = 30  # instead of about 180 digits
RUNS = [(seed, arm) for seed in (1, 2) for arm in ARMS]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "quickstart.yaml").write_text(json.dumps(QUICKSTART))  # JSON is YAML
    study = {"seeds": 2, "draws": 2, "arms": ARMS, "primary": PRIMARY, "quickstart": str(folder / "quickstart.yaml")}
    (folder / "study.yaml").write_text(json.dumps(study))
    return folder / "study.yaml"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer digits, on one thread."""
    from sklearn import datasets

    everything = datasets.load_digits()
    rows = np.concatenate([np.flatnonzero(everything.target == d)[:PER_CLASS] for d in range(10)])
    everything.images, everything.target = everything.images[rows], everything.target[rows]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", lambda: everything)
        patch.setattr(quickstart_data, "_TEST_IMAGES", TESTED)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def run_small(out, settings, **options):
    console = Console(file=io.StringIO(), width=120)
    found = run(out, config=settings, console=console, **options)
    return found, console.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory, settings):
    """A finished study: its folder, its numbers, and what it printed."""
    out = tmp_path_factory.mktemp("study") / "out"
    return out, *run_small(out, settings)


def results(out):
    """Every result without what the clock decides."""
    files = sorted((out / "results").rglob("*.json"))
    read = {str(file.relative_to(out)): json.loads(file.read_text()) for file in files}
    return {name: {k: v for k, v in r.items() if k not in ("seconds", "cpu_seconds")} for name, r in read.items()}


def test_leaves_its_folder(done):
    out, _, _ = done
    assert sorted(p.name for p in out.iterdir()) == sorted(
        (MARK, "results", "grids", "report.html", "study.json", "work")
    )
    assert list((out / "work").iterdir()) == []
    assert len(results(out)) == len(list((out / "grids").glob("*.png"))) == len(RUNS)
    page = (out / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("</main>") == 1
    assert "convolution against no alignment" in page


def test_numbers(done):
    out, study, _ = done
    assert study == json.loads((out / "study.json").read_text())
    assert [(r["seed"], r["arm"]) for r in study["runs"]] == RUNS
    for entry in study["runs"]:
        known = {name for name, value in entry["metrics"].items() if value is not None}
        scores = {f"{m}_{r}" for m in ("balanced_accuracy", "auc") for r in ("seen", "held_out")} | {
            "frechet",
            "agreement",
        }
        after_gduf = entry["arm"] in ("latents", "no_latents")
        assert known == scores | ({"rouge_l"} if after_gduf else {"alignment"} if entry["arm"] == "conv" else set())
        assert np.mean(entry["draws"]["frechet"]) == pytest.approx(entry["metrics"]["frechet"])
        assert len(set(entry["draws"]["frechet"])) == 2
        assert entry["seconds"].keys() == entry["cpu_seconds"].keys() == {"training", "generation", "detection"}
        assert min(entry["seconds"].values()) > 0
    primary = study["comparisons"][0]
    assert (primary["arm"], primary["control"], primary["metric"], primary["primary"]) == (*PRIMARY[0].values(), True)
    frechet = {(r["seed"], r["arm"]): r["metrics"]["frechet"] for r in study["runs"]}
    assert primary["mean"] == pytest.approx(np.mean([frechet[s, "conv"] - frechet[s, "still"] for s in (1, 2)]))
    assert study["quickstart"]["gduf"]["total_steps"] == 2


def test_arms_differ_in_what_they_say_and_share_the_rest(done):
    out, study, _ = done
    recipes = {name: r["recipe"]["quickstart"] for name, r in results(out).items()}
    assert "diga" not in recipes["results/seed-0001/latents.json"]
    assert recipes["results/seed-0001/no_latents.json"]["gduf"]["datasets"]["detection_latents"] is False
    assert recipes["results/seed-0001/conv.json"]["diga"]["model"]["align_projector"] == "conv"
    by_seed = {s: {json.dumps(r["reference"]) for r in study["runs"] if r["seed"] == s} for s in (1, 2)}
    assert [len(references) for references in by_seed.values()] == [1, 1]
    assert by_seed[1] != by_seed[2]  # another split


def test_says_what_it_does(done):
    _, _, text = done
    assert "8 to do, 0 done" in text
    places = [text.index(words) for words in ("Seed 1: GDUF ", "Seed 1: GDUF blind", "Seed 2: GDUF", "The report:")]
    assert places == sorted(places)
    first, last = (text.splitlines()[i] for i in (1, 8))
    assert "left" not in first
    assert "1 to do, about" in last


def test_an_interrupted_study_goes_on(done, settings, tmp_path, monkeypatch):
    """Stopped in the middle of a DIGA arm, and once more while a result is written: the same numbers in the end."""
    out = tmp_path / "out"
    train, calls = study_work.train_stage, []

    def stops(model, config, *rest, **options):
        calls.append(config.stage)
        if calls == ["gduf", "gduf", "diga"]:
            raise KeyboardInterrupt
        return train(model, config, *rest, **options)

    monkeypatch.setattr(study_work, "train_stage", stops)
    with pytest.raises(KeyboardInterrupt):
        run_small(out, settings)
    assert sorted(results(out)) == ["results/seed-0001/latents.json", "results/seed-0001/no_latents.json"]
    (out / "results" / "seed-0001" / "still.partial").write_text("{")
    calls.clear()
    _, text = run_small(out, settings, seeds=1, arms=["conv"])
    assert calls == ["diga"]  # the model of the interrupted seed was still there
    assert "1 to do, 2 done" in text
    assert (out / "work" / "seed-0001").is_dir()  # an arm of this seed is still missing
    run_small(out, settings)
    assert results(out) == results(done[0])
    calls.clear()
    again, text = run_small(out, settings)
    assert calls == []
    assert "0 to do, 8 done" in text
    assert again["comparisons"] == done[1]["comparisons"]


def test_a_model_of_other_settings_is_not_used(settings, tmp_path, monkeypatch):
    """A leftover of another study in the working folder is trained anew."""
    calls = []
    monkeypatch.setattr(study_work, "train_stage", lambda model, config, *rest, **options: calls.append(config.stage))
    config = load_settings(StudyConfig, settings)
    study = study_run._Study(tmp_path, config, Console(file=io.StringIO()))
    work = study.work(1)
    folder = work.gduf("latents")
    work.gduf("latents")
    assert calls == ["gduf"]
    work.recipes["latents"]["draws"] = 99
    assert work.gduf("latents") == folder
    assert calls == ["gduf", "gduf"]


def test_results_of_other_settings_do_not_mix(done, settings, tmp_path):
    out, _, _ = done
    other = json.loads(settings.read_text()) | {"draws": 3}
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"latents.json is a result of other settings \(draws 2 → 3\)"):
        run_small(out, file)
    other = json.loads(settings.read_text()) | {"overrides": ["gduf.optimizer.lr=0.5"]}
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"quickstart.gduf.optimizer.lr 2e-05 → 0.5"):
        run_small(out, file)


def test_a_study_that_was_killed_at_its_first_file_begins_again(settings, tmp_path):
    config = load_settings(StudyConfig, settings)
    half = tmp_path / f".{MARK}.partial"
    half.write_text("A st")
    study_run._Study(tmp_path, config, Console(file=io.StringIO())).prepare()
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_refuses_a_folder_that_is_not_its_own(settings, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["study", "--out", str(tmp_path), "--config", str(settings)]) == 1
    assert "holds thesis.txt; it must be a new folder, or one that a study left" in capsys.readouterr().err
    assert main(["study", "--out", str(tmp_path / "new"), "--config", str(settings), "--arms", "dogs"]) == 1
    assert "arms is 'dogs'; it must be some of ['latents'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "arms is {}; it must be at least one arm"),
        ({"seeds": 0}, "seeds is 0; it must be positive"),
        ({"arms": ARMS | {"a/b": {"title": ""}}}, "an arm's name is 'a/b'"),
        ({"arms": ARMS | {"x": {"title": "", "after": "still"}}}, "arms.x.after is 'still'; it must be one of"),
        ({"arms": ARMS | {"x": {"title": "", "controls": ["x"]}}}, "arms.x.controls is 'x'; it must be other arms"),
        ({"arms": ["latents"]}, r"arms is \['latents'\]; it must be named groups, say \{NAME: \{title: …, after: …,"),
        ({"arms": {"x": "a title"}}, "arms.x is 'a title'; it must be a group of settings: title, after,"),
        ({"arms": {"x": {"titel": ""}}}, "there is no setting 'arms.x.titel'; is it 'arms.x.title' that is meant"),
        ({"primary": [PRIMARY[0] | {"arm": "y"}]}, "an arm in primary is 'y'"),
        ({"primary": [PRIMARY[0] | {"metric": "luck"}]}, "a metric in primary is 'luck'"),
    ],
)
def test_settings_that_do_not_fit(settings, tmp_path, change, message):
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(json.loads(settings.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_settings(StudyConfig, file)


@pytest.mark.parametrize("overrides", [(), ("arms.x.class_path=evil.Arm",), ("arms={x: {class_path: evil.Arm}}",)])
def test_no_setting_names_a_module_to_be_imported(settings, tmp_path, monkeypatch, overrides):
    (tmp_path / "evil.py").write_text("raise SystemExit('this module was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "study.yaml"
    arm = {"title": ""} if overrides else {"class_path": "evil.Arm"}
    file.write_text(json.dumps({"arms": {"x": arm}, "primary": []}))
    with pytest.raises(ValueError, match=r"there is no setting 'arms\.x\.class_path'"):
        load_settings(StudyConfig, file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gduf.total_steps=9", "arms.x.overrides is .* of diga only: it goes on from latents"),
        ("diga.teacher_norm=image", "teacher_norm"),
        ("diga.total_stops=9", "total_stops"),
    ],
)
def test_overrides_that_do_not_fit(settings, tmp_path, override, message):
    file = tmp_path / "study.yaml"
    arms = {
        "latents": ARMS["latents"] | {"controls": []},
        "x": {"title": "", "after": "latents", "overrides": [override]},
    }
    file.write_text(json.dumps(json.loads(settings.read_text()) | {"arms": arms, "primary": []}))
    with pytest.raises(ValueError, match=message):
        load_settings(StudyConfig, file).resolved()


def test_shipped_settings():
    """They load, every arm's settings fit, and the primary comparisons are the three that were announced."""
    config = load_settings(StudyConfig, default_config("study.yaml"))
    resolved = config.resolved()
    assert config.seeds >= 5
    assert [(p.arm, p.control, p.metric) for p in config.primary] == [
        ("latents", "no_latents", "balanced_accuracy_held_out"),
        ("diga", "extra_steps", "frechet"),
        ("diga", "shuffled", "frechet"),
    ]
    assert resolved["diga"] == resolved["latents"] == config.base()
    distinct = {json.dumps(config.recipe(name, resolved), sort_keys=True) for name in config.arms}
    assert len(distinct) == len(config.arms)


def test_splits_keep_clear_of_the_quickstart_s_test_images():
    usual = load_digits()
    tested = {image.tobytes() for image in usual.test_images}
    splits = [load_digits(seed) for seed in (1, 2)]
    for split in splits:
        assert len(split.test_images) == TESTED
        assert len(split.train_images) == len(usual.train_images)
        assert not tested & {image.tobytes() for image in split.test_images}
        assert tested <= {image.tobytes() for image in split.train_images}
        everything = sorted(image.tobytes() for image in (*split.train_images, *split.test_images))
        assert everything == sorted(image.tobytes() for image in (*usual.train_images, *usual.test_images))
        share = np.bincount(split.train_labels) / len(split.train_labels) - np.bincount(split.test_labels) / TESTED
        assert np.abs(share).max() < 0.03
    assert not np.array_equal(splits[0].test_images, splits[1].test_images)
    assert np.array_equal(splits[0].test_images, load_digits(1).test_images)
