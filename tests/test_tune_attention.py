"""The choice among measured configurations; measuring itself needs a GPU."""

import pytest
from unigendet.kernels.config import DIRECTIONS, AttentionConfig

from benchmarks.harness import Timing
from benchmarks.tune_attention import candidates, choose, main

CURRENT, FASTER, FASTEST, NOISE = (AttentionConfig(m, 64, 4, 2) for m in (16, 32, 64, 128))
TIMES = {CURRENT: Timing(1.0, 0.95, 1.1, 9), FASTER: Timing(0.9, 0.89, 0.91, 9), FASTEST: Timing(0.8, 0.79, 0.81, 9)}
TIMES[NOISE] = Timing(0.7, 0.6, 0.96, 9)  # its slow runs are as slow as the fast ones of the configuration in use


def test_the_fastest_wins_unless_its_lead_is_noise():
    lines = []
    assert choose(CURRENT, TIMES, TIMES.get, lines.append) == FASTEST
    assert len(lines) == len(TIMES)
    assert choose(CURRENT, [NOISE], TIMES.get, lines.append) is None
    assert choose(FASTEST, [CURRENT, FASTER], TIMES.get, lines.append) is None


def test_what_cannot_run_is_skipped():
    unable = AttentionConfig(256, 256, 4, 2)
    assert choose(CURRENT, [unable, FASTER], TIMES.get, [].append) == FASTER
    with pytest.raises(RuntimeError, match=r"block_m=256.* cannot run"):
        choose(unable, [FASTER], TIMES.get, [].append)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_candidates(direction):
    ampere, hopper = candidates(direction, (8, 0)), candidates(direction, (9, 0))
    assert len(set(ampere)) == len(ampere) > 10
    assert not any(c.tma for c in ampere)
    assert {c for c in hopper if not c.tma} == set(ampere)


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        main([])
