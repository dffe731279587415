"""The rooms' arrows go one way, statically and in a fresh process; the ops need torch and numpy alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unigendet

PACKAGE = Path(unigendet.__file__).parent
ROOT = PACKAGE.parent
# What training looks at its model with: known to the module that looks, and, when a run wants looks, to the one that
# puts the run together. Neither of the two knows training.
LOOKS = {"inference", "evaluation"}
# What each room may import, at module level and inside functions; a room may always import itself.
MAY_IMPORT = {
    "layout": set(),
    "config": set(),
    "config_file": {"config"},
    "device": set(),
    "environment": set(),
    "files": set(),
    "schedule": {"layout"},
    "ops": {"layout", "schedule"},
    "packing": {"config", "layout"},
    "model": {"config", "files", "layout", "ops", "packing"},
    "data": {"config", "config_file", "files", "layout", "packing"},
    "evaluation": {"config", "config_file", "environment", "files", "packing", "model", "data", "inference"},
    "inference": {"config", "config_file", "files", "layout", "ops", "packing", "model", "data"},
    "integrations": {"layout", "ops"},
    "training": {
        *("config", "config_file", "device", "environment", "files", "layout", "ops", "packing", "model", "data"),
        *LOOKS,
    },
}
TOP = {"cli", "commands", "quickstart", "study", "__main__"}  # may import everything
KERNELS = {"kernels", "_C"}
HEAVY = ("triton", "transformers", "diffusers", "safetensors", "tokenizers", "PIL", "sklearn", "scipy", "yaml", "rich")


def room_of(module):
    """``unigendet.ops.rms_norm`` → ``ops``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def sources(folder=PACKAGE, prefix="unigendet"):
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join((prefix, *(p for p in parts if p != "__init__"))), path


def imports(module, path):
    """(module, whether at module level and at run time) of every import; relative ones resolved."""
    tree = ast.parse(path.read_text())
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    lazy = set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_typing:
            lazy.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in lazy) for name in names)


MODULES = list(sources())


def test_every_room_has_a_rule():
    assert {room_of(module) for module, _ in MODULES} - {""} <= MAY_IMPORT.keys() | TOP | KERNELS


def test_the_checks_see_imports(tmp_path):
    """A check that finds nothing because it reads nothing would pass."""
    file = tmp_path / "x.py"
    file.write_text(
        "import triton\nfrom unigendet.kernels import a\nfrom . import model\nfrom ..layout import Layout\n"
        "def f():\n    import diffusers\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from unigendet.packing import pack\n"
    )
    assert set(imports("unigendet.ops.x", file)) == {
        ("triton", True),
        ("unigendet.kernels.a", True),
        ("unigendet.ops.model", True),
        ("unigendet.layout.Layout", True),
        ("diffusers", False),
        ("typing.TYPE_CHECKING", True),
        ("unigendet.packing.pack", False),
    }
    assert len(MODULES) > 20
    assert any(room_of(name) == "layout" for _, path in MODULES for name, _ in imports("unigendet.ops.x", path))


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[m for m, _ in MODULES])
def test_arrows_go_one_way(module, path):
    room = room_of(module)
    for name, at_module_level in imports(module, path):
        first = name.split(".")[0]
        assert first not in ("tests", "benchmarks", "conftest"), f"{module} imports {name}"
        if first == "kernels" or (first == "unigendet" and room_of(name) in KERNELS):
            allowed = room == "ops" and not at_module_level
            assert allowed or room in KERNELS, f"{module} imports {name}: only ops may, and only when called"
        elif first == "unigendet" and room in MAY_IMPORT and room_of(name) not in ("", "__version__"):
            assert room_of(name) in MAY_IMPORT[room] | {room}, f"{module} imports {name}"
        if room in ("layout", "schedule", "config", "ops", "packing", "model"):
            assert first not in HEAVY or (room == "model" and not at_module_level), f"{module} imports {name}"
        if room in ("model", "training"):
            assert first != "triton", f"{module} imports {name}"
        if room == "training" and room_of(name) in LOOKS:
            allowed = "unigendet.training.watch", "unigendet.training.run" if not at_module_level else None
            assert module in allowed, f"{module} imports {name}: training itself does without"
        if room in ("ops", "schedule"):
            assert first in {"unigendet", "torch", "numpy"} | sys.stdlib_module_names, f"{module} imports {name}"
        if room == "layout":
            assert first in {"torch", "numpy"} | sys.stdlib_module_names, f"{module} imports {name}"


