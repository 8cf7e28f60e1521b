"""Recovered shares by way and number of examples, with intervals over pairs, and what was to hold."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from experiments.rungs.summary import SMALLEST_GAP, bootstrap
from experiments.samples.measure import SHARES
from experiments.workdir import Workdir


def write_results(workdir: Workdir, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Leaves few.json (every row) and few.md (the tables) in the workdir, and prints the tables."""
    versions = {name: version(name) for name in ("jaxtune", "jax", "numpy")}
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows)
    head = json.dumps({"config": config, "versions": {"python": platform.python_version(), **versions}, "rows": []})
    workdir.publish_text("few.json", head.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")
    page = render_page(config, rows)
    workdir.publish_text("few.md", page)
    print(page)


def render_page(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One table a model and rung: recovered share by way and size, support behind it."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for rung in dict.fromkeys(row["rung"] for row in rows if row["model"] == model):
            ours = [row for row in rows if row["model"] == model and row["rung"] == rung]
            lines += [f"### {model}, {rung}", "", *_table(config, ours), "", *_comparisons(config, ours), ""]
    return "\n".join(lines)


def pair_means(rows: Sequence[Mapping[str, Any]], way: str, size: Any, column: str = "accuracy") -> np.ndarray:
    """Mean over the tasks for each pair; empty where a way was not measured at this size.

    Shapes:
        result: float[pairs].
    """
    chosen = [row for row in rows if row["way"] == way and row["size"] == size and column in row]
    return np.array(
        [np.mean([row[column] for row in chosen if row["index"] == n]) for n in sorted({r["index"] for r in chosen})]
    )


def recovered(rows: Sequence[Mapping[str, Any]], way: str, size: Any) -> np.ndarray | None:
    """`(moved - base) / (ceiling - base)` of every pair, accuracies averaged over tasks first; None where the gap is
    below `SMALLEST_GAP` or the way was not measured."""
    moved = pair_means(rows, way, size)
    base, ceiling = (pair_means(rows, name, 0) for name in ("base", "ceiling"))
    if not len(moved) or (ceiling - base).min() < SMALLEST_GAP:
        return None
    return (moved - base) / (ceiling - base)


def at_equal_support(
    rows: Sequence[Mapping[str, Any]], ours: str, theirs: str, size: Any
) -> tuple[float, float, float] | None:
    """Difference in task accuracy of two ways where both keep the same support, (mean, low, high) over pairs.

    Each way is a line from the new base to its result, measured at `SHARES` of it. For every pair and task the two are
    compared at the support that the better keeper of the two has at its end; each counts as accurate as the furthest
    point of its line that keeps as much. That point is chosen by the support, not by the accuracy.
    """
    differences = []
    for index in sorted({row["index"] for row in rows}):
        ends = {row["task"]: row for row in rows if row["index"] == index and row["way"] == "base"}
        gaps = []
        for task, base in ends.items():
            pair = []
            for way in (ours, theirs):
                found = [r for r in rows if (r["index"], r["task"], r["way"], r["size"]) == (index, task, way, size)]
                if not found or "curve" not in found[0]:
                    return None
                pair.append(found[0]["curve"])
            level = max(curve["support"][-1] for curve in pair)
            gaps.append(_read_at(pair[0], base, level) - _read_at(pair[1], base, level))
        differences.append(float(np.mean(gaps)))
    return bootstrap(differences)


def _read_at(curve, base, level):
    """The accuracy at the furthest point of the way, knots or between them, that keeps at least this support."""
    share = np.linspace(0.0, 1.0, 101)
    knots = (0.0, *SHARES)
    accuracy = np.interp(share, knots, [base["accuracy"], *curve["task"]])
    support = np.interp(share, knots, [base["support"], *curve["support"]])
    kept = np.flatnonzero(support >= level)
    return float(accuracy[kept[-1]]) if len(kept) else base["accuracy"]


def _table(config, rows):
    sizes = [0, *config["sizes"]]
    table = ["| way | " + " | ".join(f"n = {size}" for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
    base, ceiling = (pair_means(rows, name, 0).mean() for name in ("base", "ceiling"))
    support = pair_means(rows, "base", 0, "support").mean()
    for way in config["ways"]:
        cells = []
        for size in sizes:
            shares = recovered(rows, way, size)
            if shares is None:
                cells.append("")
                continue
            mean, low, high = bootstrap(100 * shares)
            kept = pair_means(rows, way, size, "support")
            cells.append(f"{mean:.0f} [{low:.0f}, {high:.0f}]" + (f", {100 * kept.mean():.0f}" if len(kept) else ""))
        table.append(f"| {way} | " + " | ".join(cells) + " |")
    facts = (
        f"New base {100 * base:.1f} %, its own fine-tune {100 * ceiling:.1f} %, support {100 * support:.1f} %. "
        "Recovered share in percent with its interval over pairs, then the support that is kept."
    )
    return [facts, "", *table]


def _comparisons(config, rows):
    """Whether one way beats another: in accuracy as they come, and where both keep the same support."""
    sizes = [size for size in config["sizes"] if any(row["size"] == size for row in rows)]
    table = [
        "| difference, points | " + " | ".join(f"n = {size}" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for ours, theirs in config["comparisons"]:
        plain = [_difference(rows, ours, theirs, size) for size in sizes]
        equal = [at_equal_support(rows, ours, theirs, size) for size in sizes]
        for name, cells in ((f"{ours} less {theirs}", plain), ("the same at equal support", equal)):
            table.append(f"| {name} | {' | '.join('' if c is None else _interval(c) for c in cells)} |")
    return ["Difference of the accuracies with its interval over pairs.", "", *table]


def _difference(rows, ours, theirs, size):
    pairs = [pair_means(rows, way, size) for way in (ours, theirs)]
    return bootstrap(pairs[0] - pairs[1]) if all(map(len, pairs)) else None


def _interval(found):
    mean, low, high = (100 * x for x in found)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
