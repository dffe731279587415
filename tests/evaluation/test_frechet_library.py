"""Inception features by torch-fidelity: our command's distance is the library's own, on a network with random weights.

The published weights cannot be had here. The library runs in a process of its own, from the folder that
``UNIGENDET_FID_LIBRARIES`` names (``make test`` fills it) or from where it is installed.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_runs import fails, run_command
from PIL import Image

from unigendet.evaluation import inception
from unigendet.evaluation.inception import InceptionFeatures

LIBRARIES = "UNIGENDET_FID_LIBRARIES"

PROGRAM = """
import json, sys
import torch

folder = sys.argv[1]
# Beside another build of PyTorch torchvision's operators do not load, and its import fails where it describes these two.
# Nothing here calls them.
if torch.version.cuda is None:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

torch.hub.load_state_dict_from_url = None
torch.manual_seed(0)
torch.save({}, f"{folder}/empty.pth")
load = FeatureExtractorInceptionV3.load_state_dict
FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=f"{folder}/empty.pth")
FeatureExtractorInceptionV3.load_state_dict = load
for name, tensor in network.state_dict().items():
    if tensor.ndim == 4:  # so that the signal keeps its size through the layers
        tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
torch.save(network.state_dict(), f"{folder}/weights.pth")

from unigendet.cli import main

base = ["evaluate", "generation", "--features", "inception", "--inception-weights", f"{folder}/weights.pth",
        "--device", "cpu", "--batch-size", "3", "--images", f"{folder}/a"]
