"""A process of several that load a checkpoint takes memory for its own rows, not for the others'."""

import itertools

from benchmarks import load_memory


def test_a_process_takes_memory_for_its_rows():
    """Half of 130 MB and a little more; reading the whole, or a second copy of the half, would take 130 MB."""
    rows = load_memory.measure(load_memory.sizes(hidden=512, layers=2, vocab=16000), 2, ["shards"], limit=2**23)
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert row["files"] > 4
        assert 64e6 < row["share"] < 74e6
        assert row["share"] <= row["anon"] - row["before"] < 1.2 * row["share"] + 20e6
    assert load_memory.too_much(rows) == []


def test_recorded_peaks_are_within_their_limits(capsys, monkeypatch):
    """Of a checkpoint of more than 2 GB; and the check can fail."""
    rows = load_memory.read_json(load_memory.RECORD)["rows"]
    assert [(row["form"], row["rank"]) for row in rows] == list(itertools.product(load_memory.FORMS, (0, 1)))
    assert all(row["checkpoint"] > 2e9 for row in rows)
    assert load_memory.main(["--check"]) == 0
    assert "one file, process 1 of 2" in capsys.readouterr().out
    monkeypatch.setattr(load_memory, "read_json", lambda path: {"rows": [rows[0] | {"peak": rows[0]["limit"] + 1}]})
    assert load_memory.main(["--check"]) == 1
    assert "one file, process 0: " in capsys.readouterr().err
