"""`jaxtune demo`: the whole story on embedded data, as a table and a page."""

import dataclasses
from pathlib import Path

from jaxtune.checkpoint import refuse_existing
from jaxtune.checkpoint.output import write_extra_files
from jaxtune.checkpoint.publish import publish
from jaxtune.demo.models import copy_models, load_embedded, train_from_scratch
from jaxtune.demo.story import SCALES, TARGETS, WEIGHTS, Story, num_stages, tell_story
from jaxtune.interpolate.barrier import measure_barrier
from jaxtune.report.evidence import evidence_section
from jaxtune.report.page import Section, render_page
from jaxtune.report.plots import plot_bars, plot_lines
from jaxtune.report.run import Run, describe_host, to_json
from jaxtune.report.table import count_bytes, percent, render_table
from jaxtune.train.progress import Progress

SCRATCH = Path("runs") / "demo_models"
COLUMNS = {"name": "", "task": "digits", "support": "glyphs", "recovered": "recovered", "seconds": "seconds"}
INTRODUCTION = (
    "An old base knows drawn digits and letters; its fine-tune reads real handwritten digits. The fine-tune is "
    "carried, without data and without training, to a newer release of the base and to a base from another seed. "
    "Digits is the accuracy on held-out handwritten digits, glyphs the accuracy on what the new base could do "
    "before; recovered is the share of the gain that fine-tuning the new base itself would bring."
)


def run(arguments) -> None:
    """Prints the table; with `--out`, writes the page, the numbers and the models too."""
    if arguments.out:
        refuse_existing(arguments.out, overwrite=arguments.overwrite)
    work = Run("demo")
    with work.stage("models"):
        models = train_from_scratch(SCRATCH) if arguments.from_scratch else load_embedded()
    with Progress(num_stages(), "demo") as progress:
        story = tell_story(models, progress=progress.update)
    report = {
        "command": "demo",
        "specialist": story.specialist,
        "rows": [dataclasses.asdict(row) for row in story.rows],
        "chosen": story.chosen,
        "evidence": {target: evidence.as_dict() for target, evidence in story.evidence.items()},
        "scales": SCALES,
        "sweeps": story.sweeps,
        "weights": WEIGHTS,
        "lines": story.lines,
        "host": describe_host(),
        "cost": work.cost(),
    }
    print(_as_text(story))
    cost = report["cost"]
    print(f"\n{cost['seconds']['total']:.0f} s, peak memory {count_bytes(cost['peak_memory_bytes'])}.")
    if arguments.out:
        page, overview = _page(story, report), _overview(story)
        with publish(arguments.out, overwrite=arguments.overwrite) as folder:
            texts = {"report.json": to_json(report), "report.html": page, "overview.svg": overview}
            write_extra_files(folder, {name: text.encode() for name, text in texts.items()})
            copy_models(models, folder / "models")
        print(f"Open {arguments.out}/report.html; the checkpoints are in {arguments.out}/models.")


def _table_rows(story: Story, target):
    rows = []
    for row in story.rows:
        if row.target != target:
            continue
        name = f"auto: {story.chosen[target]}" if row.name == "auto" else row.name
        rows.append(
            {
                "name": {"control": f"control: {name}"}.get(row.kind, name),
                "task": percent(row.task),
                "support": percent(row.support),
                "recovered": percent(row.recovered, 0),
                "seconds": "" if row.seconds is None else f"{row.seconds:.1f}",
            }
        )
    return rows


def _as_text(story: Story):
    parts = [
        f"The fine-tune of the old base: digits {percent(story.specialist['task'])}, "
        f"glyphs {percent(story.specialist['support'])}."
    ]
    for target, words in TARGETS.items():
        lineage = story.evidence[target].lineage
        parts.append(f"\nCarried to {words} (lineage read off the weights: {lineage.verdict})")
        parts.append(render_table(COLUMNS, _table_rows(story, target)))
    return "\n".join(parts)


def _overview(story: Story):
    """Handwritten digits after the transport, both new bases side by side."""
    by_target = {target: [row for row in story.rows if row.target == target] for target in TARGETS}
    return plot_bars(
        "Handwritten digits read right, without data and without training",
        [row.name for row in by_target["release"]],
        {words: [row.task for row in by_target[target]] for target, words in TARGETS.items()},
        y_label="accuracy",
        lines={"the old base's own fine-tune": story.specialist["task"]},
    )


def _page(story: Story, report):
    sections = [Section("What this is", [INTRODUCTION], figures=[_overview(story)])]
    for target, words in TARGETS.items():
        evidence = story.evidence[target]
        mine = [row for row in story.rows if row.target == target]
        bars = plot_bars(
            f"Accuracy on {words}",
            [row.name for row in mine],
            {"handwritten digits": [row.task for row in mine], "drawn glyphs": [row.support for row in mine]},
            y_label="accuracy",
        )
        sweep = plot_lines(
            "Scale of the task vector (validation digits)",
            SCALES,
            story.sweeps[target],
            x_label="scale",
            y_label="accuracy",
        )
        line = plot_lines(
            "Loss on drawn glyphs along the line from the old base to the new one",
            WEIGHTS,
            story.lines[target],
            x_label="weight of the new base",
            y_label="loss, nats",
        )
        barriers = [
            f"{name} {measure_barrier(WEIGHTS, losses).height:.2f}" for name, losses in story.lines[target].items()
        ]
        barrier_words = f"Barrier on the line from the old base, in nats: {', '.join(barriers)}."
        sections.append(
            Section(f"Carried to {words}", [barrier_words], COLUMNS, _table_rows(story, target), [bars, sweep, line])
        )
        for part in evidence_section(evidence.as_dict(), None):
            sections.append(dataclasses.replace(part, title=f"{part.title}: {words}"))
    return render_page("jaxtune demo", sections)
