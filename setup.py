"""Where the packages lie; everything else about the distribution stands in pyproject.toml."""

from setuptools import find_packages, setup

packages = find_packages(include=["unigendet", "unigendet.*"]) + [
    "unigendet." + name for name in find_packages(include=["kernels", "kernels.*"])
]

setup(
    packages=[*packages, "unigendet.configs"],
    package_dir={"unigendet": "unigendet", "unigendet.kernels": "kernels", "unigendet.configs": "configs"},
)
