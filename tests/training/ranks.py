"""Starts processes as torchrun does, on one machine, without its agent."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import unigendet

PACKAGE = Path(unigendet.__file__).parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count, *command):
    """``count`` processes of ``python COMMAND``, which know of each other."""
    port = str(free_port())
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["PYTHONPATH"] = os.pathsep.join(
        (str(PACKAGE.parent), str(Path(__file__).parent), str(Path(__file__).parents[1]))
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    program = [sys.executable, *map(str, command)]
    return [
        subprocess.Popen(
            program, env=common | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count)}, **pipes
        )
        for i in range(count)
    ]


def finish(started, timeout=240):
    """Wait for all of them: [(exit code, standard output, standard error)], by rank."""
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended


def run(count, *command, timeout=240):
    """Standard outputs of ``count`` processes that must all succeed."""
    ended = finish(start(count, *command), timeout)
    for code, _, err in ended:
        assert code == 0, err
    return [out for _, out, _ in ended]
