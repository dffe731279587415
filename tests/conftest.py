import gc
import os
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # on a GPU machine: a file's other tests run without it
    stand_in = MagicMock(given=lambda *_, **__: pytest.mark.skip("needs hypothesis"))
    stand_in.settings.return_value = lambda test: test
    stand_in.__spec__ = ModuleSpec("hypothesis", None)  # which torch looks up
    sys.modules |= {"hypothesis": stand_in, "hypothesis.strategies": stand_in.strategies}
else:
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

# A shell's background job ignores SIGINT, and so would every process that the tests start, also those they interrupt.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "data" / "golden"


def wants_gpu(config):
    return "gpu" in config.option.markexpr.replace("not gpu", "")


def pytest_configure(config):
    """Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before a kernel is imported."""
    if not wants_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path, config):
    """A GPU machine may lack what other tests import: with ``-m gpu``, only files that name the marker are read."""
    if not wants_gpu(config) or collection_path == Path(__file__).parent:
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


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
    if wants_gpu(config):
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needs_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The folder of a small model with random weights that sees pictures of 8×8 pixels."""
    from command_runs import tiny_pipeline  # not on every GPU machine: it wants the command line's libraries

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline().save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures, one of them in a folder below, and a file that is none."""
    from command_runs import write_pictures

    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def detect(capsys, model_folder):
    """Runs ``unigendet detect`` with arguments."""
    from command_runs import run_command

    def run(*arguments, model=model_folder, tokens=4):
        return run_command(capsys, "detect", "--model", model, "--max-tokens", tokens, *arguments)

    return run


def pytest_collection_finish():
    """What collecting has made is there to stay: without it, every full garbage collection in a test is much faster."""
    gc.collect()
    gc.freeze()
