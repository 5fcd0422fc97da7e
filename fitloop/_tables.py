"""Small tables, as text and as HTML: `Table`. Knows nothing of what is in them.

The HTML says no colours and runs no scripts, so that it suits dark themes, saved notebooks that
nobody trusted, and web pages that strip styles: what matters is in tags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fitloop._format import columns


@dataclass(frozen=True)
class Table:
    """Cells under heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """so many columns begin at the left; the others, of numbers, end at the right"""
    strong: Collection[int] = ()
    """rows that stand out: bold in HTML; as text the caller marks them in a cell"""

    def text(self) -> str:
        """Return the table as lines of aligned columns."""
        lines = [self.heads, *self.rows]
        widths = [max(columns(line[i]) for line in lines) for i in range(len(self.heads))]
        return "\n".join(
            "  ".join(self._aligned(i, cell, widths[i]) for i, cell in enumerate(line)).rstrip()
            for line in lines
        )

    def _aligned(self, column: int, cell: str, width: int) -> str:
        room = " " * (width - columns(cell))
        return f"{cell}{room}" if column < self.left else f"{room}{cell}"

    def html(self) -> str:
        """Return the table as HTML."""
        head = self._row("th", self.heads)
        rows = [self._row("td", row, strong=i in self.strong) for i, row in enumerate(self.rows)]
        return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"

    def _row(self, tag: str, cells: Sequence[str], *, strong: bool = False) -> str:
        parts = []
        for i, cell in enumerate(cells):
            told = f"<strong>{escape(cell)}</strong>" if strong and cell else escape(cell)
            align = "left" if i < self.left else "right"
            parts.append(f'<{tag} style="text-align:{align}">{told}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"


def by_metric(corner: str, metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of numbers by row and name: a row that lacks a name has an empty cell."""
    names = list(dict.fromkeys(name for own in metrics.values() for name in own))
    rows = [
        [row, *(f"{own[name]:.4f}" if name in own else "" for name in names)]
        for row, own in metrics.items()
    ]
    return Table([corner, *names], rows)


def html_block(*parts: str) -> str:
    """Return pieces of HTML as one, each in a block of its own."""
    return f"<div>{''.join(f'<div>{part}</div>' for part in parts if part)}</div>"
