"""Tables of a report as Markdown."""

import math

from lenvm_lightning.evaluation.report import as_rows
from lenvm_lightning.evaluation.results import Column, Measure, Table, TableRow


def test_a_table_is_one_in_markdown():
    """Every rule cell needs a dash, and nothing in a cell may end it."""
    rows = [TableRow({"word": "`|`"}, {"z": Measure(2.0, 0.5), "gain": Measure(0.5, None, -0.25, 1.0)}, 3, 1)]
    rows += [TableRow({"word": "b"}, {"z": Measure(1.0, math.nan)}, 12345, 1)]
    columns = [Column("z", "z", "up", "+.1f"), Column("gain", "gain", "down", ".2f"), Column("none", "none")]
    head, rule, *body = as_rows(Table("t", columns, rows))
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["word", "n", "z ↑", "gain ↓"]
    assert all(set(cell.strip()) <= {"-", ":"} and "-" in cell for cell in rule.strip("|").split("|"))
    cells = [cell.strip() for cell in body[0].replace(r"\|", "/").strip("|").split("|")]
    assert cells == ["`/`", "3", "+2.0 ± 0.5", "0.50 [-0.25, 1.00]"]
    assert [cell.strip() for cell in body[1].strip("|").split("|")] == ["b", "12,345", "+1.0", ""]
    for narrow in ([TableRow({"N": "1"}, {}, 1, 1)], [TableRow({}, {}, 1, 1)]):
        rule = as_rows(Table("t", [], narrow))[1]
        assert all("-" in cell for cell in rule.strip("|").split("|"))


def test_a_table_without_rows_says_so():
    assert as_rows(Table("t", [Column("z", "z")], [])) == ["Nothing."]


def test_words_of_completions_cannot_write_on_the_terminal():
    rows = as_rows(Table("t", [], [TableRow({"word": "\x1b]0;owned\x07\u202e" + "x" * 1000}, {}, 1, 1)]))
    assert all(row.isprintable() and len(row) < 300 for row in rows)
    assert r"\x1b]0;owned\x07\u202ex" in rows[2]
