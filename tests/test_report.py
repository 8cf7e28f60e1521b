"""Tables, pages, figures and report.json: aligned, escaped, strict, the same bytes for the same numbers."""

import itertools
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxtune.evaluate.equivalence import compare_outputs
from jaxtune.report import plots
from jaxtune.report.evidence import ADVICE, evidence_rows, evidence_section
from jaxtune.report.page import Section, render_page
from jaxtune.report.run import Run, describe_host, peak_memory, to_json
from jaxtune.report.table import count_bytes, percent, render_table

HOSTILE = ["<script>alert(1)</script>", "--><b>", "a & b", '" onload="x', "'", "</svg>", "]]>", "$x^{$", "\\frac{"]


def test_a_table_is_aligned():
    rows = [
        {"name": "old base", "accuracy": 0.5, "left": "words"},
        {"name": "new", "accuracy": 0.123456},
        {"name": "a longer name", "accuracy": None, "left": None},
    ]
    assert render_table({"name": "model", "accuracy": "accuracy", "left": ""}, rows).split("\n") == [
        "model          accuracy",
        "-------------  --------  -----",
        "old base            0.5  words",
        "new              0.1235",
        "a longer name",
    ]


@pytest.mark.parametrize(
    ("values", "is_right"),
    [
        ([1, 22], True),
        ([1.5, None], True),
        ([1e-05, 123.0], True),
        ([1e20, -3.0], True),
        ([float("nan"), 1.0], True),
        ([float("-inf"), 1], True),
        (["12.3 %", "5%"], True),
        (["+1", "-1"], True),
        ([1, "one"], False),
        (["1.2.3", 1], False),
        (["11.8 MiB", 1], False),
        (["e", 1], False),
        (["1 %%", 1], False),
        ([True, 1], False),
    ],
)
def test_columns_of_numbers_go_to_the_right(values, is_right):
    width = 12
    lines = render_table({"x": "x" * width}, [{"x": value} for value in values]).split("\n")[2:]
    if is_right:
        assert all(len(line) == width for line in lines if line)
    else:
        assert all(not line.startswith(" ") for line in lines)


def test_a_table_without_rows_is_its_heading():
    assert render_table({"a": "one", "b": "two"}, []) == "one  two\n---  ---"


def test_names_cannot_move_the_cursor_or_break_the_columns():
    table = render_table({"name": "name", "n": "n"}, [{"name": "a\x1b[2Jb\nc\td", "n": 1}, {"name": "x", "n": 2}])
    assert "\x1b" not in table
    assert table.count("\n") == 3
    assert "a\\x1b[2Jb\\nc\\td" in table
    assert len({len(line) for line in table.split("\n")}) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12345678, "11.8 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_in_words(number, text):
    assert count_bytes(number) == text
    assert count_bytes(np.int64(number)) == text


def test_percent_in_words():
    assert percent(0.123) == "12.3 %"
    assert percent(0.1239, 2) == "12.39 %"
    assert percent(None) == ""
    assert percent(-0.5, 0) == "-50 %"


