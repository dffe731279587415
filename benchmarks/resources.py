"""What the compiler makes of the kernels: registers, spills, shared memory and instructions, without a GPU.

``python -m benchmarks.resources`` needs triton and neither torch nor a GPU. Every kernel is compiled as it would be
launched (``ahead_of_time``). Columns of the table:

=========== ==================================================================================================
``regs``    registers of a thread
``spill``   bytes that ptxas stores to local memory for want of registers, by its own count
``in loop`` bytes of local loads and stores inside loops, from the machine code's control flow
``hot``     the same in the hot loop: the last one with tensor core instructions (whole tiles come after edge tiles), or
            all if there is none
``smem``    bytes of shared memory of a program
``CTAs``    programs that fit on a multiprocessor at a time, by registers, shared memory and threads
``matrix``  tensor core instructions; ``serial`` if ptxas waits for each (C7510 and its like)
``wide``    loads and stores of 16 bytes per thread, and copies of memory to shared memory: by threads, by TMA
``narrow``  loads, stores and copies of less than 4 bytes per thread: the compiler did not see an alignment
=========== ==================================================================================================
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from unigendet.kernels.config import DIRECTIONS, AttentionConfig
from unigendet.kernels.launch import Launch

from . import ahead_of_time, sass

REGISTERS, THREADS, MAX_CTAS, WARP_REGISTERS, PARTITIONS = 65536, 2048, 32, 256, 4  # of sm_80 and sm_90
RESERVED = 1024  # bytes of shared memory that the system takes per program
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of shared memory of a multiprocessor
MAX_SHARED = {80: 163 << 10, 90: 227 << 10}  # and of one program
DTYPES = ("bfloat16", "float16", "float32")
_WARNING = re.compile(r"^.*(?:\(C75\d\d\)|serializ|[Ww]arning).*$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """One kernel's use of a multiprocessor; see the module. Counts of instructions are of the code, not of a run."""

    kernel: str
    arch: int
    head_dim: int
    dtype: str
    tile: str
    num_warps: int
    num_stages: int
    tma: bool
    registers: int
    spill_stores: int
    loop_spills: int
    hot_spills: int
    shared: int
    ctas: int
    wgmma: int
    mma: int
    serialized: bool
    wide_loads: int
    wide_stores: int
    wide_copies: int
    tma_copies: int
    narrow: int
    warnings: tuple[str, ...]


