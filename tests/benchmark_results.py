"""Invented benchmark results: files as a run would leave them, on a GPU or on a CPU. No number here was measured."""

import itertools
import json

KERNELS = "a" * 64  # the hash of the kernels that "measured" them
GPU, CPU = "nvidia-h200", "2-cpus-x86-64"
CEILINGS = {GPU: {"matmul_tflops": 700.0, "copy_gbs": 4000.0}, CPU: {"matmul_tflops": 0.2, "copy_gbs": 30.0}}
HARDWARE = {
    GPU: {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory_mib": 143771, "driver": "570.1"},
    CPU: {"name": "2 CPUs x86_64"},
}
# flops and bytes of one call on the GPU, forward, and the share of the floor's rate that backends reach
WORK = {
    "symbiotic_attention": (1.7e12, 0.5e9),
    "qk_norm_rope": (2e9, 0.6e9),
    "rms_norm": (1.2e9, 0.94e9),
    "swiglu": (5e9, 3.7e9),
    "stream_linear": (0.84e12, 0.5e9),
    "flow_matching": (4e6, 8e6),
    "flow_matching_loss": (3e6, 4e6),
    "alignment_loss": (2e9, 0.75e9),
    "decoder_layer": (15e12, 12e9),
}
OF = {"triton": 0.8, "torch": 0.35, "cpp": 0.7, "eager": 0.15, "torch.compile": 0.5, "flex": 0.4, "published": 0.3}
PEERS = {"symbiotic_attention": ("flex", "sdpa_dense_mask"), "decoder_layer": ("published",)}


def environment(slug, kernels=KERNELS):
    versions = {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0"}
    return {
        "time": "2031-02-03T04:05+00:00",
        "device": HARDWARE[slug],
        "platform": "Linux x86_64",
        "versions": versions,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "kernels_sha256": kernels,
    }


def row(slug, op, backend, *, direction="forward", status="ok", scale=1.0, of=None, peers=None, **more):
    """A row; ``peers`` maps the peers' names to their milliseconds."""
    row = {"op": op, "trace": None, "shape": "4096 x 512", "dtype": "bfloat16" if slug == GPU else "float32"}
    row |= {"direction": direction, "backend": backend, "ours": backend in ("triton", "torch", "cpp", "triton_atomic")}
    if status != "ok":
        return row | {"status": status} | more
    limits, factor = CEILINGS[slug], {"forward": 1, "backward": 2.5, "both": 3.5, "step": 3, "host": 1}[direction]
    flops, moved = (x * factor * scale * (1 if slug == GPU else 1e-4) for x in WORK[op])
    moved *= 1 if direction == "forward" else 0.8
    floors = {"matmul": flops / limits["matmul_tflops"] / 1e9, "copy": moved / limits["copy_gbs"] / 1e6}
    bound = max(floors, key=floors.get)
    of = of or OF.get(backend, 0.1)
    ms = floors[bound] / of
    row |= {"status": "ok", "ms": ms, "p20": 0.97 * ms, "p80": 1.04 * ms, "runs": 50, "correct": True, "error": {}}
    row |= {"peak_mib": 512.0, "first_call_s": 1.5, "flops": flops, "bytes": moved, "bound": bound, "of_ceiling": of}
    row |= {"tflops": flops / ms / 1e9, "gbs": moved / ms / 1e6}
    if row["ours"]:
        row["speedup_over"] = {peer: other / ms for peer, other in (peers or {}).items()}
    return row | more


def op_rows(slug, op, directions=("forward", "backward")):
    """The rows of an op: peers, ours, and some that cannot run."""
    own, place = ("triton", "torch") if slug == GPU else ("torch", "cpp"), {}
    if op == "symbiotic_attention":
        place = {"trace": "gduf_32k" if slug == GPU else "many_small_16k"}
    for direction in directions:
        peers = {}
        for peer in PEERS.get(op, ("eager", "torch.compile")):
            made = row(slug, op, peer, direction=direction, **place)
            peers[peer] = made["ms"]
            yield made
        if op not in PEERS:
            status = "cannot run: liger-kernel is not installed"
            yield row(slug, op, "liger", direction=direction, status=status, **place)
        for backend in own:
            yield row(slug, op, backend, direction=direction, peers=peers, **place)
        if slug == CPU:
            status = f"cannot run: backend='triton' cannot run {op}: its tensors must be on a CUDA device"
            yield row(slug, op, "triton", direction=direction, status=status, **place)


def step_rows(slug):
    small = (("quickstart width", "many_small_16k"), ("hidden 512, 4 layers", "gduf_4k"))
    places = (("BAGEL-7B width, 4 layers", "gduf_32k"),) if slug == GPU else small
    for (i, (shape, trace)), op in itertools.product(enumerate(places), ("gduf_step", "diga_step")):
        flops, own, published = (1 + i) * 1e14, 1.0 + i, 2.1 + 2 * i
        for backend, seconds in (("published", published), ("triton" if slug == GPU else "torch", own)):
            step = row(slug, "decoder_layer", backend, direction="step", shape=shape, trace=trace)
            step |= {"op": op, "ms": 1e3 * seconds, "p20": 990 * seconds, "p80": 1020 * seconds, "flops": flops}
            step |= {"tokens": 32000, "tokens_per_second": 32000 / seconds, "mfu": 0.55 / seconds}
            step |= {"mfu_published": 0.48 / seconds, "peak_mib": 30000 if backend == "published" else 16000}
            step["shares"] = {"attention": 0.41, "linear layers": 0.35, "norms": 0.06, "optimizer": 0.05, "other": 0.13}
            if step["ours"]:
                step["speedup_over"] = {"published": published / own}
            yield step


def packing_rows(slug):
    for trace, scale in (("gduf_32k", 1), ("gduf_64k", 2)):
        for op, backend, ms in (
            ("layout", "torch", 0.9),
            ("tile_schedule", "torch", 0.5),
            ("block_mask", "flex", 9000.0),
            ("dense_masks", "eager", 700.0),
        ):
            made = row(slug, "swiglu", backend, direction="host", trace=trace, dtype="int32")
            for name in ("flops", "bytes", "tflops", "gbs", "bound", "of_ceiling"):
                del made[name]
            ms *= scale
            if op == "tile_schedule":
                made |= {"shape": "tiles of 128 x 128", "useful_share": 0.94}
            yield made | {"op": op, "ms": ms, "p20": 0.9 * ms, "p80": 1.2 * ms, "correct": None, "speedup_over": {}}


def scaling_rows(slug):
    xs = {"tokens": (4096, 8192, 16384, 32768, 65536), "image_size": (256, 512, 768, 1024)}
    xs |= {"text_share": (0.0, 0.25, 0.5, 0.75, 1.0), "samples": (1, 4, 16, 64)}
    for sweep, positions in xs.items():
        for i, x in enumerate(positions):
            for backend, of in (("triton" if slug == GPU else "torch", 0.5 + 0.01 * i), ("flex", 0.4 - 0.05 * i)):
                shape = f"{sweep} {x}"
                yield row(slug, "symbiotic_attention", backend, scale=1 + i, of=of, shape=shape, sweep=sweep, x=x)


def write(folder, slug, benchmark, rows, *, complete=True, kernels=KERNELS, schema=2):
    """A result file; returns its path."""
    path = folder / slug / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": schema, "benchmark": benchmark, "environment": environment(slug, kernels)}
    header |= {"ceilings": CEILINGS[slug], "settings": {"seconds": 0.3, "threads": 2}, "complete": complete}
    path.write_text(json.dumps(header | {"rows": list(rows)}), encoding="utf-8")
    return path


def write_all(folder, slug):
    """Every benchmark of a device."""
    both = ("both",)
    write(folder, slug, "attention", op_rows(slug, "symbiotic_attention", ("forward", "backward", "both")))
    for op in ("qk_norm_rope", "rms_norm", "swiglu", "stream_linear"):
        write(folder, slug, op, op_rows(slug, op))
    write(folder, slug, "flow_matching", [*op_rows(slug, "flow_matching"), *op_rows(slug, "flow_matching_loss")])
    write(folder, slug, "alignment_loss", op_rows(slug, "alignment_loss", both))
    write(folder, slug, "decoder_layer", op_rows(slug, "decoder_layer"))
    write(folder, slug, "training_step", step_rows(slug))
    write(folder, slug, "packing_cost", packing_rows(slug))
    write(folder, slug, "scaling", scaling_rows(slug))
