import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# The same examples in every run, on any machine; no test depends on the clock.
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")

GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_configure(config):
    """Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before a kernel is imported."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="folder of the golden *.safetensors files")


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden-dir")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"--golden-dir {folder} holds no *.safetensors files")
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU unless ``-m`` asks for it."""
    if "gpu" in config.option.markexpr.replace("not gpu", ""):
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
