"""Building unigendet._C: what the environment asks for, what is missing, what a distribution holds."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from unigendet.ops.backends import available, extension_facts

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def load(name):
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location(name, CSRC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build_extension = load("build_extension")
run_nvcc = load("run_nvcc")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A function that makes a folder with programs of these names, and the environment that finds nothing else."""
    monkeypatch.setattr(build_extension, "SYSTEM_CUDA", str(tmp_path / "nowhere"))

    def make(*names, folder="bin"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        return {"PATH": str(tmp_path / "bin")}

    return make


def test_where_there_is_a_compiler_the_extension_is_built():
    """In a tree that was installed in place; a distribution without it would lose its fastest loss unnoticed."""
    if build_extension.find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler")
    facts = extension_facts()
    assert facts is not None, "run pip install -e . or python setup.py build_ext --inplace"
    assert facts["usable_isa_levels"][-1] == "baseline"
    assert {"cpp"} <= set(available()["alignment_loss"])
    assert ("cuda" in available()["alignment_loss"]) == bool(facts["cuda_archs"]) == (facts["nvcc"] is not None)


def test_what_is_found_is_built(tools):
    read = build_extension.read_settings
    assert read(tools()) is None
    env = tools("g++")
    compiler = f"{env['PATH']}/g++"
    assert read(env) == build_extension.Settings(compiler, None, ())
    tools("nvcc", folder="cuda/bin")
    nvcc = str(Path(env["PATH"]).parent / "cuda" / "bin" / "nvcc")
    with_cuda = {**env, "CUDA_HOME": str(Path(nvcc).parent.parent)}
    assert read(with_cuda) == build_extension.Settings(compiler, nvcc, ("80", "90a"))
    assert read({**with_cuda, "UNIGENDET_CUDA": "off"}).nvcc is None
    archs = {**with_cuda, "UNIGENDET_CUDA": "on", "UNIGENDET_CUDA_ARCHS": "8.6; 10.0a;8.6"}
    assert read(archs).archs == ("86", "100a")


@pytest.mark.parametrize(
    ("programs", "variables", "message"),
    [
        (["g++"], {"UNIGENDET_CUDA": "yes"}, "UNIGENDET_CUDA is 'yes'; it must be auto, on or off"),
        (["g++"], {"UNIGENDET_CUDA": ""}, "UNIGENDET_CUDA is ''"),
        (["g++"], {"UNIGENDET_CUDA": "on"}, "UNIGENDET_CUDA is 'on', but there is no nvcc"),
        (["nvcc"], {"UNIGENDET_CUDA": "on"}, "UNIGENDET_CUDA is 'on', but there is no C"),
        (["g++"], {"CXX": "icpx"}, "CXX is 'icpx'"),
        *((["g++"], {"UNIGENDET_CUDA_ARCHS": a}, "UNIGENDET_CUDA_ARCHS is") for a in ("", ";", "sm_90", "9", "9.0;x")),
    ],
)
def test_wrong_settings(tools, programs, variables, message):
    with pytest.raises(build_extension.BuildError, match=message):
        build_extension.read_settings({**tools(*programs), **variables})


PTXAS = """\
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    24 bytes stack frame, 36 bytes spill stores, 28 bytes spill loads
"""


def test_spills_are_seen():
    assert run_nvcc.spills(PTXAS) == [("second", "sm_90a", 36)]
    assert run_nvcc.spills(PTXAS.replace("36", "0").replace("28", "0")) == []


@pytest.mark.parametrize(("archs", "code"), [(["80", "90a"], 1), (["80"], 0)])
def test_spills_fail_for_the_named_architectures(archs, code, capfd):
    command = [sys.executable, "-c", f"import sys; print('a warning'); sys.stderr.write({PTXAS!r})"]
    assert run_nvcc.run(archs, command) == code
    assert capfd.readouterr().out == "a warning\nsm_90a: 36 bytes of registers spill in second\n"
    assert run_nvcc.run(archs, [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_ninja_file(tmp_path):
    pytest.importorskip("pybind11")
    compiler = build_extension.find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = build_extension.ninja_file(build_extension.Settings(compiler, None, ()), "_C.so")
    assert "nvcc" not in text
    assert "-Werror" in text
    assert text.count("build cpu_") == (3 if "UNIGENDET_X86_LEVELS" in text else 1)


def run(*command, cwd, **variables):
    env = {**os.environ, **variables}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution."""
    for name in ("setuptools", "pybind11", "ninja", "build"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("unigendet", "kernels", "configs", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "unigendet" / "kernels").unlink(missing_ok=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_holds_the_sources(source):
    for folder in ("csrc", "kernels", "configs"):
        expected = {p.name for p in (ROOT / folder).iterdir() if p.is_file() and p.suffix not in (".pyc", ".so")}
        assert expected <= {p.name for p in (source / folder).iterdir()}


def wheel_of(source, **variables):
    for left_over in ("dist", "build"):
        shutil.rmtree(source / left_over, ignore_errors=True)
    output = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source, **variables)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist(), output


def test_without_a_compiler_the_wheel_is_pure_python(source, tmp_path):
    wheel, names, output = wheel_of(source, PATH=str(tmp_path), UNIGENDET_CUDA="auto")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if "_C" in name or name.startswith("csrc")]
    assert "unigendet/kernels/primitives.py" in names
    assert "no C++ compiler" in output


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_works(source, tmp_path):
    if build_extension.find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler")
    wheel, names, _ = wheel_of(source, UNIGENDET_CUDA="off")
    assert [name for name in names if name.startswith("unigendet/_C.")]
    assert not [name for name in names if name.startswith("csrc")]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import unigendet.ops.backends as b; print(b.__file__, b.extension_facts())"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert str(tmp_path) in output
    assert "'cuda_archs': []" in output
