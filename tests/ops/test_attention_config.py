"""Launch configurations of attention: pure functions of the device's capability and the shape."""

import json
import re

import pytest
from unigendet.kernels import config as configs
from unigendet.kernels.config import DIRECTIONS, AttentionConfig, attention_config, head_dim_parts, tuned_key


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [
        (1, (16, 0)),
        (8, (16, 0)),
        (16, (16, 0)),
        (17, (16, 16)),
        (24, (16, 16)),
        (32, (32, 0)),
        (48, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (81, (64, 32)),
        (96, (64, 32)),
        (97, (64, 64)),
        (127, (64, 64)),
        (128, (128, 0)),
    ],
)
def test_head_dim_parts(head_dim, parts):
    assert head_dim_parts(head_dim) == parts


def test_every_head_dim_fits_its_parts():
    """In powers of two from 16 on, as a matrix product wants them, and without an empty second part."""
    for head_dim in range(1, 129):
        first, second = head_dim_parts(head_dim)
        assert first in (16, 32, 64, 128)
        assert second in (0, 16, 32, 64)
        assert second <= first
        assert head_dim <= first + second
        assert not second or first < head_dim


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "direction", "expected"),
    [
        (None, 128, "bfloat16", "forward", AttentionConfig(16, 16, 4, 1)),
        ((8, 0), 128, "bfloat16", "forward", AttentionConfig(64, 64, 4, 2)),
        ((8, 0), 64, "bfloat16", "backward_dq", AttentionConfig(64, 64, 4, 2)),
        ((8, 6), 72, "float16", "backward_dkdv", AttentionConfig(32, 64, 4, 2)),
        ((8, 9), 128, "float32", "backward_dkdv", AttentionConfig(16, 16, 8, 1)),
        ((9, 0), 64, "bfloat16", "forward", AttentionConfig(128, 128, 8, 3, tma=True)),
        ((9, 0), 65, "bfloat16", "forward", AttentionConfig(128, 128, 8, 2, tma=True)),
        ((9, 0), 128, "float16", "backward_dkdv_atomic", AttentionConfig(64, 64, 8, 2, tma=True)),
        ((9, 0), 128, "float32", "forward", AttentionConfig(32, 32, 8, 1)),
        ((10, 0), 128, "bfloat16", "backward_dq", AttentionConfig(128, 64, 8, 2, tma=True)),
        ((12, 0), 128, "bfloat16", "backward_dq", AttentionConfig(64, 64, 8, 2)),  # shared memory as on 8.x
    ],
)
def test_configurations(capability, head_dim, dtype, direction, expected, monkeypatch):
    monkeypatch.setattr(configs, "tuned", dict)
    assert attention_config(capability, head_dim, dtype, direction) == expected


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_configuration_can_be_launched(capability, direction):
    for dtype in ("float32", "float16", "bfloat16"):
        for head_dim in range(1, 129):
            config = attention_config(capability, head_dim, dtype, direction)
            for number in (config.block_m, config.block_n, config.num_warps):
                assert number & (number - 1) == 0
            assert min(config.block_m, config.block_n) >= 16
            assert not config.tma or capability >= (9, 0)


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_device_that_is_too_old(capability):
    message = f"compute capability {capability[0]}.{capability[1]}; it must be at least 8.0"
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_config(capability, 128, "bfloat16", "forward")


def test_measured_winners_come_first(monkeypatch):
    winner = {"block_m": 64, "block_n": 32, "num_warps": 2, "num_stages": 5, "tma": True}
    assert tuned_key((9, 0), 128, "bfloat16", "forward") == "sm_90/128/bfloat16/forward"
    usual = attention_config((9, 0), 128, "bfloat16", "backward_dq")
    monkeypatch.setattr(configs, "tuned", lambda: {"sm_90/128/bfloat16/forward": winner})
    assert attention_config((9, 0), 128, "bfloat16", "forward") == AttentionConfig(64, 32, 2, 5, tma=True)
    assert attention_config((9, 0), 128, "bfloat16", "forward", describable=False) == AttentionConfig(128, 64, 8, 2)
    for other in (((8, 0), 128, "bfloat16"), ((9, 0), 64, "bfloat16"), ((9, 0), 128, "float16")):
        assert attention_config(*other, "forward") != AttentionConfig(**winner)
    assert attention_config((9, 0), 128, "bfloat16", "backward_dq") == usual


def test_the_file_of_winners_is_read_from_beside_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TUNED_PATH", tmp_path / "tuned.json")
    winner = {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 2, "tma": False}
    (tmp_path / "tuned.json").write_text(json.dumps({tuned_key((8, 0), 8, "float16", "forward"): winner}))
    configs.tuned.cache_clear()
    try:
        assert attention_config((8, 0), 8, "float16", "forward") == AttentionConfig(16, 64, 4, 2)
    finally:
        configs.tuned.cache_clear()
