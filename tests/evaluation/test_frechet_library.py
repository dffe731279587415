"""Inception features by torch-fidelity: the command's are the library's own, on a network with random weights.

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
from unigendet.evaluation.generation import frechet_distance
from unigendet.evaluation.inception import InceptionFeatures

LIBRARIES = "UNIGENDET_FID_LIBRARIES"

PROGRAM = """
import json, sys
import numpy as np
import torch

folder = sys.argv[1]
# Beside another build of PyTorch torchvision's operators do not load, and its import fails where it describes two of
# them. Nothing here calls them.
if torch.version.cuda is None:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id_cached

torch.manual_seed(0)
torch.save({}, f"{folder}/empty.pth")
load = FeatureExtractorInceptionV3.load_state_dict
FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=f"{folder}/empty.pth")
FeatureExtractorInceptionV3.load_state_dict = load
for name, tensor in network.state_dict().items():
    if tensor.ndim == 4:  # so that the signal keeps its size through the layers
        tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
weights = f"{folder}/weights.pth"
torch.save(network.state_dict(), weights)

from unigendet.cli import main

code = main(["evaluate", "generation", "--features", "inception", "--inception-weights", weights, "--device", "cpu",
             "--batch-size", "2", "--images", f"{folder}/a", "--reference", f"{folder}/b", "--out", f"{folder}/out"])
options = dict(input1=f"{folder}/a", input2=f"{folder}/b", cuda=False, verbose=False, cache=False, save_cpu_ram=True,
               batch_size=1, feature_extractor_weights_path=weights)
extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options)
a, b = (extract_featuresdict_from_input_id_cached(i, extractor, **options)["2048"] for i in (1, 2))
np.savez(f"{folder}/features.npz", a=a.numpy(), b=b.numpy())
x, y = np.load(f"{folder}/few.npz").values()
distance = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)), False)
print(json.dumps({"code": code, "few": distance["frechet_inception_distance"]}))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of four pictures, of two sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, high in (("a", 256), ("b", 128)):
        (folder / name).mkdir()
        for i in range(4):
            pixels = rng.integers(0, high, ((20, 24, 3), (9, 9, 3))[i == 2], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_features_and_distance_are_the_librarys(pictures):
    libraries = os.environ.get(LIBRARIES)
    if libraries is None and importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip(f"torch-fidelity is not installed, and {LIBRARIES} names no folder of it")
    rng = np.random.default_rng(1)
    few = rng.normal(size=(40, 12)), rng.normal(size=(30, 12)) @ rng.normal(size=(12, 12)) + 1
    np.savez(pictures / "few.npz", *few)
    path = os.pathsep.join(p for p in (libraries, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-c", PROGRAM, str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0
    assert frechet_distance(*few) == pytest.approx(found["few"], rel=1e-9)
    ours = json.loads((pictures / "out" / "generation.json").read_text())
    theirs = np.load(pictures / "features.npz")
    assert theirs["a"].shape == (4, 2048)
    distance = frechet_distance(theirs["a"], theirs["b"])
    assert distance > 1
    assert ours["frechet_distance"] == pytest.approx(distance, rel=1e-4)  # batches change the last bits of float32
    assert ours["counts"] == {"images": 4, "reference": 4, "dimensions": 2048}
    assert (ours["features"], ours["agreement"], ours["real"]) == ("inception", None, None)
    small, unpublished = ours["warnings"]
    assert small.startswith("the smaller set has 4 images for 2,048 features: fewer than features")
    assert "the Inception weights are not the published ones" in unpublished
    assert len(ours["settings"]["inception_weights_sha256"]) == 64
    assert f"note: {small}" in done.stderr


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
    assert features._network.seen == [[2, 3, 20, 24], [1, 3, 9, 9], [1, 3, 20, 24]]
    expected = np.stack([np.asarray(Image.open(file), np.float64).mean((0, 1)) * 2 for file in files])
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    assert (rows.dtype, len(counted)) == (np.float64, 4)
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
    assert scores["counts"] == {"images": 4, "reference": 3, "dimensions": 2048}
    assert scores["settings"]["reference"] == str(pictures / "real.json")
    assert result.lines[:2] == ["generated images  4", "real images       3"]
    folder = evaluate(capsys, pictures, stand_in, "--reference", pictures / "b")  # its own scores are replaced
    assert folder.lines[1] == "real images       4"
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "real.json", "--image-root", tmp_path),
          f"real.json names images that are not there, 3 of 3: {tmp_path / 'b/0.png'}")  # fmt: skip
    (pictures / "bare.json").write_text(json.dumps([entries[0], "x"]))
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "bare.json"),
          "bare.json, entry 1 has no 'image_path', a real image to compare with")  # fmt: skip
    (pictures / "one.json").write_text(json.dumps(entries[:1]))
    fails(evaluate(capsys, pictures, stand_in, "--reference", pictures / "one.json"),
          "reference is '1 files'; it must be two or more")  # fmt: skip
