"""Builds ``unigendet._C`` with ninja: the host part wherever a C++ compiler is, the CUDA part where nvcc is, too.

Read by setup.py; knows nothing of torch. The environment says what is built:

    UNIGENDET_EXTENSION   auto (the default: if there is a C++ compiler) or off
    UNIGENDET_CUDA        auto (the default: if nvcc is found), on (an error without nvcc) or off
    UNIGENDET_CUDA_ARCHS  compute capabilities, separated by semicolons; the default is "8.0;9.0a"
    CXX                   the C++ compiler, with a launcher before it and flags behind it, if any: "ccache g++ -m64"
    CUDA_HOME             where nvcc is, if not on the PATH
    MAX_JOBS              how many compilers run at a time

Without a C++ compiler nothing is built and the package is pure Python. Any error of a compiler is an error of the
build, and so is a register that spills in a kernel for one of the default architectures. Only OpenMP may be missing:
the host part then runs on one thread.
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
import tempfile
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
OPENMP = ["-fopenmp"]
OPENMP_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
WITHOUT_EXTENSION = "UNIGENDET_EXTENSION=off to install without unigendet._C"
# Compiled once per instruction set, and once.
CPU_SOURCES = (
    "alignment_loss_cpu.cpp",
    "qk_norm_rope_cpu.cpp",
    "rms_norm_cpu.cpp",
    "swiglu_cpu.cpp",
    "symbiotic_attention_cpu.cpp",
    "symbiotic_attention_backward_cpu.cpp",
)
BINDINGS = (
    "attention_plan.cpp",
    "bindings.cpp",
    "bindings_alignment_loss.cpp",
    "bindings_attention.cpp",
    "bindings_rows.cpp",
    "tensors.cpp",
)
# Namespace → flags of each build of CPU_SOURCES.
X86_LEVELS = {
    "x86_64_v3": ["-mavx2", "-mfma", "-mf16c"],
    "x86_64_v4": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(Exception):
    """Something the user can put right; its text is the whole message."""


@dataclass(frozen=True)
class Settings:
    """What is built: the C++ compiler's command, nvcc or None, and the architectures, as "80" or "90a"."""

    compiler: tuple[str, ...]
    nvcc: str | None
    archs: tuple[str, ...]


