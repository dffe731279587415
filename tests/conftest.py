from pathlib import Path

GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_addoption(parser):
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="folder of the golden *.safetensors files")


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden-dir")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"--golden-dir {folder} holds no *.safetensors files")
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])
