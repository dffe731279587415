"""Runs nvcc and fails if registers spill: ``python run_nvcc.py ARCHS nvcc ...``, ARCHS like ``80,90a``.

Only spills in kernels for one of ARCHS fail; those for others are printed, and so are stack frames for ARCHS.
The command must hold ``-Xptxas -v``; output in which no kernel is found fails, too, since nothing was checked then.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

ENTRY = re.compile(r"Compiling entry function '(.+)' for '(.+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# What -Xptxas -v reports of every kernel; other lines of "ptxas info", as on lost performance, are shown.
REPORT = re.compile(
    rf"ptxas info\s*: ({ENTRY.pattern}|Function properties for |Used \d+ registers|\d+ bytes gmem|Compile time = )"
    rf"|\s*{MEMORY.pattern}"
)


class Kernel(NamedTuple):
    """A kernel's memory for registers, in bytes per thread."""

    name: str
    arch: str
    stack: int
    spilled: int


def kernels(ptxas_output: str) -> list[Kernel]:
    """What ``ptxas -v`` says of every kernel; of a function that is not inlined, under its kernel's name."""
    found, name, arch = [], "", ""
    for line in ptxas_output.splitlines():
        if match := ENTRY.search(line):
            name, arch = match.groups()
        elif name and (match := MEMORY.search(line)):
            stack, *spilled = map(int, match.groups())
            found.append(Kernel(name, arch, stack, max(spilled)))
    return found


def run(archs: Sequence[str], command: Sequence[str]) -> int:
    """Run ``command``, print what it says but the register counts, and return an exit code."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    kept = [line for line in output.splitlines() if not REPORT.match(line)]
    print(*kept, sep="\n", end="\n" if kept else "")
    if result.returncode:
        return result.returncode
    found = kernels(output)
    if not found:
        print("nvcc reports no kernel: does the command hold -Xptxas -v, or has the report's format changed?")
        return 1
    failed = False
    for kernel in found:
        checked = kernel.arch.removeprefix("sm_") in archs
        if kernel.spilled:
            print(f"{kernel.arch}: {kernel.spilled} bytes of registers spill in {kernel.name}")
            failed = failed or checked
        elif kernel.stack and checked:
            print(f"{kernel.arch}: a stack frame of {kernel.stack} bytes in {kernel.name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1].split(","), sys.argv[2:]))
