"""Figures of a report, as SVG text; matplotlib is the optional `report` extra."""

import io
from collections.abc import Mapping, Sequence

COLOURS = ("#3b6fb6", "#d9822b", "#4a9a5b", "#b04a5a", "#7a5fa8", "#5b8c9a", "#8a7a4a", "#777777")


def has_plots() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def plot_bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    lines: Mapping[str, float] | None = None,
) -> str:
    """Grouped bars, one group per label and one colour per series; `lines` are drawn across."""
    figure, axes = _figure(max(6.0, 0.9 * len(labels) + 1.5), 3.4)
    width = 0.8 / max(len(series), 1)
    for n, (name, values) in enumerate(series.items()):
        at = [position + (n - (len(series) - 1) / 2) * width for position in range(len(labels))]
        axes.bar(at, values, width, label=name, color=COLOURS[n % len(COLOURS)])
    for n, (name, value) in enumerate((lines or {}).items()):
        axes.axhline(value, label=name, color="black", linewidth=1, linestyle=("--", ":", "-.")[n % 3])
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", parse_math=False)
    return _finish(figure, axes, title, None, y_label)


def plot_lines(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """One curve per series over the same points."""
    figure, axes = _figure(6.0, 3.4)
    for n, (name, values) in enumerate(series.items()):
        axes.plot(x, values, marker="o", markersize=3, label=name, color=COLOURS[n % len(COLOURS)])
    return _finish(figure, axes, title, x_label, y_label)


def plot_points(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """A cloud of points per series, (x, y) each."""
    figure, axes = _figure(7.0, 3.8)
    for n, (name, (x, y)) in enumerate(series.items()):
        marker = "osD^v*"[n % 6]
        axes.scatter(x, y, s=22, marker=marker, label=name, color=COLOURS[n % len(COLOURS)], alpha=0.8, linewidths=0)
    return _finish(figure, axes, title, x_label, y_label)


def _figure(width, height):
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure, axes, title, x_label, y_label):
    import matplotlib

    axes.set_title(title, fontsize=10, parse_math=False)  # a name may hold a "$"
    axes.set_ylabel(y_label, parse_math=False)
    if x_label:
        axes.set_xlabel(x_label, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)
    buffer = io.StringIO()
    # Without a date and with a fixed salt, the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "jaxtune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
