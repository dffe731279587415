"""Compile the kernels' launches without a GPU and without torch: stand-ins for tensors, and what Triton's JIT would do.

The launchers of ``unigendet.kernels`` are called as the ops call them. What they return is specialized by the JIT's own
code and compiled by the same pipeline as on a GPU machine, so that what is read here is what would run there.
"""

from __future__ import annotations

import contextlib
import io
import math
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature
from unigendet.kernels import (
    alignment_loss,
    flow_matching,
    flow_matching_loss,
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    rms_norm,
    swiglu,
)
from unigendet.kernels.alignment_loss_teacher import teacher_gradient
from unigendet.kernels.attention_delta import attention_delta, scaled_copy
from unigendet.kernels.attention_dkdv import attention_dkdv
from unigendet.kernels.attention_dq import attention_dq
from unigendet.kernels.attention_forward import attention_forward
from unigendet.kernels.config import DIRECTIONS, AttentionConfig, attention_config
from unigendet.kernels.launch import Launch

ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "int64": 8}
# (Hq, Hkv) by head_dim: BAGEL's language model, its vision transformer, and a small model.
HEADS = {64: (16, 4), 72: (16, 16), 128: (28, 4)}
WIDTHS = {64: 1024, 72: 1152, 128: 3584}
INTERMEDIATE = {64: 2816, 72: 4304, 128: 18944}
EPS = 1e-6
PATCH, CHANNELS = 2, 16  # of BAGEL's latents


@dataclass(frozen=True)
class DType:
    """What launchers and Triton read of a torch.dtype: its name and size."""

    name: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEM_SIZES[self.name]

    def __str__(self) -> str:
        return f"torch.{self.name}"


class Tensor:
    """A contiguous tensor's shape, strides and type, at an aligned address with nothing behind it."""

    def __init__(self, dtype: str, *shape: int):
        self.shape = shape
        self.dtype = DType(dtype)
        self._strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def stride(self, dim: int | None = None) -> Any:
        """Strides in elements."""
        return self._strides if dim is None else self._strides[dim]

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """An address as torch's allocator gives them."""
        return 1 << 12

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Pack:
    """The sizes that change from pack to pack: rows of queries, keys and the first stream, entries of a schedule."""

    queries: int = 4096
    keys: int = 4096
    understanding: int = 2048
    ranges: int = 64
    edges: int = 128


@dataclass(frozen=True)
class Schedule:
    """The fields of ``unigendet.schedule.TileSchedule`` that launchers read."""

    query_tiles: Tensor
    whole_ranges: Tensor
    edge_tiles: Tensor
    key_tiles: Tensor
    holes: bool


