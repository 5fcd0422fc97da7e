"""The report of a benchmark: tables of figures, as plain data.

`chart` draws reports, `page` writes them as Markdown, and they are stored as JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from fitloop._format import Table as TextTable

ABSENT = "not installed; pip install '.[peers]' in the checkout"
"""end of the reason of a contender whose package is missing"""
WIDTH = 100
"""columns of a paragraph"""


def method_of(docstring: str | None) -> str:
    """Return a benchmark's docstring without its first paragraph, in one line."""
    return " ".join((docstring or "").split("\n\n", 1)[1].split())


OUTDATED = "to be measured again"
"""name of the note of a stored report that says how the benchmark has changed since"""


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def divided_by(self, count: int) -> Spread:
        return Spread(self.median / count, self.low / count, self.high / count)

    def text(self, digits: int, *, ranged: bool = True) -> str:
        if not ranged or self.low == self.high:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f}  ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every row."""

    name: str
    unit: str
    digits: int = 1
    better: str = "less"
    """``"less"``, ``"more"``, or ``""`` if neither is better"""
    ranged: bool = True
    """whether the smallest and the largest value are shown with the median"""

    @property
    def head(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender."""

    name: str
    figures: dict[str, Spread]
    """by the name of the column; a contender may lack some columns"""
    ours: bool = False
    """whether the contender is fitloop, which has its own colour in charts"""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """The limit that the median of one figure is to keep."""

    row: str
    column: str
    limit: float
    """the largest value, or the smallest where more is better"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Contenders that were measured in the same rounds."""

    title: str
    columns: list[Column]
    rows: list[Row]
    chart: str = ""
    """name of the column that is drawn as bars; empty for no chart"""
    heat: list[str] = field(default_factory=list)
    """names of the columns that are drawn as a map of coloured cells; 1 is the ideal"""
    notes: list[str] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """The notes, and for each aim a line that says whether it was reached."""
        return [*self.notes, *map(self._judgement, self.aims)]

    def _judgement(self, aim: Aim) -> str:
        column = next(column for column in self.columns if column.name == aim.column)
        bound = "at least" if column.better == "more" else "at most"
        text = f"Aim for {aim.row}, {aim.column}: {bound} {aim.limit:g} {column.unit}".rstrip()
        for row in self.rows:
            if row.name == aim.row:
                difference = row.figures[aim.column].median - aim.limit
                is_missed = difference < 0 if column.better == "more" else difference > 0
                return f"{text}; {'missed' if is_missed else 'reached'}."
        return f"{text}; not measured."

    def text(self) -> str:
        heads = ["", *(column.head for column in self.columns)]
        rows = [[row.name, *self.cells(row)] for row in self.rows]
        return "\n".join([self.title, TextTable(heads, rows).text(), *self.remarks])

    def cells(self, row: Row) -> list[str]:
        """Return the figures of a row as text; a missing figure is an empty text."""
        return [
            row.figures[column.name].text(column.digits, ranged=column.ranged)
            if column.name in row.figures
            else ""
            for column in self.columns
        ]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one benchmark."""

    name: str
    question: str
    """the question that the benchmark answers"""
    method: str
    """how the figures are measured, in a few sentences"""
    tables: list[Table]
    machine: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    """contender -> reason why it is in no table"""
    notes: dict[str, str] = field(default_factory=dict)
    """contender -> remark on how it is used"""

    def text(self) -> str:
        parts = [f"== {self.name}: {self.question}", *(table.text() for table in self.tables)]
        if self.skipped:
            parts.append(fill(f"skipped: {_grouped(self.skipped)}", WIDTH))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Return the report from the result of `to_dict`."""
        return cls(**{**data, "tables": [_table(table) for table in data["tables"]]})


def _grouped(skipped: Mapping[str, str]) -> str:
    """Return the skipped contenders as text, grouped by their reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(ABSENT if reason.endswith(ABSENT) else reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


def _table(data: dict[str, Any]) -> Table:
    columns = [Column(**column) for column in data["columns"]]
    rows = [
        Row(
            **{
                **row,
                "figures": {name: Spread(**spread) for name, spread in row["figures"].items()},
            }
        )
        for row in data["rows"]
    ]
    aims = [Aim(**aim) for aim in data.get("aims", ())]
    return Table(**{**data, "columns": columns, "rows": rows, "aims": aims})
