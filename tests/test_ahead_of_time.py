"""Every Triton kernel compiles for sm_80 and sm_90, as well as it should, under the newest and the oldest Triton.

Compilers run in processes of their own: in this one the kernels are defined for Triton's interpreter. The oldest Triton
that the package allows is in an environment without torch, which ``make test`` creates beside this one.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from unigendet.kernels.config import AttentionConfig

from benchmarks import ahead_of_time, resources, sass

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "3.6.0"
OLDEST_PYTHON = "UNIGENDET_OLDEST_TRITON_PYTHON"
TRITONS = ("installed", "oldest")
ATTENTION = ("forward", "backward")  # how the kernels with matrix products are called
# Store a few numbers per program.
REDUCTIONS = {
    "qk_norm_rope_weight_gradients",
    "rms_norm_weight_gradients",
    "flow_matching_dtimesteps",
    "flow_matching_loss_forward",
}
UNALIGNED = {"flow_matching_dtimesteps"}  # reads from any tile's number on
SUMS = ("alignment_image_sums", "alignment_total")  # read one number per row, from any row on, and store one or two
MAX_SPILL = 128  # bytes outside loops
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}


def python_of(triton):
    """The Python whose Triton is meant, and that Triton's version."""
    if triton == "installed":
        return sys.executable, importlib.metadata.version("triton")
    given = os.environ.get(OLDEST_PYTHON)
    path = Path(given or Path(sys.prefix) / "triton-oldest" / "bin" / "python")
    if not path.exists():
        message = f"no Python with Triton {OLDEST} at {path}"
        if given:
            pytest.fail(f"{message}, which {OLDEST_PYTHON} names; remove its folder and run make test")
        pytest.skip(f"{message}; make test creates it, or set {OLDEST_PYTHON}")
    return str(path), OLDEST


def run(python, *arguments):
    """Run Python in the repository, with kernels defined for compilers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def compiled(python, path, *options):
    done = run(python, "-m", "benchmarks.resources", "--json", str(path), *options)
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


def complaints(row):
    """What is wrong with a kernel as it was compiled."""
    matrix = "wgmma" if row["arch"] == 90 else "mma"
    # RoPE pairs the halves of a head. One of 36 numbers is no multiple of 16 bytes.
    narrow_heads = row["kernel"].startswith("qk_norm_rope") and row["head_dim"] % 16 > 0
    wide_reads = row["wide_loads"] + row["wide_copies"] + row["tma_copies"]
    sums = row["kernel"].startswith(SUMS)
    wrong = {
        f"{row['hot_spills']} bytes of spills in the hot loop": row["hot_spills"] > 0,
        f"{row['spill_stores']} bytes of spills": row["spill_stores"] > MAX_SPILL,
        f"{row['shared']} bytes of shared memory": row["shared"] > MAX_SHARED[row["arch"]],
        "serialized wgmma": row["serialized"],
        f"no {matrix}": row["kernel"].startswith(ATTENTION) and row[matrix] == 0,
        "no loads of 16 bytes": not (sums or row["kernel"] in UNALIGNED) and wide_reads == 0,
        "no stores of 16 bytes": not (narrow_heads or sums or row["kernel"] in REDUCTIONS) and row["wide_stores"] == 0,
        f"{row['narrow']} loads or stores of less than 4 bytes": not narrow_heads and row["narrow"] > 0,
    }
    return [complaint for complaint, holds in wrong.items() if holds]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", ahead_of_time.HEADS)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("triton", TRITONS)
def test_kernels_compile_well(triton, arch, head_dim, tmp_path):
    python, version = python_of(triton)
    result = compiled(python, tmp_path / "rows.json", "--arch", str(arch), "--head-dim", str(head_dim))
    assert result["triton"] == version
    assert result["failed"] == []
    names = [name for name, _ in ahead_of_time.launches(divmod(arch, 10), head_dim, "bfloat16")]
    assert [row["kernel"] for row in result["rows"]] == names
    wrong = {f"{row['kernel']} {row['tile']}, {row['num_warps']} warps": complaints(row) for row in result["rows"]}
    assert {kernel: found for kernel, found in wrong.items() if found} == {}


def test_a_bad_configuration_is_noticed(tmp_path):
    """Checks that read nothing would pass: a tile for which four warps have too few registers."""
    options = ("--arch", "80", "--head-dim", "128", "--direction", "backward_dq", "--config", "128,64,4,2")
    (row,) = compiled(sys.executable, tmp_path / "rows.json", *options)["rows"]
    assert row["registers"] == 255
    assert row["spill_stores"] > MAX_SPILL
    assert row["loop_spills"] >= row["hot_spills"] > 0
    assert {"spills", "loop"} <= {complaint.split()[-1] for complaint in complaints(row)}


def test_every_kernel_is_among_them():
    """Whatever a launcher of the package launches is compiled here."""
    launched = set()
    for path in (ROOT / "kernels").glob("*.py"):
        launched |= set(re.findall(r"\bLaunch\((\w+),", path.read_text()))
    assert launched
    assert {launch.kernel.fn.__name__ for _, launch in ahead_of_time.launches((9, 0), 128, "bfloat16")} == launched


SPECIALIZATIONS = """
import json
from triton.backends.compiler import GPUTarget
from benchmarks import ahead_of_time

