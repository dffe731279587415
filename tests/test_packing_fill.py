"""How full packs become: the record is what the code gives now, and says what a look-ahead buffer promises."""

import json

import pytest

from benchmarks import packing_fill as benchmark
from unigendet.config import LoaderConfig
from unigendet.data.fill import packing_fill


@pytest.fixture(scope="module")
def record():
    return json.loads(benchmark.RECORD.read_text())


@pytest.mark.parametrize("lookahead", [0, 32])
def test_the_record_is_up_to_date(record, lookahead):
    recorded = [one for one in record["rows"] if (one["trace"], one["lookahead"]) == ("gduf_32k", lookahead)]
    assert recorded == [benchmark.row("gduf_32k", lookahead)]


def test_what_is_promised(record):
    fills = {(one["trace"], one["lookahead"]): one["fill"] for one in record["rows"]}
    assert set(fills) == {(name, n) for name in benchmark.BUDGETS for n in benchmark.LOOKAHEADS}
    for name in benchmark.BUDGETS:
        assert all(fills[name, n] >= 0.95 for n in benchmark.LOOKAHEADS if n)
        assert fills[name, 0] < 0.93


def test_the_table_has_a_line_for_every_row(record):
    lines = benchmark.table(record)
    assert len(lines) == 2 + len(record["rows"])
    assert lines[2].startswith("| gduf_32k, 32,768 tokens | 0 | 91.9% |")


def test_the_document_says_what_is_recorded(record, monkeypatch, tmp_path, capsys):
    assert benchmark.main(["--check"]) == 0
    other = tmp_path / "performance.md"
    other.write_text(benchmark.DOCUMENT.read_text().replace(" 91.9% ", " 99.9% "))
    monkeypatch.setattr(benchmark, "DOCUMENT", other)
    assert benchmark.main(["--check"]) == 1
    assert "does not say what is recorded" in capsys.readouterr().err


def test_fill_by_hand():
    config = LoaderConfig(10, 10, shuffle=False)
    fill = packing_fill([[6, 4, 3]], [1.0], config, packs=4)  # 6+4, 3+6, 4+3, 6+4
    assert (fill.packs, fill.tokens, fill.least, fill.samples) == (4, 36, 7, (8,))
    assert (fill.share, fill.per_pack) == (0.9, 2.0)
    fill = packing_fill([[5], [5]], [3.0, 1.0], config, packs=10)
    assert fill.samples == (15, 5)
    with pytest.raises(ValueError, match="source 0, which has 1, were all longer"):
        packing_fill([[11]], [1.0], config)
    with pytest.raises(ValueError, match=r"source 1\.records is empty"):
        packing_fill([[5], []], [1.0, 1.0], config)
