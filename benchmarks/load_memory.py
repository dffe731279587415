"""Host memory that a process takes when several of them load a checkpoint: ``python -m benchmarks.load_memory``.

A random checkpoint of more than 2 GB in bfloat16 is written into a temporary folder, in one file and in shards. Every
process reads its rows of each into float32 parameters on the CPU. Columns, in bytes, of every process:

============ ==========================================================================================================
``share``    parameters and buffers that the process keeps
``limit``    1.2 × share + 1 GB, which ``peak`` must not exceed
``peak``     most resident memory of any kind since the process began (VmHWM), interpreter and libraries included
``anon``     most anonymous memory (RssAnon), sampled: what counts towards a cgroup's limit and cannot be given back
``before``   anonymous memory before loading
``file``     most pages of mapped files (RssFile), sampled: of the libraries and of the checkpoint's files. Those of the
             checkpoint are page cache, which the kernel takes back when memory is short
============ ==========================================================================================================

``--check`` measures nothing: it exits with 1 unless the recorded peaks are within their limits.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.model.checkpoint import OURS, load_pretrained, published_state_dict, write_config
from unigendet.model.rows import local
from unigendet.model.shards import plan_shards, stream_tensors
from unigendet.model.unigendet import UniGenDet

from .environment import RESULTS, environment
from .record import SCHEMA, read_json, write_json

RECORD = RESULTS / "load_memory.json"
FACTOR, ROOM = 1.2, 10**9  # of the limit
FORMS = ("one file", "shards")


def sizes(hidden: int = 2048, layers: int = 11, vocab: int = 32000) -> ModelConfig:
    """A model of 1.15 billion parameters, or another of the same build."""
    vision = VisionConfig(hidden // 4, hidden, 2, 4, patch_size=14, max_patches_per_side=16)
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 256,
        vocab_size=vocab,
        rope_theta=1e6,
        max_position=1024,
        vision=vision,
        latent=LatentConfig(),
        special_tokens=SpecialTokens(0, 1, 2, 3),
    )


def write_checkpoint(config: ModelConfig, folder: Path, limit: int | None) -> int:
    """Random bfloat16 weights under the published names, in files of at most ``limit`` bytes; returns their bytes."""
    with torch.device("meta"):
        tensors = published_state_dict(UniGenDet(config).to(torch.bfloat16))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> Tensor:
        return torch.empty(tensors[name].shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator)

    bytes_of = {name: tensor.nbytes for name, tensor in tensors.items()}
    for file, names in plan_shards(bytes_of, folder, OURS, limit).items():
        stream_tensors({name: tensors[name] for name in names}, draw, folder / file)
    write_config(config, folder)
    return sum(bytes_of.values())


def status() -> dict[str, int]:
    """This process's memory in bytes: ``VmHWM``, ``RssAnon`` and ``RssFile`` of Linux's ``/proc/self/status``."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


class Sampler(threading.Thread):
    """The most anonymous memory and file pages of this process while the thread runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anon = self.file = 0
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until ``stop``."""
        while not self._ended.wait(0.001):
            self.look()

    def look(self) -> None:
        """Look once."""
        now = status()
        self.anon, self.file = max(self.anon, now["RssAnon"]), max(self.file, now["RssFile"])

    def stop(self) -> None:
        """End, after a last look."""
        self._ended.set()
        self.join()
        self.look()


def load(folder: Path) -> dict[str, int]:
    """In one of the processes: load its rows and say what that took."""
    from unigendet.training.config import TrainConfig
    from unigendet.training.parallel import processes

    torch.set_num_threads(1)
    with processes(TrainConfig(device="cpu")) as parallel:
        before, sampler = status()["RssAnon"], Sampler()
        sampler.start()
        model = load_pretrained(folder, shard=parallel.shard if parallel.sharded else None)
        sampler.stop()
        share = sum(local(tensor).nbytes for tensor in model.state_dict().values())
        limit = int(FACTOR * share) + ROOM
        peak = status()["VmHWM"]
        parallel.gather(None)  # nobody ends, and takes its files' pages along, while others still load
    return {"share": share, "limit": limit, "peak": peak, "anon": sampler.anon, "before": before, "file": sampler.file}


def measure(config: ModelConfig, count: int, forms: Sequence[str] = FORMS, limit: int = 2**29) -> list[dict[str, Any]]:
    """A row for every form of a checkpoint and process, in a temporary folder; ``limit``: bytes of a shard."""
    rows = []
    for form in forms:
        with tempfile.TemporaryDirectory() as name:
            size = write_checkpoint(config, Path(name), limit if form == "shards" else None)
            files = len(list(Path(name).glob("*.safetensors")))
            for rank, found in enumerate(_load_in_processes(Path(name), count)):
                rows.append(
                    {"form": form, "files": files, "checkpoint": size, "processes": count, "rank": rank} | found
                )
    return rows


def _load_in_processes(folder: Path, count: int) -> list[dict[str, int]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started = []
    for rank in range(count):
        command = [sys.executable, "-m", f"{__package__}.load_memory", "--load", str(folder)]
        mine = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen(command, env=mine, stdout=subprocess.PIPE, text=True))
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process could not load the checkpoint; what it wrote says why")
    return [json.loads(text) for text in texts]


def too_much(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of every process that took more than its limit, which it was."""
    return [f"{r['form']}, process {r['rank']}: {r['peak']} > {r['limit']}" for r in rows if r["peak"] > r["limit"]]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, in GB."""
    columns = ("share", "limit", "peak", "anon", "before", "file")
    lines = [f"{'':24}" + "".join(f"{name:>9}" for name in columns)]
    for row in rows:
        name = f"{row['form']}, process {row['rank']} of {row['processes']}"
        lines.append(f"{name:24}" + "".join(f"{row[column] / 1e9:9.2f}" for column in columns))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check what is recorded")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # as one of the processes
    options = parser.parse_args(arguments)
    if options.load:
        print(json.dumps(load(options.load)))
        return 0
    if options.check:
        rows = read_json(RECORD)["rows"]
    else:
        rows = measure(sizes(), 2)
        header = {"schema": SCHEMA, "benchmark": "load_memory", "environment": environment(torch.device("cpu"))}
        write_json(RECORD, header | {"rows": rows})
    print(show(rows))
    for line in too_much(rows):
        print(line, file=sys.stderr)
    return 1 if too_much(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
