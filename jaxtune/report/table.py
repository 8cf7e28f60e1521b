"""Tables for a terminal: plain text, columns aligned."""

import re
from collections.abc import Mapping, Sequence

# What `_text` and `percent` make of numbers; a column of nothing else is set to the right.
NUMBER = re.compile(r"([+-]?(\d+(\.\d+)?(e[+-]?\d+)?|inf|nan)( ?%)?)?")


def render_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as aligned text under a header and a rule.

    Args:
        columns: Key -> heading, in order. A key that a row lacks is left blank.
        rows: Values by key. Columns of nothing but numbers and percentages go to the right; what would move the
            cursor is shown escaped, since names come from strangers' files.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    cells = [[_text(row.get(key, "")) for key in columns] for row in rows]
    headings = list(columns.values())
    widths = [max(len(line[n]) for line in [headings, *cells]) for n in range(len(headings))]
    to_right = [bool(cells) and all(NUMBER.fullmatch(line[n]) for line in cells) for n in range(len(headings))]

    def join(line):
        columns = zip(line, widths, to_right, strict=True)
        return "  ".join(text.rjust(w) if right else text.ljust(w) for text, w, right in columns).rstrip()

    return "\n".join([join(headings), join(["-" * width for width in widths]), *map(join, cells)])


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3 %"; None -> ""."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def count_bytes(number: int) -> str:
    """12345678 -> "11.8 MiB"."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _text(value):
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