def _spilled(loops: Sequence[Sequence[sass.Instruction]]) -> int:
    """Bytes per thread that the instructions of ``loops`` move from and to local memory."""
    return sum(x.bytes_ for loop in loops for x in loop if x.name in ("LDL", "STL"))


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """Programs that fit on a multiprocessor. Registers are given to a warp in units, from its quarter's share."""
    per_warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // num_warps
    by_shared = SHARED[arch] // (-(-shared // 128) * 128 + RESERVED)
    return 0 if shared > MAX_SHARED[arch] else min(by_registers, by_shared, THREADS // (32 * num_warps), MAX_CTAS)


def _tile(launch: Launch) -> str:
    constants = launch.arguments
    for names in (
        ("BLOCK_M", "BLOCK_N"),
        ("TILE_HEADS", "ROWS"),
        ("TILE_HEADS",),
        ("ROWS", "COLUMNS"),
        ("BLOCK_ROWS", "BLOCK_D"),
        ("BLOCK",),
    ):
        if all(name in constants for name in names):
            return "x".join(str(constants[name]) for name in names)
    raise ValueError(f"{launch.kernel.__name__} has none of the constants that name a tile")


def resources(name: str, launch: Launch, arch: int, head_dim: int, dtype: str) -> Resources:
    """Compile ``launch`` for compute capability ``arch`` and read off what it uses."""
    compiled = ahead_of_time.compile_launch(launch, arch)
    code = sass.instructions(compiled.sass)
    registers = int(re.search(r"Used (\d+) registers", compiled.log)[1])
    loops = [[code[i] for i in loop] for loop in sass.loops(code)]
    hot = [loop for loop in loops if any(x.name in ("HGMMA", "HMMA") for x in loop)][-1:] or loops
    warnings = tuple(_WARNING.findall(compiled.log))
    wide = lambda name: sum(x.name == name and x.bytes_ == 16 for x in code)  # noqa: E731
    return Resources(
        kernel=name,
        arch=arch,
        head_dim=head_dim,
        dtype=dtype,
        tile=_tile(launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        tma=launch.arguments.get("TMA", False),
        registers=registers,
        spill_stores=int(re.search(r"(\d+) bytes spill stores", compiled.log)[1]),
        loop_spills=_spilled(loops),
        hot_spills=_spilled(hot),
        shared=compiled.shared,
        ctas=occupancy(arch, registers, compiled.shared, launch.num_warps),
        wgmma=sum(x.name == "HGMMA" for x in code),
        mma=sum(x.name == "HMMA" for x in code),
        serialized=any("serializ" in warning for warning in warnings),
        wide_loads=wide("LDG"),
        wide_stores=wide("STG"),
        wide_copies=wide("LDGSTS"),
        tma_copies=sum(x.name.startswith("UTMALDG") for x in code),
        narrow=sum(x.name in ("LDG", "STG", "LDGSTS") and x.bytes_ < 4 for x in code),
        warnings=warnings,
    )


_HEADER = (
    f"{'kernel':<30}{'sm':>3}{'D':>5} {'dtype':<9}{'tile':>9}{'warps':>6}{'stages':>7}{'regs':>6}{'spill':>7}"
    f"{'in loop':>9}{'hot':>5}{'smem':>8}{'CTAs':>6}  {'matrix':<18}{'wide: load store copy TMA; narrow'}"
)


def line(row: Resources) -> str:
    """The table's line, and ptxas's warnings below, those that differ in a line number once."""
    matrix = f"wgmma {row.wgmma}" if row.wgmma else f"mma {row.mma}" if row.mma else "-"
    matrix += " serial" if row.serialized else ""
    text = (
        f"{row.kernel:<30}{row.arch:>3}{row.head_dim:>5} {row.dtype:<9}{row.tile:>9}{row.num_warps:>6}"
        f"{row.num_stages:>7}{row.registers:>6}{row.spill_stores:>7}{row.loop_spills:>9}"
        f"{row.hot_spills:>5}{row.shared:>8}{row.ctas:>6}  {matrix:<18}"
        f"{row.wide_loads} {row.wide_stores} {row.wide_copies} {row.tma_copies}; {row.narrow}"
    )
    warnings = Counter(re.sub(r" in around line \d+", "", warning) for warning in row.warnings)
    return "\n".join((text, *(f"    {count} x {warning}" for warning, count in warnings.items())))


def _config(text: str) -> AttentionConfig:
    numbers = text.split(",")
    if len(numbers) not in (4, 5) or not all(n.isdigit() for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be block_m,block_n,warps,stages[,tma], tma 0 or 1")
    block_m, block_n, warps, stages, tma = (int(n) for n in [*numbers, "0"][:5])
    return AttentionConfig(block_m, block_n, warps, stages, bool(tma))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=[80, 90], choices=(80, 90))
    add("--head-dim", type=int, nargs="+", default=[64, 72, 128], choices=tuple(ahead_of_time.HEADS))
    add("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    add("--kernel", nargs="+", metavar="NAME", help="kernels whose names start so; default: all")
    add("--config", type=_config, nargs="+", default=[], help="block_m,block_n,warps,stages[,tma] for --direction")
    add("--direction", choices=DIRECTIONS, help="direction of attention to compile with each --config, alone")
    add("--json", type=Path, metavar="PATH", help="write the table there, too")
    options = parser.parse_args(arguments)
    if bool(options.config) != bool(options.direction):
        parser.error("--config and --direction belong together")
    return options


def selected(options: argparse.Namespace, arch: int, head_dim: int, dtype: str) -> list[tuple[str, Launch]]:
    """The launches that the command line asks for."""
    capability = divmod(arch, 10)
    if not options.config:
        named = list(ahead_of_time.launches(capability, head_dim, dtype))
        return [x for x in named if not options.kernel or x[0].startswith(tuple(options.kernel))]
    wanted = {options.direction, f"{options.direction}_cached"}
    tried = []
    for config in options.config:
        named = ahead_of_time.attention_launches(capability, head_dim, dtype, {options.direction: config})
        tried += [x for x in named if x[0] in wanted]
    return tried


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 1 if a kernel did not compile."""
    options = _parse(arguments)
    print(f"triton {triton.__version__}\n{_HEADER}", flush=True)
    rows, failed = [], []
    for arch in options.arch:
        for head_dim in options.head_dim:
            for dtype in options.dtype:
                for name, launch in selected(options, arch, head_dim, dtype):
                    try:
                        rows.append(resources(name, launch, arch, head_dim, dtype))
                        print(line(rows[-1]), flush=True)
                    except Exception as error:  # whatever stage of the compiler it was: the other kernels go on
                        failed.append(f"{name} sm_{arch} {head_dim} {dtype}: {type(error).__name__}: {error}"[:300])
                        print(failed[-1], flush=True)
    if options.json:
        result = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "failed": failed}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
