"""Markdown tables from result rows. Each function returns the text between a pair of markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.case import OURS
from benchmarks.rows import Row

NO_ROWS = "_No rows recorded yet._"
AGAINST = {
    "attention": "sdpa",
    "blip2": "separate",
    "flamingo": "sdpa",
    "linear_cross_entropy": "compacted",
    "plora_linear": "mask",
}  # others: the dense formula
HEADLINE = 8192  # the size of the acceptance case
DTYPES = ("float32", "bfloat16")
TRAINED = "trained"  # features that are there for their rounding, not for their time


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(row: Row | None) -> str:
    return _number(None if row is None else row.p50_ms)


def _mebibytes(row: Row | None) -> str:
    return _number(None if row is None or row.peak_bytes is None else row.peak_bytes / 2**20)


def _ratio(ours: Row | None, other: Row | None) -> str:
    return "–" if ours is None or other is None else f"{other.p50_ms / ours.p50_ms:.2f}"


def _backend(row: Row) -> str:
    return f"{row.variant} ({row.backend})" if row.backend else row.variant


def origin(rows: Sequence[Row]) -> str:
    """One line: device, calibrated rates, versions, commits and dates of `rows`."""
    last = max(rows, key=lambda row: row.date)
    rates = ", ".join(
        f"{dtype} {max(row.gemm_tflops for row in of):.3g}"
        for dtype, of in _grouped(rows, lambda row: row.dtype).items()
    )
    commits = sorted({row.commit + (" with local changes" if row.dirty else "") for row in rows})
    return (
        f"{last.device} ({last.isa}), {last.threads} threads, torch {last.versions['torch']}; "
        f"measured TFLOP/s of matrix products: {rates}; commit {', '.join(commits)}; "
        f"{last.date[:10]}."
    )


def _by_place(rows: list[Row], one: Callable[[list[Row]], str]) -> str:
    parts = [one(group) for group in _grouped(rows, lambda row: row.place).values()]
    return "\n\n".join(part for part in parts if part) or NO_ROWS


def against(op: str) -> str:
    """The variant that ours is set against."""
    return AGAINST.get(op, "dense")


def _size(row: Row) -> tuple[str, str]:
    """What its line is called, and the sizes that go into the title: N varies, others seldom do."""
    if "N" in row.shape:
        others = (f"{name} = {value:,}" for name, value in row.shape.items() if name != "N")
        return f"{row.shape['N']:,}", ", ".join(others)
    label = " x ".join(f"{value:,}" for value in row.shape.values())
    return f"{label}, {row.distribution}", ""


def _cells(rows: list[Row], cell: Callable[[Row | None], str], ratio: bool) -> str:
    """Sizes down, variants across, one table for each mode, dtype and width."""
    parts = []
    groups = _grouped(rows, lambda row: (row.mode, row.dtype, _size(row)[1]))
    for key, group in sorted(groups.items(), key=lambda item: str(item[0])):
        variants = list(dict.fromkeys(row.variant for row in group))
        names = {row.variant: _backend(row) for row in group}
        peer, sizes = against(group[0].op), group[0].shape
        header = ["N" if "N" in sizes else " x ".join(sizes), *(names[v] for v in variants)]
        header += [f"× {peer}", "sol"] if ratio else []
        body = []
        group = sorted(group, key=lambda row: (tuple(row.shape.values()), row.distribution))
        for label, cases in _grouped(group, lambda row: _size(row)[0]).items():
            found = {row.variant: row for row in cases}
            line = [label, *(cell(found.get(variant)) for variant in variants)]
            if ratio:
                ours = found.get(OURS)
                sol = "–" if ours is None else f"{ours.sol:.2f}"
                line += [_ratio(ours, found.get(peer)), sol]
            body.append(line)
        title = ", ".join(part for part in key if part)
        parts.append(f"**{title}**\n\n{markdown(header, body)}")
    return "\n\n".join([*parts, origin(rows)])


def time(op: str, rows: list[Row]) -> str:
    """Median milliseconds, ours against one peer, and sol."""
    chosen = [row for row in rows if row.op == op and row.distribution != TRAINED]
    return _by_place(chosen, lambda group: _cells(group, _milliseconds, ratio=True))


def memory(op: str, rows: list[Row]) -> str:
    """Peak MiB above the inputs, forward and backward."""
    chosen = [
        row for row in rows if (row.op, row.mode) == (op, "fwd+bwd") and row.distribution != TRAINED
    ]
    return _by_place(chosen, lambda group: _cells(group, _mebibytes, ratio=False))


def error(op: str, rows: list[Row]) -> str:
    """Relative error against fp64, gradients included, on trained-like features where there are."""
    judged = [row for row in rows if (row.op, row.mode) == (op, "fwd+bwd") and row.errors]
    chosen = [row for row in judged if row.distribution == TRAINED] or judged

    def one(group: list[Row]) -> str:
        names = list(dict.fromkeys(name for row in group for name in row.errors))
        body = [
            [_backend(row), row.dtype, _size(row)[0]]
            + [f"{row.errors[name]:.1e}" if name in row.errors else "–" for name in names]
            for row in group
        ]
        size = "N" if "N" in group[0].shape else " x ".join(group[0].shape)
        return f"{markdown(['variant', 'dtype', size, *names], body)}\n\n{origin(group)}"

    return _by_place(chosen, one)


def headline(ops: Sequence[str], rows: list[Row]) -> str:
    """Forward and backward at N = 8192, D = 512: ours beside the dense formula in fp32."""
    chosen = [
        row
        for row in rows
        if row.op in ops
        and row.mode == "fwd+bwd"
        and row.distribution == "random"
        and row.shape == {"N": HEADLINE, "D": 512}
    ]

    def one(group: list[Row]) -> str:
        body = []
        for op, of_op in _grouped(group, lambda row: row.op).items():
            found = {(row.variant, row.dtype): row for row in of_op}
            for dtype in DTYPES:
                ours, peer = found.get((OURS, dtype)), found.get((against(op), dtype))
                if ours is None:
                    continue
                peak = f"{_mebibytes(ours)} / {_mebibytes(peer)}"
                beside = [_milliseconds(peer), _ratio(ours, peer)]
                beside.append(_ratio(ours, found.get((against(op), "float32"))))
                body.append(
                    [f"{op}, {dtype}", _milliseconds(ours), *beside, f"{ours.sol:.2f}", peak]
                )
        header = [
            f"N = {HEADLINE:,}, D = 512",
            "mmkern, ms",
            "dense PyTorch, ms",
            "faster",
            "than dense fp32",
            "sol",
            "peak MiB, ours / dense",
        ]
        return f"{markdown(header, body)}\n\n{origin(group)}" if body else ""

    return _by_place(chosen, one)


def demo(runs: list[dict[str, Any]]) -> str:
    """The last recorded run of the demo on each device, beside chance and pixel lookup."""
    parts = []
    for run in _last_runs(runs):
        header = ["", *(f"{title}, top-{k}" for title in run["vendors"].values() for k in (1, 5))]
        keys = {"CLIP, zero-shot": "", "nearest training pixels": "pixel_", "chance": "chance_"}
        body = [
            [what, *(percent(run.get(f"{p}{key}top{k}")) for p in run["vendors"] for k in (1, 5))]
            for what, key in keys.items()
        ]
        changes = " with local changes" if run["dirty"] else ""
        parts.append(
            f"{markdown(header, body)}\n\n"
            f"Among {run['names']:,} names. Trained on {run['pairs']:,} pairs in "
            f"{run['train_seconds']:,.0f} s, loss by {run['backend']}; {run['device']}, "
            f"{run['threads']} threads; commit {run['commit']}{changes}; {run['date'][:10]}."
        )
    return "\n\n".join(parts) or NO_ROWS


def demo_prompts(runs: list[dict[str, Any]]) -> str:
    """The same runs by the wording of the classifier's prompts."""
    parts = []
    for run in _last_runs(runs):
        titles = [title for title in run["vendors"].values() if title in run.get("prompts", {})]
        if not titles:
            continue
        header = ["prompt", *(f"{title}, top-{k}" for title in titles for k in (1, 5))]
        body = [
            [
                wording,
                *(percent(run["prompts"][t][wording][f"top{k}"]) for t in titles for k in (1, 5)),
            ]
            for wording in run["prompts"][titles[0]]
        ]
        parts.append(markdown(header, body))
    return "\n\n".join(parts) or NO_ROWS


def _last_runs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(run["device"], run["threads"]): run for run in runs}.values())


def percent(value: float | None) -> str:
    """A share as text."""
    return "–" if value is None else f"{100 * value:.2f} %"