def test_only_the_command_line_knows_benchmarks():
    """They are installed as ``unigendet.benchmarks``, for the command ``bench``."""
    knowing = {module for module, path in MODULES for name, _ in imports(module, path) if room_of(name) == "benchmarks"}
    assert knowing == {"unigendet.commands.bench"}


def test_benchmarks_load_with_the_core_dependencies():
    """But for those that document a run of the quickstart, or compile kernels: on a GPU machine little is installed."""
    code = f"import sys\nfor name in {[n for n in HEAVY if n != 'triton']!r}: sys.modules[name] = None\n"
    code += "sys.modules['matplotlib'] = None\n"
    code += "from unigendet.benchmarks import record, suite\nimport importlib\n"
    code += "for name in (*record.BENCHMARKS, 'report'): importlib.import_module('unigendet.benchmarks.' + name)\n"
    code += "print(len(record.BENCHMARKS))"
    assert int(run_fresh(code)) >= 11


def test_kernels_know_no_ops_and_no_model():
    for module, path in sources(ROOT / "kernels", "unigendet.kernels"):
        for name, _ in imports(module, path):
            if name.split(".")[0] == "unigendet":
                assert room_of(name) in {"kernels", "layout"}, f"{module} imports {name}"


def test_kernel_sources_include_no_torch():
    """Kernels take plain pointers, and the bindings read tensors through Python."""
    for pattern in ("*.cu", "*.cuh", "*.h", "*.cpp"):
        for path in (ROOT / "csrc").rglob(pattern):
            for line in path.read_text().splitlines():
                is_torch = line.lstrip().startswith("#include") and any(w in line for w in ("torch/", "ATen/", "c10/"))
                assert not is_torch, f"{path.name}: {line}"


def run_fresh(code):
    """Run ``code`` in a new interpreter; returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCKED_OPS = """
import sys
for name in ("triton", "transformers", "diffusers", "safetensors", "tokenizers", "PIL", "sklearn", "scipy", "datasets"):
    sys.modules[name] = None
import torch
from unigendet import Layout
import unigendet.ops as ops

layout = Layout.from_splits([[(3, "causal"), (4, "noise")], [(2, "full")]], streams=[0, 0, 0, 0, 1, 1, 0, 0, 0])
q = torch.randn(9, 4, 16, requires_grad=True)
k, v = (torch.randn(9, 2, 16, requires_grad=True) for _ in range(2))
results = []
for backend in ("reference", "torch", "auto"):
    out, lse = ops.symbiotic_attention(q, k, v, layout, out_order="stream", return_lse=True, backend=backend)
    results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))))
for other in results[1:]:
    for a, b in zip(results[0], other):
        torch.testing.assert_close(a, b)
grids = ops.ImageGrids.from_sizes([(2, 2, 3, 3)])
student = torch.randn(4, 8, requires_grad=True)
ops.alignment_loss(student, torch.randn(9, 8), grids).backward()
assert student.grad.abs().sum() > 0
ours = sorted(name for name in sys.modules if name.startswith("unigendet"))
print(*ours)
"""


def test_ops_compute_without_anything_but_torch():
    loaded = run_fresh(BLOCKED_OPS).split()
    assert "unigendet.ops.symbiotic_attention" in loaded
    assert {room_of(name) for name in loaded} - {"_C"} == {"", "layout", "schedule", "ops"}  # _C where it is built


@pytest.mark.parametrize(
    ("module", "rooms"),
    [
        ("unigendet", {""}),
        ("unigendet.layout", {"", "layout"}),
        ("unigendet.config", {"", "config"}),
        ("unigendet.packing", {"", "layout", "config", "packing"}),
        ("unigendet.model.unigendet", {"", "layout", "schedule", "config", "ops", "model"}),
    ],
)
def test_what_an_import_loads(module, rooms):
    """In a fresh process with everything blocked that the model's core does without."""
    code = "import sys\n"
    code += f"for name in {HEAVY!r}: sys.modules[name] = None\n"
    code += f"import {module}\nprint(*[m for m in sys.modules if m.split('.')[0] == 'unigendet'])"
    assert {room_of(name) for name in run_fresh(code).split()} == rooms


def test_public_names():
    code = "import unigendet\nprint(*[getattr(unigendet, n).__name__ for n in unigendet.__all__ if n != '__version__'])"
    assert run_fresh(code).split() == ["Layout", "ModelConfig", "UniGenDet", "pack"]
    with pytest.raises(AttributeError, match="module 'unigendet' has no attribute 'Lay'"):
        _ = unigendet.Lay
