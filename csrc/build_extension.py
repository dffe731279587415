"""Builds ``unigendet._C`` with ninja: the host part wherever a C++ compiler is, the CUDA part where nvcc is, too.

Read by setup.py; knows nothing of torch. The environment says what is built:

    UNIGENDET_CUDA        auto (the default: if nvcc is found), on (an error without nvcc) or off
    UNIGENDET_CUDA_ARCHS  compute capabilities, separated by semicolons; the default is "8.0;9.0a"
    CXX, CUDA_HOME        where the compilers are, if not on the PATH
    MAX_JOBS              how many compilers run at a time

Without a C++ compiler nothing is built and the package is pure Python. Any error of a compiler is an error of the
build, and so is a register that spills in a kernel for one of the default architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a"
SYSTEM_CUDA = "/usr/local/cuda/bin"
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# Namespace → flags of each build of alignment_loss_cpu.cpp.
X86_LEVELS = {
    "x86_64_v3": ["-mavx2", "-mfma", "-mf16c"],
    "x86_64_v4": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(Exception):
    """Something the user can put right; its text is the whole message."""


@dataclass(frozen=True)
class Settings:
    """What is built: the C++ compiler, nvcc or None, and the architectures, as "80" or "90a"."""

    compiler: str
    nvcc: str | None
    archs: tuple[str, ...]


def find_compiler(env: Mapping[str, str]) -> str | None:
    """Path of the C++ compiler, CXX's if that is set; None if there is none."""
    if env.get("CXX"):
        found = shutil.which(env["CXX"], path=env.get("PATH"))
        if found is None:
            raise BuildError(f"CXX is {env['CXX']!r}; it must be a C++ compiler on the PATH")
        return found
    names = ("c++", "g++", "clang++")
    return next(filter(None, (shutil.which(name, path=env.get("PATH", "")) for name in names)), None)


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Path of nvcc: in CUDA_HOME or CUDA_PATH, on the PATH, or in /usr/local/cuda; None if there is none."""
    folders = [str(Path(env[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, env.get("PATH", ""), SYSTEM_CUDA]))


def parse_archs(text: str) -> tuple[str, ...]:
    """``"8.0;9.0a"`` → ("80", "90a")."""
    archs = [arch.strip() for arch in text.split(";") if arch.strip()]
    if not archs or not all(re.fullmatch(r"[1-9][0-9]?\.[0-9][af]?", arch) for arch in archs):
        raise BuildError(f"UNIGENDET_CUDA_ARCHS is {text!r}; it must be like {DEFAULT_ARCHS!r}")
    return tuple(dict.fromkeys(arch.replace(".", "") for arch in archs))


def read_settings(env: Mapping[str, str]) -> Settings | None:
    """What the environment asks for; None if there is no C++ compiler, BuildError if it asks for what is not there."""
    cuda = env.get("UNIGENDET_CUDA", "auto")
    if cuda not in ("auto", "on", "off"):
        raise BuildError(f"UNIGENDET_CUDA is {cuda!r}; it must be auto, on or off")
    archs = parse_archs(env.get("UNIGENDET_CUDA_ARCHS", DEFAULT_ARCHS))
    compiler = find_compiler(env) if sys.platform != "win32" else None
    nvcc = None if cuda == "off" else find_nvcc(env)
    if cuda == "on" and (compiler is None or nvcc is None):
        missing = "C++ compiler (c++, g++ or clang++)" if compiler is None else "nvcc (set CUDA_HOME)"
        raise BuildError(f"UNIGENDET_CUDA is 'on', but there is no {missing}")
    return None if compiler is None else Settings(compiler, nvcc, archs if nvcc else ())


def _version(command: str) -> str:
    lines = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0]).strip()


def ninja_file(settings: Settings, output: str) -> str:
    """The text of build.ninja, which makes ``output`` in the folder that the file is in."""
    import pybind11

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{sysconfig.get_path('platinclude')}"]
    includes.append(f"-I{pybind11.get_include()}")
    defines = ["-DUNIGENDET_X86_LEVELS"] if is_x86 else []
    facts = [f'-DUNIGENDET_COMPILER="{_version(settings.compiler)}"']
    if settings.nvcc:
        archs = ";".join(f"sm_{arch}" for arch in settings.archs)
        facts += [
            "-DUNIGENDET_CUDA",
            f'-DUNIGENDET_CUDA_ARCHS="{archs}"',
            f'-DUNIGENDET_NVCC="{_version(settings.nvcc)}"',
        ]
    levels = {"baseline": [], **(X86_LEVELS if is_x86 else {})}
    objects = [(f"cpu_{name}.o", "cxx", "alignment_loss_cpu.cpp", [f"-DUNIGENDET_ISA={name}", *defines, *flags])
               for name, flags in levels.items()]  # fmt: skip
    objects.append(("bindings.o", "cxx", "bindings.cpp", [*facts, *defines, *includes]))
    linker = [settings.compiler, *OPENMP, "-shared"]
    if sys.platform == "darwin":
        linker += ["-undefined", "dynamic_lookup"]
    nvcc: list[str] = []
    if settings.nvcc:
        host = [*HOST_FLAGS[HOST_FLAGS.index("-fPIC") :]]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in settings.archs]
        nvcc = [settings.nvcc, "-ccbin", settings.compiler, "-std=c++17", "-O3", *codes]
        nvcc += ["-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler", ",".join(host)]
        objects.append(("cuda.o", "nvcc", "alignment_loss.cu", []))
        linker = [settings.nvcc, "-ccbin", settings.compiler, "-shared", "-cudart", "static", *codes]
        linker += ["-Xcompiler", ",".join(OPENMP), "-Xlinker", "--exclude-libs,ALL"]
    # The interpreter's real path: another virtual environment must not compile everything again.
    checked = [
        str(Path(sys.executable).resolve()),
        str(HERE / "run_nvcc.py"),
        ",".join(parse_archs(DEFAULT_ARCHS)),
        *nvcc,
    ]
    rules = {
        "cxx": [settings.compiler, *HOST_FLAGS, *OPENMP, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"],
        "nvcc": [*checked, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"],
    }
    lines = ["ninja_required_version = 1.3", ""]
    for name, command in rules.items():
        if name == "nvcc" and not nvcc:
            continue
        lines += [f"rule {name}", f"  command = {_join(command)}", "  depfile = $out.d", "  deps = gcc", ""]
    lines += ["rule link", f"  command = {_join([*linker, '$in', '-o', '$out'])}", ""]
    for target, rule, source, flags in objects:
        lines += [f"build {target}: {rule} {_path(HERE / source)}", f"  flags = {_join(flags)}"]
    lines += ["", f"build {output}: link {' '.join(target for target, *_ in objects)}", ""]
    return "\n".join(lines)


def _join(words: Sequence[str]) -> str:
    """A shell command in ninja's escapes; ninja's own variables stay as they are."""
    variables = ("$in", "$out", "$out.d", "$flags")
    return " ".join(word if word in variables else shlex.quote(word).replace("$", "$$") for word in words)


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build(settings: Settings, folder: Path, output: str) -> Path:
    """Bring ``folder / output`` up to date and return its path."""
    try:
        import ninja
        import pybind11  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"building unigendet._C needs the Python package {error.name!r}: pip install ninja pybind11 "
            "(an install with build isolation gets them by itself)"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(settings, output), encoding="utf-8")
    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([program, "-C", str(folder), *jobs], check=False).returncode:
        raise BuildError("unigendet._C could not be built; what the compilers said stands above")
    return folder / output


def extensions() -> list[Extension]:
    """The extension for ``setup(ext_modules=...)``; empty, with a message, if there is no C++ compiler."""
    try:
        settings = read_settings(os.environ)
    except BuildError as error:
        raise SystemExit(f"error: {error}") from error
    if settings is None:
        print("unigendet: no C++ compiler (c++, g++ or clang++) found, so unigendet._C is not built: "
              "the package is pure Python, without the backends 'cpp' and 'cuda'", file=sys.stderr)  # fmt: skip
        return []
    sources = ["bindings.cpp", "alignment_loss_cpu.cpp", *(["alignment_loss.cu"] if settings.nvcc else [])]
    return [Extension("unigendet._C", [f"{HERE.name}/{source}" for source in sources], py_limited_api=False)]


class BuildExtension(build_ext):
    """``build_ext`` with ninja. Objects stay in build/, so that the next build compiles what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``, whatever its sources, and put it where setuptools wants it."""
        settings = read_settings(os.environ)
        name = Path(self.get_ext_filename(ext.name)).name
        try:
            library = build(settings, HERE.parent / "build" / f"extension-{sysconfig.get_platform()}", name)
        except BuildError as error:
            raise SystemExit(f"error: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)
