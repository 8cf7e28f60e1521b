"""`jaxtune methods`: what can be done, with which options."""

import json

from jaxtune.align.registry import METHODS as ALIGN_METHODS
from jaxtune.compose.registry import METHODS as COMPOSE_METHODS
from jaxtune.merge.registry import METHODS as MERGE_METHODS
from jaxtune.report.table import render_table
from jaxtune.transport.registry import METHODS as TRANSPORT_METHODS

KINDS = {"align": ALIGN_METHODS, "transport": TRANSPORT_METHODS, "merge": MERGE_METHODS, "compose": COMPOSE_METHODS}


def run(arguments) -> None:
    """Prints every method as a table, or as JSON: {kind: {method: {summary, options, data, reference}}}."""
    if arguments.json:
        facts = {kind: {name: _describe(method) for name, method in table.items()} for kind, table in KINDS.items()}
        print(json.dumps(facts, indent=2))
        return
    for kind, table in KINDS.items():
        print(f"{kind} methods")
        rows = [{"name": name, **_describe(method)} for name, method in table.items()]
        columns = {"name": "method", "summary": "what it does", "data": "data", "reference": "reference"}
        print(render_table(columns, rows))
        for row in rows:
            if row["options"]:
                print(f"  {row['name']}: " + ", ".join(f"{name}={value}" for name, value in row["options"].items()))
        print()
    print("Give options to align and transport as -o NAME=VALUE; those of merge stand under parameters of a recipe,")
    print("and so do those of compose, whose methods need a data: block there (docs/merge.md), or jaxtune.compose.")


def _describe(method):
    return {
        "summary": method.summary,
        "options": method.options,
        "data": method.data,
        "reference": method.reference,
    }
