"""One self-contained HTML page from sections: words, tables, figures."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 0.8rem 0; } th, td { padding: 0.2rem 0.7rem; text-align: left; }
th { border-bottom: 1px solid #888; } td { border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }
.verdict { background: #f3f6fa; border-left: 4px solid #3b6fb6; padding: 0.6rem 1rem; }
svg { max-width: 100%; height: auto; } code { background: #f4f4f4; padding: 0 0.2rem; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Heading.
        words: Paragraphs before the rest; a paragraph that starts with "!" is set off as a verdict.
        columns, rows: A table as for `render_table`; none where `rows` is empty.
        figures: SVG texts, as `report.plots` makes them.
    """

    title: str
    words: Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Mapping[str, object]] = ()
    figures: Sequence[str] = ()


def render_page(title: str, sections: Sequence[Section]) -> str:
    """The page as text. Everything but the figures is escaped: names come from strangers' files."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for paragraph in section.words:
            mark = ' class="verdict"' if paragraph.startswith("!") else ""
            parts.append(f"<p{mark}>{html.escape(paragraph.removeprefix('!').strip())}</p>")
        if section.rows:
            parts.append(_render_table(section.columns, section.rows))
        parts.extend(section.figures)
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _render_table(columns, rows):
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(row.get(key)))}</td>" for key in columns) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
