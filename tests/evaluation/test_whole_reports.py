"""A report's files are whole or not there: what cannot be written leaves the earlier one."""

import errno
import os

import pytest
from report_demo import ENVIRONMENT
from study_demo import demo_study

from unigendet import files
from unigendet.evaluation.quickstart_report import write_report
from unigendet.evaluation.results import RunResults
from unigendet.evaluation.study_report import write_study


def quickstart(folder, variant):
    write_report(folder, RunResults(title=f"variant {variant}", environment=ENVIRONMENT))


def study(folder, variant):
    write_study(folder, demo_study(seeds=variant))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("write", "names"), [(quickstart, ("report.json", "report.html")), (study, ("study.json", "report.html"))]
)
def test_a_full_disk_leaves_the_earlier_file(write, names, tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = content(tmp_path)
    assert set(before) == set(names)
    for name in names:
        sync = files.sync

        def full(path, name=name, sync=sync):
            if os.path.basename(path) == f".{name}.partial":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            sync(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", full)
            with pytest.raises(OSError, match=f"No space left on device.*/{name}'"):
                write(tmp_path, 2)
        after = content(tmp_path)
        assert set(after) == set(names)
        assert after[name] == before[name]
    write(tmp_path, 2)
    assert all(after != before[name] for name, after in content(tmp_path).items())
