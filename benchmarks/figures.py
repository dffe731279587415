"""Drawing of the plots whose data ``plots`` prepares. It needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .plots import KEY, fingerprint
from .tables import factor as show_factor

# Okabe and Ito's colours, which differ for all common kinds of colour blindness, without yellow, too light for a line;
# a few more follow for when there are many.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
    "#7F7F7F", "#8C6D31", "#882255", "#44AA99",
)  # fmt: skip
MARKERS = {  # one inside the other where they meet
    "forward": {"marker": "o", "markersize": 5},
    "backward": {"marker": "s", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5},
    "both": {"marker": "D", "markersize": 7},
}
INK, FAINT, GRID = "#222222", "#555555", "#DDDDDD"
DPI, WIDTH, WRAP = 110, 8.2, 125  # dots per inch, inches, characters of a note's line
PEERS_AT_MOST = 5  # times the height of our highest point


def draw(name: str, data: Mapping[str, Any], file: Path) -> None:
    """Draw the plot ``name`` ("roofline", "peers", "scaling") as a PNG that carries its data's fingerprint."""
    figure = {"roofline": _roofline, "peers": _peers, "scaling": _scaling}[name](data)
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: fingerprint(dict(data)), "Software": None}
    FigureCanvasAgg(figure).print_png(file, metadata=metadata)


def _figure(
    data: Mapping[str, Any], title: str, height: float, handles: Sequence[Line2D] = (), columns: int = 5
) -> Figure:
    """An empty figure with its title and legend above ``height`` inches of plot, and below it what was left out."""
    note = f"Not drawn: {'; '.join(data['left_out'])}." if data["left_out"] else ""
    note_lines = textwrap.wrap(note, WRAP)
    top, bottom = 0.34 + 0.2 * -(-len(handles) // columns), 0.06 + 0.14 * len(note_lines)
    whole = top + height + bottom
    figure = Figure(figsize=(WIDTH, whole), dpi=DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, bottom / whole, 0.985, height / whole))
    stale = "  (stale: other kernels than the present ones)" if data["stale"] else ""
    figure.text(0.01, 1 - 0.08 / whole, f"{title}, {data['device']}{stale}", va="top", fontsize=11, color=INK)
    figure.text(0.01, 0.05 / whole, "\n".join(note_lines), fontsize=7.5, color=FAINT, va="bottom")
    if handles:
        place = {"loc": "upper left", "bbox_to_anchor": (0.0, 1 - 0.3 / whole), "ncols": columns}
        legend = figure.legend(handles=handles, fontsize=8, frameon=False, **place)
        legend.set_in_layout(False)
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _roofline(data: Mapping[str, Any]) -> Figure:
    figure = _figure(data, "Roofline", 4.6)
    axes = figure.add_subplot()
    _style(axes)
    matmul, copy = data["matmul_tflops"], data["copy_gbs"] / 1e3  # TFLOP/s, TB/s
    points = [(p["flops"] / p["bytes"], p["flops"] / p["ms"] / 1e9, p) for p in data["points"]]
    ridge = matmul / copy
    left, right = min(ridge, *(x for x, _, _ in points)) / 3, max(ridge, *(x for x, _, _ in points)) * 3
    axes.plot([left, ridge, right], [copy * left, matmul, matmul], color=INK, linewidth=1.4, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="useful FLOPs per byte", ylabel="TFLOP/s")
    axes.set_ylim(min(copy * left, *(y for _, y, _ in points)) / 1.5, matmul * 2.5)
    offset = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": INK}
    axes.annotate(f"matrix product {matmul:,.3g} TFLOP/s", (right, matmul), (-4, 4), **offset)
    middle = (left * ridge) ** 0.5
    axes.annotate(f"copy {data['copy_gbs']:,.4g} GB/s", (middle, copy * middle), (-8, 2), **offset)
    colours = dict(zip(dict.fromkeys(p["op"] for p in data["points"]), COLOURS * 2, strict=False))
    for x, y, point in points:
        axes.plot(x, y, color=colours[point["op"]], linestyle="", zorder=3, **MARKERS[point["direction"]])
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=op) for op, c in colours.items()]
    used = {p["direction"] for p in data["points"]}
    handles += [
        Line2D([], [], color=FAINT, linestyle="", label=direction, **marker)
        for direction, marker in MARKERS.items()
        if direction in used
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=12))
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
    return figure