def find_compiler(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """The command of the C++ compiler, its first word a path; CXX's words if that is set; None if there is none."""
    path = env.get("PATH", "")
    if env.get("CXX"):
        try:
            words = shlex.split(env["CXX"])
        except ValueError:  # a quotation mark without its other
            words = []
        found = shutil.which(words[0], path=path) if words else None
        if found is None:
            raise BuildError(f"CXX is {env['CXX']!r}; its first word must be a program on the PATH")
        return (found, *words[1:])
    found = next(filter(None, (shutil.which(name, path=path) for name in ("c++", "g++", "clang++"))), None)
    return None if found is None else (found,)


def host_compiler(compiler: Sequence[str]) -> list[str]:
    """nvcc's arguments for ``compiler``: -ccbin takes one program, which is the last word before the first flag."""
    flags = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    return ["-ccbin", compiler[flags - 1], *_to_host(compiler[flags:])]


def _to_host(flags: Sequence[str]) -> list[str]:
    """nvcc's -Xcompiler with ``flags``; a comma within one of them is none between two."""
    return ["-Xcompiler", ",".join(flag.replace(",", r"\,") for flag in flags)] if flags else []


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
    """What the environment asks for; None if nothing is to be built, BuildError if it asks for what is not there."""
    extension = env.get("UNIGENDET_EXTENSION", "auto")
    if extension not in ("auto", "off"):
        raise BuildError(f"UNIGENDET_EXTENSION is {extension!r}; it must be auto or off")
    cuda = env.get("UNIGENDET_CUDA", "auto")
    if cuda not in ("auto", "on", "off"):
        raise BuildError(f"UNIGENDET_CUDA is {cuda!r}; it must be auto, on or off")
    archs = parse_archs(env.get("UNIGENDET_CUDA_ARCHS", DEFAULT_ARCHS))
    if extension == "off":
        if cuda == "on":
            raise BuildError("UNIGENDET_CUDA is 'on', but UNIGENDET_EXTENSION is 'off'")
        return None
    compiler = find_compiler(env) if sys.platform != "win32" else None
    nvcc = None if cuda == "off" else find_nvcc(env)
    if cuda == "on" and (compiler is None or nvcc is None):
        missing = "C++ compiler (c++, g++ or clang++)" if compiler is None else "nvcc (set CUDA_HOME)"
        raise BuildError(f"UNIGENDET_CUDA is 'on', but there is no {missing}")
    return None if compiler is None else Settings(compiler, nvcc, archs if nvcc else ())


def _ask(command: Sequence[str]) -> tuple[bool, str, str]:
    """Whether ``command`` runs and succeeds, and what it says to stdout and to stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return False, "", str(error)
    return done.returncode == 0, done.stdout, done.stderr


def _version(command: Sequence[str], cuda: bool = False) -> str:
    """What a compiler calls itself; BuildError if it does not."""
    works, said, _ = _ask([*command, "--version"])
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not works or not lines:
        raise BuildError(f"{shlex.join([*command, '--version'])!r} fails or says nothing; {_ways_out(cuda)}")
    return next((line for line in lines if "release" in line), lines[0])


def _ways_out(cuda: bool) -> str:
    without_cuda = "UNIGENDET_CUDA=off to build without CUDA, or " if cuda else ""
    return f"set {without_cuda}{WITHOUT_EXTENSION}"


def has_openmp(compiler: Sequence[str]) -> bool:
    """Whether ``compiler`` compiles and links a program with OpenMP: Clang may be there without its library."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text(OPENMP_PROGRAM, encoding="utf-8")
        command = [*compiler, *OPENMP, str(source), "-o", str(Path(folder, "openmp"))]
        return _ask(command)[0]


def check_archs(settings: Settings) -> None:
    """BuildError if nvcc does not know one of the architectures.

    A dry run asks, since ``nvcc --list-gpu-arch`` leaves out those with a letter, such as 90a.
    """
    for arch in settings.archs if settings.nvcc else ():
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        works, *said = _ask([settings.nvcc, "--dryrun", code, "-x", "cu", "-c", os.devnull])
        if not works and f"_{arch}'" in "".join(said):
            raise BuildError(
                f"{settings.nvcc} ({_version([settings.nvcc], cuda=True)}) does not know the architecture sm_{arch}; "
                f"name others in UNIGENDET_CUDA_ARCHS, or {_ways_out(cuda=True)}"
            )


def _objects(settings: Settings, openmp: bool) -> list[tuple[str, str, str, list[str]]]:
    """(object, rule, source, flags) of all that is compiled."""
    import pybind11

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{sysconfig.get_path('platinclude')}"]
    includes.append(f"-I{pybind11.get_include()}")
    defines = ["-DUNIGENDET_X86_LEVELS"] if is_x86 else []
    compiler = _version(settings.compiler) + ("" if openmp else ", without OpenMP")
    facts = [f'-DUNIGENDET_COMPILER="{compiler}"']
    levels = {"baseline": [], **(X86_LEVELS if is_x86 else {})}
    objects = [
        (f"{Path(source).stem}_{name}.o", "cxx", source, [f"-DUNIGENDET_ISA={name}", *defines, *flags])
        for source in CPU_SOURCES
        for name, flags in levels.items()
    ]
    if settings.nvcc:
        archs = ";".join(f"sm_{arch}" for arch in settings.archs)
        facts += [
            f'-DUNIGENDET_CUDA_ARCHS="{archs}"',
            f'-DUNIGENDET_NVCC="{_version([settings.nvcc], cuda=True)}"',
        ]
        objects.append(("cuda.o", "nvcc", "alignment_loss.cu", []))
        defines = ["-DUNIGENDET_CUDA", *defines]
    for source in BINDINGS:
        own = facts if source == "bindings.cpp" else []
        objects.append((f"{Path(source).stem}.o", "cxx", source, [*own, *defines, *includes]))
    return objects


def _rules(settings: Settings, openmp: bool) -> dict[str, list[str]]:
    """Name → command of each of ninja's rules."""
    depfile = ["$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    threads = OPENMP if openmp else []
    cxx = [*settings.compiler, *HOST_FLAGS, *(threads or ["-Wno-unknown-pragmas"]), *depfile]
    if settings.nvcc is None:
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        return {"cxx": cxx, "link": [*settings.compiler, *threads, "-shared", *undefined, "$in", "-o", "$out"]}
    nvcc = [settings.nvcc, *host_compiler(settings.compiler)]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in settings.archs]
    host = HOST_FLAGS[HOST_FLAGS.index("-fPIC") :]
    # The interpreter's real path: another virtual environment must not compile everything again.
    checked = [str(Path(sys.executable).resolve()), str(HERE / "run_nvcc.py"), ",".join(parse_archs(DEFAULT_ARCHS))]
    checked += [*nvcc, "-std=c++17", "-O3", *codes, "-Werror", "all-warnings", "-Xptxas", "-v", *_to_host(host)]
    link = [*nvcc, "-shared", "-cudart", "static", *codes, *_to_host(threads), "-Xlinker", "--exclude-libs,ALL"]
    return {"cxx": cxx, "nvcc": [*checked, *depfile], "link": [*link, "$in", "-o", "$out"]}


def ninja_file(settings: Settings, output: str, openmp: bool = True) -> str:
    """The text of build.ninja, which makes ``output`` in the folder that the file is in."""
    objects = _objects(settings, openmp)
    lines = ["ninja_required_version = 1.3", ""]
    for name, command in _rules(settings, openmp).items():
        lines += [f"rule {name}", f"  command = {_join(command)}"]
        lines += ["", ""] if name == "link" else ["  depfile = $out.d", "  deps = gcc", ""]
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
    check_archs(settings)
    openmp = has_openmp(settings.compiler)
    text = ninja_file(settings, output, openmp)
    if not openmp:
        print("unigendet: the C++ compiler has no OpenMP, so unigendet._C computes on one thread", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text, encoding="utf-8")
    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([program, "-C", str(folder), *jobs], check=False).returncode:
        raise BuildError(
            "unigendet._C could not be built; what the compilers said stands above; "
            + _ways_out(cuda=settings.nvcc is not None)
        )
    return folder / output


def extensions() -> list[Extension]:
    """The extension for ``setup(ext_modules=...)``; empty, with a message, if it is not built."""
    try:
        settings = read_settings(os.environ)
    except BuildError as error:
        raise SystemExit(f"error: {error}") from error
    if settings is None:
        off = os.environ.get("UNIGENDET_EXTENSION") == "off"
        reason = "UNIGENDET_EXTENSION is 'off'" if off else "no C++ compiler (c++, g++ or clang++) found"
        print(f"unigendet: {reason}, so unigendet._C is not built: "
              "the package is pure Python, without the backends 'cpp' and 'cuda'", file=sys.stderr)  # fmt: skip
        return []
    sources = [*BINDINGS, *CPU_SOURCES, *(["alignment_loss.cu"] if settings.nvcc else [])]
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
