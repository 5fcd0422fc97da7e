"""What a benchmark gives back: rows of figures, with their spread, and what they were compared to.

Plain data: `chart` draws it, `page` writes it down, JSON keeps it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from fitloop._format import Table as TextTable

ABSENT = "not installed; pip install 'fitloop[peers]'"
"""how the reason ends for whom a package is missing"""
WIDTH = 100
"""columns of a paragraph"""


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the least and the most of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def over(self, count: int) -> Spread:
        """Return it divided by a count."""
        return Spread(self.median / count, self.low / count, self.high / count)

    def told(self, digits: int, *, ranged: bool = True) -> str:
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
    """``"less"`` or ``"more"``; ``""`` when it is neither"""
    ranged: bool = True
    """least and most are told with the median"""

    @property
    def head(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender."""

    name: str
    figures: dict[str, Spread]
    """by the name of the column; a contender may lack some"""
    ours: bool = False
    """it is fitloop, which a chart shows in its own colour"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Contenders that were measured in turns."""

    title: str
    columns: list[Column]
    rows: list[Row]
    chart: str = ""
    """name of the column that is drawn as bars; empty for none"""
    heat: list[str] = field(default_factory=list)
    """names of the columns that are drawn as a map of coloured cells; 1 is the ideal"""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        heads = ["", *(column.head for column in self.columns)]
        rows = [[row.name, *self.cells(row)] for row in self.rows]
        return "\n".join([self.title, TextTable(heads, rows).text(), *self.notes])

    def cells(self, row: Row) -> list[str]:
        """Return the figures of a row in words; an empty one where it has none."""
        return [
            row.figures[column.name].told(column.digits, ranged=column.ranged)
            if column.name in row.figures
            else ""
            for column in self.columns
        ]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark found."""

    name: str
    question: str
    """what it answers, in a sentence"""
    method: str
    """how, in as few sentences as make the figures mean something"""
    tables: list[Table]
    machine: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    """contender -> why it was not measured, in any of the tables"""
    notes: dict[str, str] = field(default_factory=dict)
    """contender -> what is different about it"""

    def text(self) -> str:
        parts = [f"== {self.name}: {self.question}", *(table.text() for table in self.tables)]
        if self.skipped:
            parts.append(fill(f"skipped: {_grouped(self.skipped)}", WIDTH))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Report:
        """Make it from what `to_dict` returned."""
        return cls(**{**found, "tables": [_table(table) for table in found["tables"]]})


def _grouped(skipped: Mapping[str, str]) -> str:
    """Return who was skipped, and why, in as few words as can be."""
    groups: dict[str, list[str]] = {}
    for name, why in skipped.items():
        groups.setdefault(ABSENT if why.endswith(ABSENT) else why, []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in groups.items())


def _table(found: dict[str, Any]) -> Table:
    columns = [Column(**column) for column in found["columns"]]
    rows = [
        Row(
            **{
                **row,
                "figures": {name: Spread(**spread) for name, spread in row["figures"].items()},
            }
        )
        for row in found["rows"]
    ]
    return Table(**{**found, "columns": columns, "rows": rows})