codes = [main([*base, "--reference", f"{folder}/{name}", "--out", f"{folder}/{name}-scores"]) for name in "ba"]
theirs = torch_fidelity.calculate_metrics(
    input1=f"{folder}/a", input2=f"{folder}/b", fid=True, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    batch_size=1, feature_extractor_weights_path=f"{folder}/weights.pth",
)
print(json.dumps({"codes": codes, "theirs": theirs["frechet_inception_distance"]}))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of five pictures, of two sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 128)):
        (folder / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, high, ((20, 24, 3), (9, 9, 3))[i % 4 == 3], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_the_distance_is_the_librarys(pictures):
    libraries = os.environ.get(LIBRARIES)
    if libraries is None and importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip(f"torch-fidelity is not installed, and {LIBRARIES} names no folder of it")
    path = os.pathsep.join(p for p in (libraries, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-c", PROGRAM, str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0]
    ours, same = (json.loads((pictures / f"{name}-scores" / "generation.json").read_text()) for name in "ba")
    assert found["theirs"] > 1
    # With fewer images than features their product of covariances is singular, which costs its eigenvalues digits.
    assert ours["frechet_distance"] == pytest.approx(found["theirs"], rel=1e-4)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert ours["counts"] == {"images": 5, "reference": 5, "dimensions": 2048}
    assert (ours["features"], ours["agreement"], ours["real"]) == ("inception", None, None)
    few, unpublished = ours["warnings"]
    assert few.startswith("the smaller set has 5 images for 2,048 features: fewer than features")
    assert "the Inception weights are not the published ones" in unpublished
    assert len(ours["settings"]["inception_weights_sha256"]) == 64
    assert f"note: {few}" in done.stderr


class Network(torch.nn.Module):
    """Stands for the library's network: three features that tell pictures apart; notes what it got."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048"])
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.seen = []

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen.append(list(images.shape))
        return (images.float().mean((2, 3)) * self.scale,)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A module with the network, and a file of weights for it."""
    module = type(sys)("torch_fidelity")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    torch.save({"scale": torch.full((1,), 2.0)}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_images_come_in_their_order_in_batches_of_one_size(pictures, stand_in):
    files = sorted((pictures / "a").iterdir())
    counted = []
    features = InceptionFeatures(stand_in)
    rows = features(files, batch_size=2, done=lambda: counted.append(1))
    assert features._network.seen == [[2, 3, 20, 24], [1, 3, 20, 24], [1, 3, 9, 9], [1, 3, 20, 24]]
    expected = np.stack([np.asarray(Image.open(file), np.float64).mean((0, 1)) * 2 for file in files])
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    assert (rows.dtype, len(counted)) == (np.float64, 5)
    assert not features.published


def test_published_weights_are_known_by_their_hash(stand_in, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", InceptionFeatures(stand_in).sha256[:8])
    assert InceptionFeatures(stand_in).published


@pytest.mark.parametrize("content", [b"", b"<html>Not Found</html>", "code", "other", "cut"])
def test_wrong_weights(stand_in, tmp_path, content):
    """Also a file that would run code when it is loaded: it does not."""
    if content == "code":
        torch.save({"scale": Trap(tmp_path / "ran")}, stand_in)
    elif content == "other":
        torch.save({"weight": torch.ones(3)}, stand_in)
    elif content == "cut":
        stand_in.write_bytes(stand_in.read_bytes()[:-99])
    else:
        stand_in.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth does not hold Inception's weights; it must be torch-fidelity's wei"):
        InceptionFeatures(stand_in)
    assert not (tmp_path / "ran").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def evaluate(capsys, pictures, weights, *more):
    return run_command(capsys, "evaluate", "generation", "--features", "inception", "--images", pictures / "a", "--out",
                       weights.parent / "out", "--device", "cpu", "--inception-weights", weights, *more)  # fmt: skip


def test_what_is_missing_is_named_and_nothing_is_downloaded(capsys, pictures, stand_in, monkeypatch, tmp_path):
    reference = ("--reference", pictures / "b")
    fails(evaluate(capsys, pictures, tmp_path / "lost.pth", *reference),
          "lost.pth do not exist; it must be torch-fidelity's weights-inception-2015-12-05-6726825d.pth, a file of its "
          "release v0.2.0 at github.com/toshas/torch-fidelity")  # fmt: skip
    fails(evaluate(capsys, pictures, stand_in), "--images needs --reference")
    bare = run_command(capsys, "evaluate", "generation", "--features", "inception", "--images", pictures / "a", "--out",
                       tmp_path / "out", *reference)  # fmt: skip
    fails(
        bare, "--features inception needs --inception-weights: torch-fidelity's weights-inception-2015-12-05-6726825d."
    )
    assert "it is never downloaded here" in bare.err
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    fails(evaluate(capsys, pictures, stand_in, *reference),
          "Inception features need the package 'torch_fidelity': pip install 'unigendet[fid]'")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_torchvision_of_another_build_is_told(capsys, pictures, stand_in, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(package.parent)
    result = evaluate(capsys, pictures, stand_in, "--reference", pictures / "b")
    fails(result, "torch-fidelity cannot be loaded (operator torchvision::nms does not exist); it needs a torchvision")
    assert f"that was built for this PyTorch, {torch.__version__}" in result.err


def test_command_with_annotations_as_reference(capsys, pictures, stand_in, tmp_path):
    entries = [{"image_path": f"b/{i}.png", "prompt": "x"} for i in (0, 1, 1, 2)]
    (pictures / "real.json").write_text(json.dumps(entries))
    result = evaluate(capsys, pictures, stand_in, "--reference", pictures / "real.json")
    assert result.code == 0
    scores = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert scores["counts"] == {"images": 5, "reference": 3, "dimensions": 2048}
    assert scores["settings"]["reference"] == str(pictures / "real.json")
    assert result.lines[:2] == ["generated images  5", "real images       3"]
    folder = evaluate(capsys, pictures, stand_in, "--reference", pictures / "b")  # its own scores are replaced
    assert folder.lines[1] == "real images       5"
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "real.json", "--image-root", tmp_path),
          f"real.json names images that are not there, 3 of 3: {tmp_path / 'b/0.png'}")  # fmt: skip
    (pictures / "bare.json").write_text(json.dumps([entries[0], "x"]))
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "bare.json"),
          "bare.json, entry 1 has no 'image_path', a real image to compare with")  # fmt: skip
    (pictures / "one.json").write_text(json.dumps(entries[:1]))
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "one.json"),
          "reference is '1 files'; it must be two or more")  # fmt: skip