def _schedule(pack: Pack, config: AttentionConfig, holes: bool = False) -> Schedule:
    rows = (-(-pack.queries // config.block_m), pack.ranges, -(-pack.keys // config.block_n))
    query_tiles, whole_ranges, key_tiles = (Tensor("int32", n, w) for n, w in zip(rows, (8, 2, 8), strict=True))
    return Schedule(query_tiles, whole_ranges, Tensor("int32", pack.edges), key_tiles, holes)


def attention_launches(
    capability: tuple[int, int],
    head_dim: int,
    dtype: str,
    configs: Mapping[str, AttentionConfig] | None = None,
    pack: Pack | None = None,
) -> Iterator[tuple[str, Launch]]:
    """Every kernel of attention and its variants, by name. ``configs``: for directions not configured as usual."""
    pack = pack or Pack()
    heads, kv_heads = HEADS[head_dim]
    q, out, grad, dq = (Tensor(dtype, pack.queries, heads, head_dim) for _ in range(4))
    k, v, dk, dv = (Tensor(dtype, pack.keys, kv_heads, head_dim) for _ in range(4))
    lse, delta = (Tensor("float32", heads, pack.queries) for _ in range(2))
    mask = Tensor("int32", pack.keys), Tensor("int32", pack.keys)
    out_rows = Tensor("int64", pack.queries)
    dq_sum = Tensor("float32", *q.shape)
    scale = head_dim**-0.5

    def configured(direction: str, holes: bool = False) -> tuple[Schedule, AttentionConfig]:
        config = (configs or {}).get(direction) or attention_config(capability, head_dim, dtype, direction)
        return _schedule(pack, config, holes), config

    def forward(rows: Tensor | None, holes: bool) -> tuple[Launch, ...]:
        schedule, config = configured("forward", holes)
        return attention_forward(q, k, v, out, lse, *mask, schedule, rows, scale, config)

    def backward_dkdv(direction: str, target: Tensor | None) -> tuple[Launch, ...]:
        schedule, config = configured(direction)
        return attention_dkdv(q, k, v, grad, lse, delta, dk, dv, target, *mask, schedule, scale, config)

    schedule, config = configured("backward_dq")
    named = {
        "forward": forward(out_rows, False),
        "forward_cached": forward(None, True),
        "backward_dkdv": backward_dkdv("backward_dkdv", None),
        "backward_dkdv_atomic": backward_dkdv("backward_dkdv_atomic", dq_sum),
        "backward_dq": attention_dq(q, k, v, grad, lse, delta, dq, *mask, schedule, scale, config),
        "delta": attention_delta(out, grad, None, delta, grad, out_rows),
        "scaled_copy": scaled_copy(dq_sum, dq, scale),
    }
    for name, launches in named.items():
        for launch in launches:
            yield name, launch


def rope_launches(
    capability: tuple[int, int], head_dim: int, dtype: str, pack: Pack | None = None
) -> Iterator[tuple[str, Launch]]:
    """Every kernel of qk_norm_rope and its variants, by name. Tables and norm weights are float32."""
    pack = pack or Pack()
    heads = HEADS[head_dim]
    rows = pack.queries
    qkv, dqkv = (Tensor(dtype, rows, (heads[0] + 2 * heads[1]) * head_dim) for _ in range(2))
    norms, dnorms = ([Tensor("float32", head_dim) for _ in range(4)] for _ in range(2))
    tables = [Tensor("float32", pack.keys, head_dim // 2) for _ in range(2)]
    inputs = (qkv, norms, *tables, Tensor("int64", rows), Tensor("int64", rows))
    sequence, cache = (
        [Tensor(dtype, rows, heads[0], head_dim), *(Tensor(dtype, n, heads[1], head_dim) for _ in range(2))]
        for n in (rows, pack.keys)
    )
    last = (pack.understanding, heads, EPS)
    config = qk_norm_rope.configure(capability, heads, head_dim, "forward")
    for name, key_rows, outputs in (
        ("qk_norm_rope_forward", None, sequence),
        ("qk_norm_rope_forward_cached", Tensor("int64", rows), cache),
    ):
        for launch in qk_norm_rope_forward.forward(config, *inputs, key_rows, outputs, *last):
            yield name, launch
    config = qk_norm_rope.configure(capability, heads, head_dim, "backward")
    programs = qk_norm_rope_backward.backward_programs(config, rows, pack.understanding, heads)[1]
    partials = Tensor("float32", programs, 2, head_dim)
    launches = qk_norm_rope_backward.backward(config, sequence, *inputs, dqkv, dnorms, partials, *last)
    for name, launch in zip(("qk_norm_rope_backward", "qk_norm_rope_weight_gradients"), launches, strict=True):
        yield name, launch


def row_launches(head_dim: int, dtype: str, pack: Pack | None = None) -> Iterator[tuple[str, Launch]]:
    """Every kernel of the ops that work row by row, by name. Norm weights are float32."""
    pack = pack or Pack()
    yield from _rms_norm_launches(WIDTHS[head_dim], dtype, pack)
    intermediate = INTERMEDIATE[head_dim]
    gate_up, gradient = (Tensor(dtype, pack.queries, 2 * intermediate) for _ in range(2))
    y = Tensor(dtype, pack.queries, intermediate)
    yield "swiglu_forward", *swiglu.forward(gate_up, y)
    yield "swiglu_backward", *swiglu.backward(y, gate_up, gradient)
    yield from _flow_matching_launches(dtype, pack)


def _flow_matching_launches(dtype: str, pack: Pack) -> Iterator[tuple[str, Launch]]:
    rows, features = pack.queries, PATCH * PATCH * CHANNELS
    noise, noised, target, gradient = (Tensor(dtype, rows, features) for _ in range(4))
    latents = Tensor(dtype, rows * features)
    timesteps, partials, loss = (Tensor("float32", n) for n in (pack.edges, pack.ranges, rows))
    tiles, first_tiles = Tensor("int32", pack.ranges, 8), Tensor("int32", pack.edges + 1)
    sizes = (PATCH, CHANNELS)
    yield "flow_matching_forward", *flow_matching.forward(tiles, latents, noise, timesteps, noised, target, *sizes)
    inputs = (tiles, first_tiles, noised, gradient, timesteps, target)
    launches = flow_matching.backward(*inputs, latents, noise, timesteps, partials, *sizes)
    yield from zip(("flow_matching_backward", "flow_matching_dtimesteps"), launches, strict=True)
    yield "flow_matching_loss_forward", *flow_matching_loss.forward(noised, target, loss)
    yield "flow_matching_loss_backward", *flow_matching_loss.backward(loss, noised, target, gradient, None)


def _rms_norm_launches(width: int, dtype: str, pack: Pack) -> Iterator[tuple[str, Launch]]:
    rows, n = pack.queries, pack.understanding
    x, residual, summed, normed = (Tensor(dtype, rows, width) for _ in range(4))
    weights, dweights = ([Tensor("float32", width) for _ in range(2)] for _ in range(2))
    rstd = Tensor("float32", rows)
    yield "rms_norm_forward", *rms_norm.forward(x, residual, weights, summed, rstd, normed, n, EPS)
    yield "rms_norm_forward_alone", *rms_norm.forward(x, None, weights, None, rstd, normed, n, EPS)
    partials = Tensor("float32", rms_norm.backward_programs(rows, n, width)[2], width)
    inputs = (normed, residual, summed, rstd, weights, x)
    backward, sums = rms_norm.backward(*inputs, dweights, partials, n)
    yield "rms_norm_backward", backward
    yield "rms_norm_weight_gradients", sums
    yield "rms_norm_backward_frozen", *rms_norm.backward(*inputs, (None, None), None, n)
    alone = (normed, None, summed, rstd, weights, None)
    yield "rms_norm_backward_weight", rms_norm.backward(*alone, (None, dweights[1]), partials, n)[0]


def alignment_launches(head_dim: int, dtype: str, pack: Pack | None = None) -> Iterator[tuple[str, Launch]]:
    """Every kernel of alignment_loss and its variants, by name: queries are student rows, keys are teacher rows."""
    pack = pack or Pack()
    columns = WIDTHS[head_dim]
    config = alignment_loss.configure(columns)
    (student, dstudent), (teacher, dteacher) = (
        [Tensor(dtype, rows, columns) for _ in range(2)] for rows in (pack.queries, pack.keys)
    )
    tiles, images, teacher_tiles = (Tensor("int32", n, 8) for n in (pack.edges, pack.ranges, pack.edges))
    number, sums = Tensor("float32"), Tensor("float32", pack.ranges)
    distances, coefficients = Tensor("float32", pack.queries), Tensor("float32", pack.queries, 2)
    unit = dtype == "float16"
    tables, outputs = (tiles, images), (number, sums, dstudent)
    # Without the teacher's gradient, and with all that is optional.
    plain = alignment_loss.forward(
        config, student, teacher, *tables, None, None, 0.5, (unit, unit), outputs, (distances, sums, None)
    )
    options = (number, distances, 0.5, (unit, unit), outputs, (distances, sums, coefficients))
    full = alignment_loss.forward(config, student, teacher, *tables, *options)
    names = ("alignment_forward", "alignment_image_sums", "alignment_total")
    for launches_, suffix in ((plain, ""), (full, "_full")):
        for name, launch in zip(names, launches_, strict=True):
            yield name + suffix, launch
    for launch in teacher_gradient(config, student, teacher, teacher_tiles, coefficients, dteacher):
        yield "alignment_teacher", launch
    for launch in alignment_loss.scale(dstudent, number, dstudent):
        yield "alignment_scale", launch


def launches(
    capability: tuple[int, int], head_dim: int, dtype: str, pack: Pack | None = None
) -> Iterator[tuple[str, Launch]]:
    """Every kernel by name, as configured; where tensor descriptors are used, also without them."""
    yield from attention_launches(capability, head_dim, dtype, pack=pack)
    if capability >= (9, 0):
        configs = {d: attention_config(capability, head_dim, dtype, d, describable=False) for d in DIRECTIONS}
        for name, launch in attention_launches(capability, head_dim, dtype, configs, pack):
            if name in DIRECTIONS:
                yield f"{name}_pointers", launch
    yield from rope_launches(capability, head_dim, dtype, pack)
    yield from row_launches(head_dim, dtype, pack)
    yield from alignment_launches(head_dim, dtype, pack)


def _specialize(launch: Launch, target: GPUTarget) -> tuple[Any, dict[str, Any], list[Any], dict[str, Any]]:
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            "TRITON_INTERPRET is set: the kernels were defined for the interpreter and cannot be compiled"
        )
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return backend, *bind(**launch.arguments, **options)


def specialization_key(launch: Launch, target: GPUTarget) -> str:
    """The key under which the JIT keeps the compiled kernel: launches with one key share one compilation."""
    _, _, specialization, options = _specialize(launch, target)
    return compute_cache_key({}, specialization, options)


@dataclass(frozen=True)
class Compiled:
    """A compiled launch: shared memory in bytes, PTX, SASS, and what ptxas -v said."""

    shared: int
    ptx: str
    sass: str
    log: str


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` (80, 90), past Triton's cache: a hit would have no ptxas log."""
    target = GPUTarget("cuda", arch, 32)
    backend, bound, specialization, options = _specialize(launch, target)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            kernel = compile(source, target=target, options=options.__dict__)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Compiled(kernel.metadata.shared, kernel.asm["ptx"], sass, log.getvalue())
