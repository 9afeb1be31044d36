"""Pictures of a run, drawn with matplotlib's Agg canvas: no display, no global state."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def agg_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def plot_losses(
    history: Sequence[tuple[float, float]], path: str | Path, *, chance: float | None = None
) -> None:
    """Loss against step, as a PNG.

    Args:
        history: pairs (step, loss).
        path: file to write.
        chance: a loss to mark, such as ln(batch) for a contrastive loss that has learned nothing.
    """
    if not history:
        raise ValueError("plot_losses: expected at least one pair (step, loss), got none")
    figure = agg_figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.plot([step for step, _ in history], [loss for _, loss in history], color="tab:blue")
    if chance is not None:
        axes.axhline(chance, color="0.6", linestyle=":", label="chance")
        axes.legend()
    axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_predictions(
    images: Tensor,
    best: Sequence[Sequence[str]],
    right: Sequence[Collection[str]],
    path: str | Path,
    *,
    columns: int = 6,
    title: str = "",
) -> None:
    """A grid of pictures with the best names under each, a right name in green, as a PNG.

    Args:
        images: [N, H, W, 3] uint8.
        best: for each picture its names, best first.
        right: for each picture the names that count as right; the first is shown above it.
        path: file to write.
        columns: pictures a row.
        title: line above the grid.
    """
    if not len(images) == len(best) == len(right) or not len(images):
        raise ValueError(
            f"plot_predictions: expected as many names as pictures, at least one, "
            f"got {len(images)}, {len(best)} and {len(right)}"
        )
    rows = -(-len(images) // columns)
    figure = agg_figure(2.1 * columns, 2.35 * rows + 0.4)
    for place, (image, names, truth) in enumerate(zip(images, best, right, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(image.numpy(), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(_short(next(iter(truth))), fontsize=8, color="0.4")
        for line, name in enumerate(names):
            hit = name in truth
            axes.text(
                0.5,
                -0.04 - 0.125 * line,
                _short(name),
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color="tab:green" if hit else "black",
                weight="bold" if hit else "normal",
            )
    figure.suptitle(title, fontsize=11)
    figure.subplots_adjust(0.02, 0.75 / (2.35 * rows), 0.98, 1 - 0.65 / (2.35 * rows), 0.15, 0.95)
    figure.savefig(path, dpi=100)


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
