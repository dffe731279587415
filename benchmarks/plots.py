"""What the plots show, as plain data, and the fingerprint by which a picture says from which data it was drawn.

Everything here is standard library, so pictures are checked without drawing them; ``figures`` draws.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from .recorded import Case, Device, sweeps, usable, wrong

KEY = "Data-SHA256"  # of the text in a picture that holds the fingerprint of its data
PNG = b"\x89PNG\r\n\x1a\n"


def plots(device: Device) -> dict[str, dict[str, Any]]:
    """The data of each plot of which there is something to draw: "roofline", "peers", "scaling"."""
    made = {"roofline": roofline(device), "peers": peers(device), "scaling": scaling(device)}
    return {name: data for name, data in made.items() if data is not None}


def fingerprint(data: dict[str, Any]) -> str:
    """sha256 of a plot's data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def fingerprint_of(picture: Path) -> str | None:
    """The fingerprint that a PNG carries; None if it carries none or is no PNG."""
    data = picture.read_bytes()
    position = len(PNG)
    if data[:position] != PNG:
        return None
    while position + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[position : position + 4]), data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        if kind == b"tEXt" and content.startswith(KEY.encode() + b"\0"):
            return content.partition(b"\0")[2].decode("latin-1")
        position += length + 12
    return None


def roofline(device: Device) -> dict[str, Any] | None:
    """Intensity and rate of our best backend in each headline case, under the device's two ceilings."""
    points, left_out = [], []
    for _, case in device.headlines():
        best = case.best()
        if best is None:
            left_out.append(f"{_name(case)} ({_why(case)})")
        elif not (best.get("flops") and best.get("bytes")):
            left_out.append(f"{_name(case)} (work not counted)")
        else:
            place = {name: best[name] for name in ("backend", "flops", "bytes", "ms")}
            points.append({"op": case.op, "direction": case.direction, "case": case.label, **place})
    names = ("matmul_tflops", "copy_gbs")
    limits = [result.ceilings for result, _ in device.headlines() if all(name in result.ceilings for name in names)]
    if not points or not limits:
        return None
    ceilings = {name: max(limit[name] for limit in limits) for name in names}
    return {**_header(device, *{result.benchmark for result, _ in device.headlines()}), **ceilings, "points": points,
            "left_out": left_out}  # fmt: skip


def peers(device: Device) -> dict[str, Any] | None:
    """Speed-ups over each peer of our best backend in each headline case and training step."""
    groups, left_out = [], []
    cases = [*device.headlines(), *device.steps()]
    for _, case in cases:
        best = case.best()
        if best is None:
            left_out.append(f"{_name(case)} ({_why(case)})")
            continue
        if speedups := case.speedups(best):
            label = {"op": case.op, "direction": case.direction, "case": case.label, "backend": best["backend"]}
            groups.append({**label, "speedups": speedups})
        elif any(not row["ours"] for row in case.rows):
            left_out.append(f"{_name(case)} (no peer to compare with)")
        bad = [row["backend"] for row in case.rows if not row["ours"] and wrong(row)]
        left_out += [f"{backend} in {_name(case)} (wrong)" for backend in bad]
    if not groups:
        return None
    return {**_header(device, *{result.benchmark for result, _ in cases}), "groups": groups, "left_out": left_out}


def scaling(device: Device) -> dict[str, Any] | None:
    """For each sweep the lines of picoseconds per useful FLOP."""
    if (result := device.results.get("scaling")) is None:
        return None
    panels, left_out = [], []
    for sweep, curves in sweeps(result).items():
        lines = []
        for curve in curves:
            name = f"{curve.op} {curve.direction}, {curve.backend}"
            if costs := curve.costs():
                lines.append({"label": name, "ours": curve.ours, "points": [[x, cost] for x, cost in costs.items()]})
            bad = [row for row in curve.points.values() if not usable(row)]
            if bad:
                why = "wrong" if any(wrong(row) for row in bad) else "did not run"
                left_out.append(f"{name} at {len(bad)} of {len(curve.points)} points of {sweep} ({why})")
        if lines:
            panels.append({"sweep": sweep, "lines": lines})
    return {**_header(device, "scaling"), "panels": panels, "left_out": left_out} if panels else None


def _header(device: Device, *benchmarks: str) -> dict[str, Any]:
    return {"device": device.name, "stale": any(device.results[name].stale for name in benchmarks)}


def _name(case: Case) -> str:
    return f"{case.op} {case.direction}"


def _why(case: Case) -> str:
    return "wrong" if any(wrong(row) and row["ours"] for row in case.rows) else "did not run"