class Page(HTMLParser):
    """What a browser would see: tags, the text of cells and headings, attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells, self.inside = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.inside, f"never closed: {self.inside}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.inside.append(tag)
            self.cells.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside and self.inside[-1] != "style":
            self.cells[self.inside[-1]][-1] += data


def test_a_page_escapes_every_name():
    everything = " ".join(HOSTILE)
    rows = [{"a": name, everything: n} for n, name in enumerate(HOSTILE)]
    columns = {"a": everything, everything: "n"}
    page = Page(render_page(everything, [Section(everything, ["!" + everything, everything], columns, rows)]))
    assert set(page.tags) == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert page.attributes == [("lang", "en"), ("charset", "utf-8"), ("class", "verdict")]
    assert page.cells["title"] == page.cells["h1"] == page.cells["h2"] == [everything]
    assert page.cells["p"] == [everything] * 2
    assert page.cells["th"] == [everything, "n"]
    assert page.cells["td"] == [text for n, name in enumerate(HOSTILE) for text in (name, str(n))]


def test_a_page_shows_missing_values_as_blanks_and_figures_as_they_are():
    figure = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    sections = [
        Section("t", [], {"a": "a", "b": "b"}, [{"a": None}, {"a": 0.123456, "b": 7}], [figure]),
        Section("no rows", ["words"], {"a": "a"}, []),
    ]
    text = render_page("title", sections)
    assert Page(text).cells["td"] == ["", "", "0.1235", "7"]
    assert Page(text).tags.count("table") == 1
    assert figure in text
    assert "http" not in text.replace(figure, ""), "the page must be self-contained"
    assert text == render_page("title", sections)


def test_json_is_strict():
    values = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "minus_inf": -np.inf,
        "float32": np.float32(0.5),
        "int64": np.int64(2**40),
        "bool": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "tuple": (1, (2.5, None)),
        3: {"nested": [np.float16(1.5), "ü"]},
    }

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = to_json(values)
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=refuse) == {
        "nan": "nan",
        "inf": "inf",
        "minus_inf": "-inf",
        "float32": 0.5,
        "int64": 2**40,
        "bool": True,
        "array": [[1.0, "nan"]],
        "tuple": [1, [2.5, None]],
        "3": {"nested": [1.5, "ü"]},
    }
    assert list(json.loads(text)) == [str(key) for key in values], "keys in the order given"
    assert to_json(values) == text


def test_json_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="set"):
        to_json({"a": {1, 2}})


def svg_of(text):
    """The parsed figure; no script, no handler, nothing but drawing."""
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        assert not element.tag.lower().endswith(("script", "image", "foreignobject")), element.tag
        assert not any(name.lower().startswith("on") for name in element.attrib)
    return root


def bars(values=(0.1, 0.9, float("nan"))):
    return plots.plot_bars("title", ["a", "b", "c"], {"s": values, "t": [1, 2, 3]}, y_label="y", lines={"l": 0.5})


def lines(values=(0.1, 0.9, 0.3)):
    return plots.plot_lines("title", [0, 0.5, 1], {"s": values, "t": [3, 2, 1]}, x_label="x", y_label="y")


@pytest.mark.parametrize("draw", [bars, lines])
def test_figures_are_well_formed_and_the_same_for_the_same_numbers(draw):
    text = draw()
    svg_of(text)
    assert text == draw()
    assert text != draw((0.2, 0.9, 0.3))
    assert "<dc:date>" not in text


def test_the_same_bytes_in_another_process():
    program = (
        "from jaxtune.report.plots import plot_lines\n"
        "import sys\n"
        "sys.stdout.write(plot_lines('title', [0, 0.5, 1], {'s': (0.1, 0.9, 0.3), 't': [3, 2, 1]},"
        " x_label='x', y_label='y'))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout == lines()


def test_hostile_names_stay_names_in_figures():
    values = list(range(len(HOSTILE)))
    title = " ".join(HOSTILE)
    for text in (
        plots.plot_bars(title, HOSTILE, dict.fromkeys(HOSTILE, values), y_label=title, lines={title: 1.0}),
        plots.plot_lines(title, values, dict.fromkeys(HOSTILE, values), x_label=title, y_label=title),
    ):
        svg_of(text)
        assert "<script" not in render_page("t", [Section("s", figures=[text])])


def test_bars_stand_side_by_side():
    root = svg_of(plots.plot_bars("t", ["a", "b"], {"s": [1, 2], "t": [2, 1], "u": [3, 3]}, y_label="y"))
    paths = [path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("clip-path")]
    bars = [path for path in paths if any(f"fill: {colour}" in path.get("style", "") for colour in plots.COLOURS)]
    assert len(bars) == 6
    corners = [[float(x) for x in re.findall(r"[ML] (\S+) ", path.get("d"))] for path in bars]
    spans = sorted((min(xs), max(xs)) for xs in corners)
    assert all(ours[1] <= theirs[0] + 1e-6 for ours, theirs in itertools.pairwise(spans))


EVIDENCE = {
    "objective": {"identity": 1.0, "found": 2.0, "random": [0.5, 0.7]},
    "cosine": {"identity": 0.1, "found": 0.25, "random": [0.0, 0.02]},
    "agreement": {
        f"block_{n}/{name}": {"identity": 0.1, "found": 0.2, "random": 0.0} for n, name in enumerate(HOSTILE)
    },
    "residual": {"identity": 1.4, "found": 1.2},
    "coherence": 1.0,
    "lineage": {"verdict": "unrelated", "is_in_place": False, "reason": "cosine <0.1 & falling"},
}


@pytest.mark.parametrize("has_plots", [False, True])
@pytest.mark.parametrize("verdict", list(ADVICE))
def test_evidence_becomes_a_page(verdict, has_plots, monkeypatch):
    monkeypatch.setattr("jaxtune.report.evidence.has_plots", lambda: has_plots)
    outputs = np.array([[0.0, 1.0], [2.0, -1.0]], np.float32)
    equivalence = compare_outputs(outputs, outputs).as_dict()
    evidence = {**EVIDENCE, "lineage": {**EVIDENCE["lineage"], "verdict": verdict}}
    text = render_page("t", evidence_section(evidence, equivalence))
    assert ("<svg" in text) == has_plots
    if not has_plots:
        page = Page(text)
        assert page.cells["p"] == [f"Lineage: {verdict}. {ADVICE[verdict]} (cosine <0.1 & falling)"]
        assert [cell for cell in page.cells["td"] if cell.startswith("block_")] == list(EVIDENCE["agreement"])


def test_evidence_rows_say_what_was_measured():
    def value_of(what, rows):
        (row,) = [row for row in rows if row["what"].strip().startswith(what)]
        return row["value"]

    rows = evidence_rows(EVIDENCE, None)
    assert value_of("lineage", rows) == "unrelated"
    assert value_of("cosine of random", rows) == "0.010 ± 0.014"  # sample deviation of 0 and 0.02
    assert value_of("matching objective, random", rows) == "0.6 ± 0.1414"
    assert value_of("cosine in place", rows) == "0.100 / 0.250"
    assert not any("moved" in row["what"] for row in rows)
    in_place = {**EVIDENCE, "lineage": {"verdict": "related", "is_in_place": True, "reason": ""}}
    assert value_of("lineage", evidence_rows(in_place, None)) == "related (in place)"
    outputs = np.array([[0.0, 1.0], [2.0, -1.0]], np.float32)
    assert (
        value_of("moved", evidence_rows(EVIDENCE, compare_outputs(outputs, outputs).as_dict())) == "the same function"
    )
    other = evidence_rows(EVIDENCE, compare_outputs(outputs, -outputs).as_dict())
    assert value_of("moved", other) == "NOT the same function"
    assert value_of("KL", other).endswith(", 0 %")


def test_evidence_without_a_matrix_is_still_a_page():
    text = render_page("t", evidence_section({**EVIDENCE, "agreement": {}}, None))
    assert "How far to trust it" in text


def test_a_run_times_its_stages():
    work = Run("test")
    with work.stage("sleep"):
        time.sleep(0.02)
    with work.stage("sleep"):
        time.sleep(0.02)
    with pytest.raises(KeyError), work.stage("fails"):
        raise KeyError
    seconds = work.cost()["seconds"]
    assert list(seconds) == ["sleep", "fails", "total"]
    assert 0.04 <= seconds["sleep"] <= seconds["total"]


def test_peak_memory_is_this_process_in_bytes():
    before = peak_memory()
    assert 20 * 2**20 < before < 64 * 2**30
    block = np.ones((before + 64 * 2**20 - current_memory()) // 8)  # more than was ever held
    after = peak_memory()
    assert before + 32 * 2**20 < after < before + 64 * 2**20 + block.nbytes
    assert Run("test").cost()["peak_memory_bytes"] >= after


def current_memory():
    """Resident size now, in bytes; 0 where the system does not say, and the block above is larger for it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except FileNotFoundError:
        return 0


def test_the_host_is_described_in_plain_values():
    host = describe_host()
    assert math.isfinite(host["num_devices"])
    assert host["num_devices"] >= 1
    assert json.loads(to_json(host)) == host