primes, sixteens = (997, 1009, 13, 7, 3), (1024, 2048, 16, 32, 48)
sizes = [(4096, 4096, 2048, 64, 128), (1, 1, 1, 1, 1), primes, sixteens, (33, 65, 0, 0, 0)]
keys = {}
for capability in ((8, 0), (9, 0)):
    target = GPUTarget("cuda", 10 * capability[0], 32)
    for head_dim in ahead_of_time.HEADS:
        for pack in sizes:
            for name, launch in ahead_of_time.launches(capability, head_dim, "bfloat16", ahead_of_time.Pack(*pack)):
                key = ahead_of_time.specialization_key(launch, target)
                keys.setdefault(f"{name} {capability} {head_dim}", []).append(key)
print(json.dumps(keys))
"""


@pytest.mark.parametrize("triton", TRITONS)
def test_no_pack_makes_a_kernel_compile_again(triton):
    """Numbers of rows, keys, splits and tiles: 0, 1, primes and multiples of 16, on which the JIT would specialize."""
    done = run(python_of(triton)[0], "-c", SPECIALIZATIONS)
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)
    names = [name for major in (8, 9) for name, _ in ahead_of_time.launches((major, 0), 128, "bfloat16")]
    assert len(keys) == len(names) * len(ahead_of_time.HEADS)
    assert all(len(each) == 5 for each in keys.values())
    assert [name for name, each in keys.items() if len(set(each)) > 1] == []
    assert keys["forward (9, 0) 64"] != keys["forward (9, 0) 128"]


def test_interpreted_kernels_are_refused():
    name, launch = next(ahead_of_time.launches((9, 0), 64, "bfloat16"))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        resources.resources(name, launch, 90, 64, "bfloat16")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (80, 255, 0, 8, 1),
        (80, 255, 49152, 4, 2),
        (80, 128, 0, 8, 2),
        (80, 129, 0, 8, 1),
        (80, 32, 0, 4, 16),
        (80, 16, 0, 1, 32),
        (90, 168, 110 * 1024, 4, 2),
        (90, 168, 114 * 1024, 4, 1),
        (90, 64, 227 * 1024, 8, 1),
        (90, 64, 228 * 1024, 8, 0),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert resources.occupancy(arch, registers, shared, warps) == expected


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;   /* 0x00000a00ff017b82 */
                                                             /* 0x000e700000000800 */
        /*0010*/                   STL.64 [R1], R4 ;
        /*0020*/              @!P1 BRA 0x80 ;
        /*0030*/                   LDL R4, [R1+0x8] ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   CALL.REL.NOINC 0xb0 ;
        /*0060*/                   STG.E.U16 [R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   LDL.128 R8, [R1] ;
        /*0090*/                   BRA 0x30 ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   RET.REL.NODEC R2 0x0 ;
"""


def test_loops_of_machine_code():
    """A loop's part behind the end of the kernel is in the loop; a subroutine that returns is none."""
    code = sass.instructions(SASS)
    assert [x.address for x in code] == list(range(0, 0xC0, 0x10))
    loops = [[code[i].address for i in loop] for loop in sass.loops(code)]
    assert loops == [[0x20, 0x30, 0x40, 0x80, 0x90], [0xA0]]
    assert [x.bytes_ for x in code if x.name in ("LDG", "STL", "LDL", "STG")] == [16, 8, 4, 2, 16]


def test_configurations_from_the_command_line():
    assert resources._config("128,64,8,3") == AttentionConfig(128, 64, 8, 3, tma=False)
    assert resources._config("128,64,8,3,1") == AttentionConfig(128, 64, 8, 3, tma=True)
    for arguments in (["--config", "128,64"], ["--config", "128,64,8,3"], ["--direction", "forward"]):
        with pytest.raises(SystemExit):
            resources.main(arguments)
