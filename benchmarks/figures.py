"""Time and memory against N as SVG, drawn from result rows and stamped with what was drawn."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from benchmarks.rows import Row

# (N, value) by quantity and line.
Points = dict[str, dict[str, list[tuple[int, float]]]]

DASHES = {"float32": "-", "bfloat16": "--"}


def series(op: str, rows: list[Row]) -> Points:
    """Points (N, value) by quantity and line; forward and backward, random features, one width."""
    chosen = [
        row
        for row in rows
        if (row.op, row.mode, row.distribution) == (op, "fwd+bwd", "random")
        and "N" in row.shape
        and row.shape["D"] == 512
    ]
    result: Points = {"time, ms": {}, "peak memory, MiB": {}}
    for row in sorted(chosen, key=lambda row: row.shape["N"]):
        line = f"{row.variant}, {row.dtype}"
        result["time, ms"].setdefault(line, []).append((row.shape["N"], row.p50_ms))
        if row.peak_bytes:
            peak = row.peak_bytes / 2**20
            result["peak memory, MiB"].setdefault(line, []).append((row.shape["N"], peak))
    return result


def stamp(points: Points) -> str:
    """Identifies what a figure shows; two drawings of it differ between matplotlib versions."""
    return "rows " + hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def is_current(path: Path, points: Points) -> bool:
    return path.exists() and stamp(points) in path.read_text()


def draw(path: Path, title: str, points: Points) -> None:
    """Write the figure: one panel a quantity, one colour a variant, dashes for bf16."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mmkern", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(points), figsize=(9, 3.8))
    names = list(dict.fromkeys(line.split(", ")[0] for lines in points.values() for line in lines))
    for axis, (quantity, lines) in zip(axes, points.items(), strict=True):
        for line, values in lines.items():
            name, dtype = line.split(", ")
            axis.plot(
                *zip(*values, strict=True),
                DASHES[dtype],
                color=f"C{names.index(name)}",
                marker=".",
                linewidth=2 if name == "mmkern" else 1,
                label=line,
            )
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel=quantity)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": stamp(points)})
    pyplot.close(figure)
