"""Measured launch configurations are well-formed and part of the package."""

import json
import tomllib
from dataclasses import fields
from importlib import resources
from pathlib import Path

from unigendet.kernels.config import DIRECTIONS, AttentionConfig, tuned_key

ROOT = Path(__file__).resolve().parents[1]


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def test_measured_configurations_are_valid():
    tuned = json.loads(resources.files("unigendet.kernels").joinpath("tuned.json").read_text())
    for key, values in tuned.items():
        capability, head_dim, dtype, direction = key.split("/")
        digits = capability.removeprefix("sm_")
        major, minor = int(digits[:-1]), int(digits[-1])
        assert tuned_key((major, minor), int(head_dim), dtype, direction) == key
        assert 1 <= int(head_dim) <= 128
        assert dtype in ("bfloat16", "float16", "float32")
        assert direction in DIRECTIONS
        assert values.keys() == {field.name for field in fields(AttentionConfig)}
        assert all(type(value) is (bool if name == "tma" else int) for name, value in values.items())
        config = AttentionConfig(**values)
        assert all(is_power_of_two(n) for n in (config.block_m, config.block_n, config.num_warps))
        assert min(config.block_m, config.block_n) >= 16
        assert config.num_stages >= 1
        assert not config.tma or major >= 9


def test_they_are_package_data():
    """An installed copy has them, too, not only a checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "*.json" in project["tool"]["setuptools"]["package-data"]["unigendet.kernels"]
    assert (ROOT / "kernels" / "tuned.json").is_file()
