"""The form of ``results.json``: typed, versioned, the same whenever the same is measured.

Speeds are not in it: they differ from run to run, and stand in the report.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT = 1


@dataclass(frozen=True)
class Measure:
    """A number.

    Attributes:
        value: None where it is not known, such as a log-probability from a server that gives none.
        error: its standard error with questions as the unit; None where it has none.
        low: lower end of its 95% interval, where one was computed.
        high: its upper end.
    """

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Column:
    """What a column of a table holds.

    Attributes:
        name: key in the rows, with the unit where it has one.
        title: for people.
        better: up or down; None where neither is.
        form: format of its numbers, such as ``.3f``.
    """

    name: str
    title: str
    better: Literal["up", "down"] | None = None
    form: str = ".3f"


@dataclass(frozen=True)
class TableRow:
    """A line of a table.

    Attributes:
        label: what it is of, such as ``{"system": "base", "N": "64"}``; the same keys in every row of a table.
        measures: by the names of the columns; one that is missing does not apply.
        samples: completions that it is made from.
        questions: questions that these answer.
    """

    label: dict[str, str]
    measures: dict[str, Measure]
    samples: int
    questions: int


@dataclass(frozen=True)
class Table:
    """Rows that are compared.

    Attributes:
        title: for people.
        columns: in their order.
        rows: in their order.
        notes: what to know before believing it.
    """

    title: str
    columns: list[Column]
    rows: list[TableRow]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        task: its name.
        task_version: counted up whenever the same samples would give other numbers.
        tiny_world: True = models or questions are this package's own laboratory.
        questions: asked.
        questions_of: there are; in the tiny world, which has no end of them, so many as are asked without a limit.
        completions: samples that are there.
        failed: completions that could not be had.
        provenance: models, checkpoints, gamma, seed, sampling, versions.
        tables: what was measured.
        curves: points of the plots, JSON values.
    """

    task: str
    task_version: int
    tiny_world: bool
    questions: int
    questions_of: int | None
    completions: int
    failed: int
    provenance: dict[str, Any]
    tables: list[Table]
    curves: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; numbers that are no numbers are null."""
        return {"format": FORMAT, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Results":
        """Read what `as_dict` wrote.

        Raises:
            ValueError: another format.
        """
        if content.get("format") != FORMAT:
            raise ValueError(f"results of format {content.get('format')!r}, this version reads {FORMAT}")
        given = {key: value for key, value in content.items() if key != "format"}
        tables = [
            Table(
                table["title"],
                [Column(**column) for column in table["columns"]],
                [
                    TableRow(**{**row, "measures": {name: Measure(**one) for name, one in row["measures"].items()}})
                    for row in table["rows"]
                ],
                table["notes"],
            )
            for table in given.pop("tables")
        ]
        return cls(tables=tables, **given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    plain = value.item() if hasattr(value, "item") else value  # a number of numpy
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain  # JSON has none of those
