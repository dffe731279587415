"""Building unigendet._C: what the environment asks for, what is missing, what a distribution holds."""

import importlib.util
import os
import re
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
    """A function that makes a folder with scripts of these names, and the environment that finds nothing else."""
    monkeypatch.setattr(build_extension, "SYSTEM_CUDA", str(tmp_path / "nowhere"))

    def make(*names, folder="bin", script=""):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        return {"PATH": str(tmp_path / "bin")}

    return make


needs_compiler = pytest.mark.skipif(
    build_extension.find_compiler(os.environ) is None,
    reason="no C++ compiler: the package is pure Python then, as test_without_a_compiler shows",
)


@needs_compiler
def test_where_there_is_a_compiler_the_extension_is_built():
    """In a tree that was installed in place; a distribution without it would lose its fastest loss unnoticed."""
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
    assert read(env) == build_extension.Settings((compiler,), None, ())
    tools("nvcc", folder="cuda/bin")
    nvcc = str(Path(env["PATH"]).parent / "cuda" / "bin" / "nvcc")
    with_cuda = {**env, "CUDA_HOME": str(Path(nvcc).parent.parent)}
    assert read(with_cuda) == build_extension.Settings((compiler,), nvcc, ("80", "90a"))
    assert read({**with_cuda, "UNIGENDET_CUDA": "off"}).nvcc is None
    assert read({**with_cuda, "UNIGENDET_EXTENSION": "off"}) is None
    assert read({**env, "CXX": "g++ -m64"}).compiler == (compiler, "-m64")
    tools("ccache")
    launched = read({**env, "CXX": "ccache 'g++' -m64"}).compiler
    assert launched == (f"{env['PATH']}/ccache", "g++", "-m64")
    assert build_extension.host_compiler(launched) == ["-ccbin", "g++", "-Xcompiler", "-m64"]
    assert build_extension.host_compiler([compiler, "-Wl,-z,now", "-g"])[2:] == ["-Xcompiler", r"-Wl\,-z\,now,-g"]
    archs = {**with_cuda, "UNIGENDET_CUDA": "on", "UNIGENDET_CUDA_ARCHS": "8.6; 10.0a;8.6"}
    assert read(archs).archs == ("86", "100a")


