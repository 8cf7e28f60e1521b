"""Tables for a terminal: plain text, columns aligned."""

from collections.abc import Mapping, Sequence


def render_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as aligned text under a header and a rule.

    Args:
        columns: Key -> heading, in order. A key that a row lacks is left blank.
        rows: Values by key. Numbers and words ending in a digit or "%" go to the right.

    Returns:
        Lines joined by newlines, without one at the end.
    """
    cells = [[_text(row.get(key, "")) for key in columns] for row in rows]
    headings = list(columns.values())
    widths = [max(len(line[n]) for line in [headings, *cells]) for n in range(len(headings))]
    to_right = [bool(cells) and all(_is_number(line[n]) for line in cells) for n in range(len(headings))]

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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text):
    return not text or text.rstrip(" %").lstrip("+-").replace(".", "", 1).replace("e", "", 1).isdigit()
