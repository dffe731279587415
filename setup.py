"""Where the packages lie, and the compiled extension; all else about the distribution stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build_extension import BuildExtension, extensions

packages = find_packages(include=["unigendet", "unigendet.*"]) + [
    "unigendet." + name for name in find_packages(include=["kernels", "kernels.*", "benchmarks"])
]

setup(
    packages=[*packages, "unigendet.configs"],
    package_dir={
        "unigendet": "unigendet",
        "unigendet.kernels": "kernels",
        "unigendet.configs": "configs",
        "unigendet.benchmarks": "benchmarks",
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
