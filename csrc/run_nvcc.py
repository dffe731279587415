"""Runs nvcc and fails if registers spill: ``python run_nvcc.py ARCHS nvcc ...``, ARCHS like ``80,90a``.

Only spills in kernels for one of ARCHS fail; those for others are printed. The command must hold ``-Xptxas -v``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence


def spills(ptxas_output: str) -> list[tuple[str, str, int]]:
    """(kernel, architecture, bytes) of every kernel that ``ptxas -v`` says spills registers to memory."""
    found, kernel, arch = [], "?", "?"
    for line in ptxas_output.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for '(.+)'", line):
            kernel, arch = match.groups()
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            size = max(map(int, match.groups()))
            if size:
                found.append((kernel, arch, size))
    return found


def run(archs: Sequence[str], command: Sequence[str]) -> int:
    """Run ``command``, print what it says but the register counts, and return an exit code."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    kept = [line for line in output.splitlines() if "ptxas info" not in line and "bytes stack frame" not in line]
    print(*kept, sep="\n", end="\n" if kept else "")
    failed = result.returncode
    for kernel, arch, size in spills(output):
        print(f"{arch}: {size} bytes of registers spill in {kernel}")
        failed = failed or arch.removeprefix("sm_") in archs
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1].split(","), sys.argv[2:]))