def _peers(data: Mapping[str, Any]) -> Figure:
    groups = data["groups"]
    names = list(dict.fromkeys(peer for group in groups for peer in group["speedups"]))
    colours = dict(zip(names, COLOURS * 2, strict=False))
    bars = sum(len(group["speedups"]) for group in groups)
    handles = [Line2D([], [], color=c, linewidth=6, label=name) for name, c in colours.items()]
    figure = _figure(data, "Speed-up over peers", 0.6 + 0.145 * bars + 0.09 * len(groups), handles)
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(False, axis="y")
    position, ticks, labels = 0.0, [], []
    for group in groups:
        begin = position
        for peer, factor in group["speedups"].items():
            axes.barh(position, factor - 1, left=1, height=0.9, color=colours[peer])
            beyond = (4, "left") if factor >= 1 else (-4, "right")
            axes.annotate(f"{show_factor(factor)}×", (factor, position), (beyond[0], 0), textcoords="offset points",
                          ha=beyond[1], va="center", fontsize=7, color=INK)  # fmt: skip
            position += 1
        ticks.append((begin + position - 1) / 2)
        direction = "" if group["direction"] == "step" else f" {group['direction']}"
        labels.append(f"{group['op']}{direction} ({group['backend']})")
        position += 0.6
    values = [factor for group in groups for factor in group["speedups"].values()]
    axes.set(
        xscale="log",
        xlim=(min(1, *(v / 1.7 for v in values)) / 1.1, max(1, *values) * 1.6),
        ylim=(position - 0.8, -0.8),
    )
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlabel("time of the peer over our time (log scale; right of 1: we are faster)", fontsize=8.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _scaling(data: Mapping[str, Any]) -> Figure:
    panels: Sequence[Mapping[str, Any]] = data["panels"]
    lines = {line["label"]: line for panel in panels for line in panel["lines"]}
    styles = {
        label: {"color": colour, **({"marker": "o"} if line["ours"] else {"marker": "s", "linestyle": "--"})}
        for (label, line), colour in zip(lines.items(), COLOURS * 2, strict=False)
    }
    handles = [Line2D([], [], label=label, markersize=4, **style) for label, style in styles.items()]
    rows = (len(panels) + 1) // 2
    figure = _figure(data, "Cost of a useful FLOP", 2.4 * rows, handles, columns=3)
    for i, panel in enumerate(panels):
        _panel(figure.add_subplot(rows, min(2, len(panels)), i + 1), panel, styles)
    return figure


def _panel(axes: Axes, panel: Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """The lines of one sweep, the axis from 0. Peers may leave it at the top, lest ours be lines at the bottom."""
    _style(axes)
    for line in panel["lines"]:
        axes.plot(*zip(*line["points"], strict=True), markersize=4, linewidth=1.5, **styles[line["label"]])
    positions = sorted({x for line in panel["lines"] for x, _ in line["points"]})
    if positions[0] > 0 and positions[-1] / positions[0] >= 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(positions, [_plain(x) for x in positions])
    highest = {
        ours: max((y for line in panel["lines"] if line["ours"] is ours for _, y in line["points"]), default=0)
        for ours in (True, False)
    }
    cut = highest[True] > 0 and highest[False] > PEERS_AT_MOST * highest[True]
    axes.set_ylim(0, PEERS_AT_MOST * highest[True] if cut else 1.08 * max(highest.values()))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    title = panel["sweep"].replace("_", " ") + (" (lines that leave the top: see the table)" if cut else "")
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_ylabel("ps per useful FLOP", fontsize=8.5)
