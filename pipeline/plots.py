"""Small plots as inline SVG: sharp at any size, readable in light and dark, no script."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

INK, LINE, MARK = "#5b6472", "#2f6fdb", "#d9480f"


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """Loss by step: every step faint, an exponential average bold."""
    figure, axes = _figure(3.4, 1.9)
    axes.plot(steps, losses, color=LINE, linewidth=0.6, alpha=0.35)
    axes.plot(steps, _smoothed(losses), color=LINE, linewidth=1.6)
    if min(losses) > 0 and max(losses) / min(losses) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    return _svg(figure)


def spectrum(eigenvalues: Sequence[float], kept: int) -> str:
    """Eigenvalues by component, with the number that is kept, and the share that they explain together."""
    figure, axes = _figure(6.4, 2.4)
    total = sum(eigenvalues)
    shares, running = [], 0.0
    for value in eigenvalues:
        running += value
        shares.append(running / total if total else 0.0)
    index = range(1, len(eigenvalues) + 1)
    axes.semilogy(index, [max(value, 1e-12) for value in eigenvalues], color=LINE, linewidth=1.6)
    axes.axvline(kept, color=MARK, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"{kept} kept", (kept, max(eigenvalues)), xytext=(5, -8), textcoords="offset points", color=MARK, fontsize=8
    )
    axes.set_xlabel("component")
    axes.set_ylabel("eigenvalue")
    explained = axes.twinx()
    explained.plot(index, shares, color=INK, linewidth=1.2, alpha=0.7)
    explained.set_ylim(0, 1.03)
    explained.set_ylabel("explained", color=INK, fontsize=8)
    explained.tick_params(colors=INK, labelsize=7)
    for side in explained.spines.values():
        side.set_visible(False)
    return _svg(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about a fiftieth of the run, without the bias of its start."""
    decay = 1 - 1 / max(2.0, len(values) / 50)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=7)
    axes.xaxis.label.set(color=INK, fontsize=8)
    axes.yaxis.label.set(color=INK, fontsize=8)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(INK)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "unclip", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
