"""Everything measured as one JSON file, a page of tables, and figures."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from experiments.rungs.summary import judge_verdict, summarise_pair, summarise_rung
from experiments.workdir import Workdir
from jaxtune.report.plots import has_plots, plot_lines, plot_points

CONTROLS = ("random element", "random vector of the same norms", "full with its layers shuffled", "2 shots a class")
LONG = ("pairs", "rows")
METHODS = ("auto", "identity", "orthogonal_shift", "permutation", "transfusion", "full")


def write_results(
    workdir: Workdir,
    config: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]],
    refusals: Mapping[str, Mapping[str, str]],
    transition: Sequence[Mapping[str, Any]],
) -> None:
    """Leaves ladder.json, ladder.md and, where matplotlib is there, the figures in the workdir.

    Args:
        workdir: Of the run.
        config: As it ran.
        measured: Per pair "model", "pair" and "rows" of `measure.measure_pair`.
        refusals: Model -> method -> what it says to a base of another width (L6).
        transition: Per pair "width", "num_steps", "pair" and "rows".
    """
    pairs = [{"model": one["model"], **one["pair"], "methods": summarise_pair(one["rows"])} for one in measured]
    rungs: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(pair["model"] for pair in pairs):
        ours = [pair for pair in pairs if pair["model"] == model]
        names = dict.fromkeys(pair["rung"] for pair in ours)
        rungs[model] = {name: summarise_rung([pair for pair in ours if pair["rung"] == name]) for name in names}
    cells = _summarise_cells(transition)
    result = {
        "config": config,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jaxtune", "jax", "numpy", "scipy")},
        },
        "rungs": rungs,
        "verdict": {
            "all": judge_verdict(pairs),
            **{model: judge_verdict([pair for pair in pairs if pair["model"] == model]) for model in rungs},
        },
        "other_width": refusals,
        "transition": cells,
        "pairs": pairs,
        "rows": [{"model": one["model"], **row} for one in measured for row in one["rows"]],
    }
    workdir.publish_text("ladder.json", dump_result(result))
    workdir.publish_text("ladder.md", render_page(result))
    if has_plots():
        for name, figure in draw_figures(result).items():
            workdir.publish_text(name, figure)
    print(render_page(result))


def dump_result(result: Mapping[str, Any]) -> str:
    """As JSON: "pairs" and "rows" one a line, the rest indented."""
    result = _rounded(result)
    short = {name: [] if name in LONG else value for name, value in result.items()}
    text = json.dumps(short, indent=1, allow_nan=False)
    for name in LONG:
        lines = ",\n".join(f"  {json.dumps(line, allow_nan=False)}" for line in result[name])
        text = text.replace(f'"{name}": []', f'"{name}": [\n{lines}\n ]' if lines else f'"{name}": []')
    return text + "\n"


def render_page(result: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = []
    for model, rungs in result["rungs"].items():
        lines += [f"### {model}", "", _rung_table(rungs), "", _middle_table(rungs), ""]
        lines += [_variant_table(rungs), ""] if result["config"]["variants"] else []
    lines += ["### What the weights alone say", "", _verdict_table(result["verdict"]), ""]
    if result["transition"]:
        lines += ["### Which bases can be connected", "", _transition_table(result["transition"]), ""]
    for model, answers in result["other_width"].items():
        accepted = [method for method, answer in answers.items() if answer == "accepted"]
        lines.append(f"L6, another width, {model}: accepted by {', '.join(accepted) or 'no method (each refuses it)'}.")
    return "\n".join(lines) + "\n"


def draw_figures(result: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    figures = {}
    for model in result["rungs"]:
        ours = [pair for pair in result["pairs"] if pair["model"] == model]
        series = {
            method: (
                [pair["distance"] for pair in ours if pair["methods"][method]["recovered"] is not None],
                [
                    100 * p["methods"][method]["recovered"]
                    for p in ours
                    if p["methods"][method]["recovered"] is not None
                ],
            )
            for method in ("identity", "permutation", "transfusion", "full", "auto")
        }
        figures[f"ladder_{model}.svg"] = plot_points(
            f"Recovered share of the fine-tuning gain, {model} bases, one point per pair",
            series,
            x_label="distance of the bases, |B - A| / |A|",
            y_label="recovered, %",
        )
    if cells := result["transition"]:
        steps = list(dict.fromkeys(cell["num_steps"] for cell in cells))
        widths = list(dict.fromkeys(cell["width"] for cell in cells))

        def curves(value):
            at = {(cell["width"], cell["num_steps"]): value(cell) for cell in cells}
            return {f"width {width}": [at[width, num] for num in steps] for width in widths}

        for name, title, y_label, value in (
            (
                "barrier_identity",
                "Midpoint barrier of two seeds as they lie",
                "nats",
                lambda c: c["barrier"]["identity"],
            ),
            (
                "barrier_full",
                "Midpoint barrier of two seeds after full alignment",
                "nats",
                lambda c: c["barrier"]["full"],
            ),
            (
                "recovered",
                "What full carries between two seeds",
                "recovered, %",
                lambda c: math.nan if c["recovered"]["full"] is None else 100 * c["recovered"]["full"],
            ),
        ):
            figures[f"transition_{name}.svg"] = plot_lines(
                title, steps, curves(value), x_label="steps of pre-training", y_label=y_label
            )
    return figures


def _rung_table(rungs):
    header = [
        "rung",
        *METHODS,
        "random element",
        "random vector",
        "layers shuffled",
        "2 shots",
        "support of B",
        "of auto",
    ]
    rows = []
    for name, rung in rungs.items():
        shares = [_interval(rung["methods"].get(method, {}).get("recovered")) for method in (*METHODS, *CONTROLS)]
        support = [_percent(rung["methods"][method]["support"]) for method in ("base", "auto")]
        rows.append([name, *shares, *support])
    return _markdown(header, rows)


def _variant_table(rungs):
    """Options of methods beside the methods as they are: whatever no other table shows."""
    known = {*METHODS, "base", "ceiling", *CONTROLS}
    variants = [name for name in next(iter(rungs.values()))["methods"] if name not in known]
    rows = [
        [name, *(_interval(rung["methods"][method]["recovered"]) for method in ("full", *variants))]
        for name, rung in rungs.items()
    ]
    return _markdown(["rung", "full", *variants], rows)


def _middle_table(rungs):
    header = ["rung", "distance", "middle as they lie", "after permutation", "after full", "full - identity",
              "full - transfusion", "auto - identity", "verdicts", "auto chose"]  # fmt: skip
    rows = []
    for name, rung in rungs.items():
        middles = [
            f"{_percent(rung['middle_accuracy'][kind])}, {rung['barrier'][kind]:.2f} nats"
            for kind in ("identity", "permutation", "full")
        ]
        gains = [_interval(rung["differences"][f"{a} - {b}"]) for a, b in
                 (("full", "identity"), ("full", "transfusion"), ("auto", "identity"))]  # fmt: skip
        rows.append(
            [name, f"{rung['distance']:.2f}", *middles, *gains, _counts(rung["verdicts"]), _counts(rung["chosen"])]
        )
    return _markdown(header, rows)


def _verdict_table(verdicts):
    header = ["pairs of", "number", *(f"rank correlation: {name}" for name in verdicts["all"]["rank_correlation"]),
              "wrong advice of the lineage", "kin yet below half", "wrong advice of the residual"]  # fmt: skip
    rows = [
        [name, verdict["num_pairs"],
         *("" if value is None else f"{value:.2f}" for value in verdict["rank_correlation"].values()),
         _percent(verdict["wrong_advice"]["lineage"]), verdict["kin_but_not_worth"],
         _percent(verdict["wrong_advice"]["residual"])]
        for name, verdict in verdicts.items()
    ]  # fmt: skip
    return _markdown(header, rows)


def _transition_table(cells):
    header = ["width", "steps", "accuracy of a base", "barrier as they lie", "permutation", "full",
              "residual", "recovered: identity", "permutation", "transfusion", "full"]  # fmt: skip
    rows = [
        [cell["width"], cell["num_steps"], _percent(cell["base_accuracy"]),
         *(f"{cell['barrier'][kind]:.2f}" for kind in ("identity", "permutation", "full")), f"{cell['residual']:.2f}",
         *(_percent(cell["recovered"][kind]) for kind in ("identity", "permutation", "transfusion", "full"))]
        for cell in cells
    ]  # fmt: skip
    return _markdown(header, rows)


def _summarise_cells(transition):
    """Mean over the pairs of every width and length."""
    cells = []
    for width, num_steps in dict.fromkeys((one["width"], one["num_steps"]) for one in transition):
        ours = [one for one in transition if (one["width"], one["num_steps"]) == (width, num_steps)]
        rung = summarise_rung([{**one["pair"], "methods": summarise_pair(one["rows"])} for one in ours])
        cells.append(
            {
                "width": width,
                "num_steps": num_steps,
                "num_pairs": len(ours),
                "base_accuracy": sum(one["pair"]["target_accuracy"] for one in ours) / len(ours),
                "barrier": rung["barrier"],
                "middle_accuracy": rung["middle_accuracy"],
                "residual": sum(one["pair"]["residuals"][one["pair"]["chosen"]] for one in ours) / len(ours),
                "recovered": {
                    method: None if (share := rung["methods"][method]["recovered"]) is None else share[0]
                    for method in METHODS
                },
            }
        )
    return cells


def _markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _interval(value):
    """(mean, low, high) of shares -> "12 [9, 15]" in percent."""
    return "" if value is None else "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * number for number in value))


def _percent(value):
    return "" if value is None else f"{100 * value:.1f} %"


def _counts(names):
    return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names))


def _rounded(value):
    """Numbers to six digits, so that the file reads and differs by content."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