@pytest.mark.parametrize(
    ("programs", "variables", "message"),
    [
        (["g++"], {"UNIGENDET_CUDA": "yes"}, "UNIGENDET_CUDA is 'yes'; it must be auto, on or off"),
        (["g++"], {"UNIGENDET_CUDA": ""}, "UNIGENDET_CUDA is ''"),
        (["g++"], {"UNIGENDET_CUDA": "on"}, "UNIGENDET_CUDA is 'on', but there is no nvcc"),
        (["nvcc"], {"UNIGENDET_CUDA": "on"}, "UNIGENDET_CUDA is 'on', but there is no C"),
        (["g++"], {"UNIGENDET_EXTENSION": "no"}, "UNIGENDET_EXTENSION is 'no'; it must be auto or off"),
        (["g++", "nvcc"], {"UNIGENDET_EXTENSION": "off", "UNIGENDET_CUDA": "on"}, "but UNIGENDET_EXTENSION is 'off'"),
        *((["g++"], {"CXX": c}, "CXX is") for c in ("icpx", "ccache g++", " ", "'g++")),
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


LOST = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'second'"


def says(text, code=0):
    """A command that writes ``text`` to stderr and exits with ``code``."""
    return [sys.executable, "-c", f"import sys; sys.stderr.write({text!r}); sys.exit({code})"]


def test_spills_are_seen():
    assert run_nvcc.kernels(PTXAS) == [("first", "sm_80", 0, 0), ("second", "sm_90a", 24, 36)]


@pytest.mark.parametrize(("archs", "code"), [(["80", "90a"], 1), (["80"], 0)])
def test_spills_fail_for_the_named_architectures(archs, code, capfd):
    report = f"a warning\n{PTXAS}ptxas info    : 0 bytes gmem, 24 bytes cmem[4]\n{LOST}\n"
    assert run_nvcc.run(archs, says(report)) == code
    assert capfd.readouterr().out == f"a warning\n{LOST}\nsm_90a: 36 bytes of registers spill in second\n"
    assert run_nvcc.run(archs, says(PTXAS, code=3)) == 3


def test_stack_frames_are_shown(capfd):
    report = PTXAS.replace("36", "0").replace("28", "0")
    assert run_nvcc.run(["80", "90a"], says(report)) == 0
    assert capfd.readouterr().out == "sm_90a: a stack frame of 24 bytes in second\n"
    assert run_nvcc.run(["80"], says(report)) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("report", ["", PTXAS.replace("Compiling entry", "Building"), PTXAS.replace("spill", "lost")])
def test_a_report_without_kernels_fails(report, capfd):
    assert run_nvcc.run(["80", "90a"], says(report)) == 1
    assert "nvcc reports no kernel" in capfd.readouterr().out


@pytest.fixture
def rendered(tools):
    """A function from the fields of Settings that differ to build.ninja; its compilers do nothing but say a version."""
    pytest.importorskip("pybind11")
    folder = tools("g++", "nvcc", script="echo fake compiler, release 1.2")["PATH"]

    def render(compiler=("g++",), nvcc=True, archs=("80", "90a"), openmp=True):
        program, *flags = compiler
        settings = build_extension.Settings(
            (f"{folder}/{program}", *flags), f"{folder}/nvcc" if nvcc else None, archs if nvcc else ()
        )
        return build_extension.ninja_file(settings, "_C.so", openmp)

    return render


def test_ninja_file(rendered):
    text = rendered(nvcc=False)
    assert "nvcc" not in text
    assert "-Werror" in text
    assert "fake compiler, release 1.2" in text
    levels = 3 if "UNIGENDET_X86_LEVELS" in text else 1
    for source in build_extension.CPU_SOURCES:
        assert text.count(f"build {source.removesuffix('.cpp')}_") == levels


def test_ninja_file_with_cuda(rendered):
    lines = rendered(compiler=("g++", "-m64")).splitlines()
    command = lines[lines.index("rule nvcc") + 1]
    link = lines[lines.index("rule link") + 1]
    for text in (command, link):
        assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in text
        assert re.search(r"/nvcc -ccbin \S+/g\+\+ -Xcompiler -m64 ", text)
    assert "run_nvcc.py 80,90a " in command
    assert "-Xptxas -v" in command
    assert "-Werror all-warnings" in command
    (target,) = (line for line in lines if line.startswith("build cuda.o: nvcc "))
    assert target.endswith("alignment_loss.cu")
    assert any("UNIGENDET_NVCC" in line and "sm_80;sm_90a" in line for line in lines)
    (library,) = (line for line in lines if line.startswith("build _C.so: link "))
    assert {"bindings.o", "tensors.o", "cuda.o", "alignment_loss_cpu_baseline.o"} <= set(library.split())


def commands(text):
    """Target → the line that ninja compares with that of the last build: its rule's command and its flags."""
    rules = dict(re.findall(r"^rule (\w+)\n  command = (.*)$", text, re.MULTILINE))
    targets = re.findall(r"^build (\S+): (\w+) .*\n(?:  flags = (.*))?", text, re.MULTILINE)
    return {target: (rules[rule], flags) for target, rule, flags in targets}


def test_what_changes_the_build_is_in_the_commands(rendered, monkeypatch):
    """So that ninja compiles anew."""
    before = commands(rendered())
    host = {target for target in before if target.endswith(".o")} - {"bindings.o", "cuda.o"}

    def changed(after):
        return {target for target in before if before[target] != after[target]}

    assert changed(commands(rendered())) == set()
    assert changed(commands(rendered(archs=("80",)))) == {"cuda.o", "bindings.o", "_C.so"}
    assert changed(commands(rendered(compiler=("g++", "-m64")))) == set(before)
    assert changed(commands(rendered(openmp=False))) == {*host, "bindings.o", "_C.so"}
    monkeypatch.setattr(build_extension, "HOST_FLAGS", [*build_extension.HOST_FLAGS, "-g"])
    assert changed(commands(rendered())) == {*host, "bindings.o", "cuda.o"}


def test_without_openmp(rendered):
    text = rendered(openmp=False)
    assert "-fopenmp" not in text
    assert "-Wno-unknown-pragmas" in text
    assert "release 1.2, without OpenMP" in text
    assert "without OpenMP" not in rendered()
    assert "-Wno-unknown-pragmas" not in rendered()


def test_openmp_is_tried(tools):
    """The compiler is asked to compile and link a program, and its exit status is the answer."""
    script = """status=$1
case " $* " in *" -c "*) exit 2 ;; *" -fopenmp "*.cpp*) exit $status ;; esac
exit 2"""
    compiler = f"{tools('c++', script=script)['PATH']}/c++"
    assert build_extension.has_openmp([compiler, "0"])
    assert not build_extension.has_openmp([compiler, "1"])
    assert not build_extension.has_openmp([f"{compiler}-missing"])


# What nvcc of CUDA 11 does: it knows no 90a.
OLD_NVCC = """case "$*" in
*--version*) echo "Copyright"; echo "Cuda compilation tools, release 11.8, V11.8.89" ;;
*90a*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_90a'" >&2; exit 1 ;;
esac"""


@pytest.mark.parametrize("cuda", ["auto", "on"])
def test_an_architecture_that_nvcc_does_not_know(tools, tmp_path, cuda):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    tools("nvcc", script=OLD_NVCC)
    env = {**tools("g++", script="echo g++"), "UNIGENDET_CUDA": cuda}
    with pytest.raises(build_extension.BuildError) as error:
        build_extension.build(build_extension.read_settings(env), tmp_path / "build", "_C.so")
    for part in ("release 11.8", "sm_90a", "UNIGENDET_CUDA_ARCHS", "UNIGENDET_CUDA=off", "UNIGENDET_EXTENSION=off"):
        assert part in str(error.value)
    build_extension.check_archs(build_extension.read_settings({**env, "UNIGENDET_CUDA_ARCHS": "8.0;9.0"}))


@pytest.mark.parametrize("broken", ["g++", "nvcc"])
@pytest.mark.parametrize("script", ["exit 1", "", "echo; exit 0"])
def test_a_broken_compiler_is_named(tools, tmp_path, broken, script):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    tools("g++", "nvcc", script="echo works")
    settings = build_extension.read_settings(tools(broken, script=script))
    with pytest.raises(
        build_extension.BuildError, match=f"{re.escape(broken)} --version' fails or says nothing"
    ) as error:
        build_extension.build(settings, tmp_path / "build", "_C.so")
    assert "UNIGENDET_EXTENSION=off" in str(error.value)
    assert ("UNIGENDET_CUDA=off" in str(error.value)) == (broken == "nvcc")


@pytest.mark.parametrize("cuda", ["auto", "off"])
def test_a_failed_build_says_how_to_do_without(tools, tmp_path, cuda):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    tools("nvcc", script="echo nvcc")
    failing = 'case "$*" in *--version*) echo g++ ;; *) exit 1 ;; esac'
    settings = build_extension.read_settings({**tools("g++", script=failing), "UNIGENDET_CUDA": cuda})
    with pytest.raises(build_extension.BuildError, match="could not be built") as error:
        build_extension.build(settings, tmp_path / "build", "_C.so")
    assert ("set UNIGENDET_CUDA=off to build without CUDA" in str(error.value)) == (cuda == "auto")
    assert "UNIGENDET_EXTENSION=off to install without unigendet._C" in str(error.value)


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


def test_switched_off_nothing_is_compiled_and_nothing_in_the_tree_removed(source):
    built = source / "unigendet" / "_C.cpython-00-any.so"
    built.write_bytes(b"of another build")
    code = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv[1:] = ['build_ext', '--inplace']; {code}"]
    output = run(*command, cwd=source, UNIGENDET_EXTENSION="off", CXX="missing", UNIGENDET_CUDA="auto")
    assert "UNIGENDET_EXTENSION is 'off'" in output
    assert built.read_bytes() == b"of another build"
    built.unlink()


@pytest.mark.slow
@needs_compiler
def test_the_wheel_of_the_source_distribution_works(source, tmp_path):
    wheel, names, _ = wheel_of(source, UNIGENDET_CUDA="off")
    assert [name for name in names if name.startswith("unigendet/_C.")]
    assert not [name for name in names if name.startswith("csrc")]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import unigendet.ops.backends as b; print(b.__file__, b.extension_facts())"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert str(tmp_path) in output
    assert "'cuda_archs': []" in output
