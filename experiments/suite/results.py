"""The tables of a comparison of merges: means over seeds with their spread, per task, plain beside stress."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from experiments.workdir import Workdir


def write_results(workdir: Workdir, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Leaves merge.json (every row) and merge.md (the tables) in the workdir, and prints the tables."""
    page = render_page(config, rows)
    versions = {name: version(name) for name in ("jaxtune", "jax", "numpy")}
    result = {"config": config, "versions": {"python": platform.python_version(), **versions}, "rows": list(rows)}
    workdir.publish_text("merge.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    workdir.publish_text("merge.md", page)
    print(page)


def render_page(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One table a scenario, and one of the single tasks, best first."""
    lines = []
    for scenario in config["scenarios"]:
        ours = [row for row in rows if row["scenario"] == scenario]
        lines += [f"### {scenario}", "", *_summary_table(ours), "", *_task_table(ours), ""]
    return "\n".join(lines)


def _summary_table(rows):
    table = [
        "| method | own defaults | scale by validation | normalised | scale | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in _by_method(rows):
        best = [row.get("scaled", row) for row in group]
        scales = sorted({row["scaled"]["scale"] for row in group if "scaled" in row})
        table.append(
            f"| {name} | {_spread([row['accuracy'] for row in group])} "
            f"| {_spread([row['accuracy'] for row in best]) if 'scaled' in group[0] else ''} "
            f"| {_spread([row['mean_of_ratios'] for row in best])} "
            f"| {', '.join(f'{scale:g}' for scale in scales)} | {np.median([row['seconds'] for row in group]):.1f} |"
        )
    return table


def _task_table(rows):
    names = list(rows[0]["tasks"])
    table = [f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for name, group in _by_method(rows):
        best = [row.get("scaled", row)["tasks"] for row in group]
        cells = (f"{100 * np.mean([accuracies[task] for accuracies in best]):.1f}" for task in names)
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def _by_method(rows):
    """(method, its rows), references first, then by accuracy with the chosen scale."""
    groups = {name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}

    def place(item):
        is_method = item[1][0]["kind"] != "reference"
        return is_method, -np.mean([row.get("scaled", row)["accuracy"] for row in item[1]]) if is_method else 0

    return sorted(groups.items(), key=place)


def _spread(values):
    """Mean and standard deviation over seeds, in percent."""
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"
