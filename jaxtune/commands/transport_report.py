"""What `jaxtune transport` says of its work: a table, a page."""

import dataclasses

from jaxtune.report.evidence import ADVICE, evidence_rows, evidence_section
from jaxtune.report.page import Section, render_page
from jaxtune.report.table import count_bytes, percent, render_table

EXPECTED = (
    "The expected share is what arrived, at scale 1, between small vision transformers whose weights were left as far "
    "apart as these (docs/ladder.md in the repository). Your models may do better or worse: measure."
)
MEASURED_COLUMNS = {"model": "model", "task": "task accuracy", "support": "support accuracy"}


def _rows(report):
    method = report["method"]["name"]
    chosen = report["info"].get("chosen")
    cost, vector = report["cost"], report["task_vector"]
    rows = [
        {"what": "method", "value": f"{method}: {chosen}" if chosen else method},
        {"what": "scale", "value": f"{report['scale']:g}"},
        {"what": "task vector, share of the new base's norm", "value": percent(vector["relative_to_target"], 2)},
    ]
    rows += _example_rows(report)
    if report["expected"]:
        low, high = report["expected"]
        rows.append(
            {"what": "expected share of the fine-tuning gain", "value": f"{round(100 * low)} to {round(100 * high)} %"}
        )
    if report["evidence"]:
        rows += evidence_rows(report["evidence"], report["equivalence"])
    if report["evidence"] and report["equivalence"] is None and "num_sweeps" in report["info"]:
        rows.append({"what": "moved old base against old base", "value": "not checked: no network holds it"})
    if report["info"].get("full_refused"):
        rows.append({"what": "full was no candidate", "value": report["info"]["full_refused"]})
    if report["info"].get("lost"):
        worst, share = max(report["info"]["lost"].items(), key=lambda item: item[1])
        rows.append({"what": "lost on the way back, at most", "value": f"{percent(share)} ({worst})"})
    rows += _adapter_rows(report["adapter"])
    if "vocabulary" in report["info"]:
        words = report["info"]["vocabulary"]
        count = f"{words['num_shared_rows']} rows shared, {words['num_rows_left_as_they_are']} left as they are"
        rows.append({"what": "vocabulary", "value": f"{count}; {words['matched']['source']}"})
    seconds = cost["seconds"]
    rows.append(
        {"what": "time (of it alignment and evidence)", "value": f"{seconds['total']} s ({seconds['transport']} s)"}
    )
    rows.append({"what": "peak memory", "value": count_bytes(cost["peak_memory_bytes"])})
    return rows


def _example_rows(report):
    given = report["examples"]
    if given is None:
        return []
    seen = "with their labels" if given["are_labels_read"] else "labels not learned from"
    if not given["are_classes_known"]:
        seen = "no labels; outputs read as one a class (class_names in the file would name them)"
    rows = [{"what": "examples", "value": f"{given['num_examples']} of {given['data']}, {seen}"}]
    polish = report["info"].get("polish")
    if polish is not None:
        how = f"{polish['name']}, {polish['step']} steps at {polish['learning_rate']:.1e}"
        rows.append({"what": "polish", "value": "left out" if polish["verdict"] == "left out" else how})
        if polish["num_judges"]:
            before, after = polish["likeness"]
            what = f"exp(-divergence) from the fine-tune on {polish['num_judges']} examples held out in turn"
            seen = f"{before:.3f}, polished {after:.3f}: {polish['gain']:+.3f} ± {polish['gain_error']:.3f}"
            rows.append({"what": what, "value": seen})
            if "kept_gain" in polish:
                seen = f"{polish['kept_gain']:+.3f} ± {polish['kept_gain_error']:.3f}"
                rows.append({"what": "the same of the new base on examples to keep", "value": seen})
        else:
            rows.append(
                {"what": "judges of the polish", "value": "none: fewer than eight examples are all learned from"}
            )
    return rows


def _adapter_rows(adapter):
    if adapter is None:
        return []
    rows = [{"what": "adapter", "value": f"rank {adapter['rank']}, factors {adapter['factors']}"}]
    if "total_error" in adapter:
        rows.append({"what": "left out by the factors", "value": percent(adapter["total_error"], 2)})
    if adapter.get("not_held"):
        rows.append({"what": "held by no adapter", "value": ", ".join(sorted(adapter["not_held"]))})
    return rows


def _measured_rows(report):
    return [
        {"model": row["model"], "task": percent(row.get("task")), "support": percent(row.get("support"))}
        for row in report["measured"]
    ]


def summarise(report, out) -> str:
    """The text on the terminal."""
    parts = []
    if report["measured"]:
        parts += [render_table(MEASURED_COLUMNS, _measured_rows(report)), ""]
    parts.append(render_table({"what": "transport", "value": ""}, _rows(report)))
    if report["evidence"]:
        parts += ["", ADVICE[report["evidence"]["lineage"]["verdict"]], *([EXPECTED] if report["expected"] else [])]
    parts += report["doubts"]
    if not report["measured"]:
        parts.append("Nothing was measured on data; --evaluate DATA and --support DATA do.")
    if report["inputs"]["target"]["format"] == "torch":
        parts.append(
            "The new base is stored as pickles, which are never written: the result is safetensors of its names."
        )
    parts += ["", f"Written to {out}; open {out}/report.html for the evidence block by block."]
    return "\n".join(parts)


def make_page(report) -> str:
    """report.html."""
    sections = [Section("What was done", [], {"what": "", "value": ""}, _rows(report))]
    if report["measured"]:
        sections.append(
            Section("What it brought and what it cost", report["doubts"], MEASURED_COLUMNS, _measured_rows(report))
        )
    if report["evidence"]:
        sections[0] = dataclasses.replace(sections[0], words=[EXPECTED] if report["expected"] else [])
        sections += evidence_section(report["evidence"], report["equivalence"])
    inputs = [{"role": role, "path": row["path"], "format": row["format"]} for role, row in report["inputs"].items()]
    sections.append(Section("Inputs", [], {"role": "role", "path": "path", "format": "format"}, inputs))
    return render_page("jaxtune transport", sections)
