"""Pages with measured parts: what lies between `<!-- measured: NAME -->` and `<!-- end -->` is written by programs."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from interp.errors import InterpError

MARK = re.compile(r"<!-- measured: (.+?) -->\n.*?<!-- end -->\n", re.S)
Cell = Mapping[str, float | None] | str
"""A number {"value", "low", "high"}, NaN or None where there is none, or a text."""
Figures = dict[str, Cell | int]
Table = dict[str, Figures]
"""Case → figure → mean with its interval, or a number of pictures."""


def filled(page: str, told: Mapping[str, str]) -> str:
    """Return the page with the texts of `told` between the marks of their names; other parts stay.

    Raises InterpError for a name that has no place in the page.

    >>> print(filled("<!-- measured: A -->\\nold\\n<!-- end -->\\n", {"A": "new"}), end="")
    <!-- measured: A -->
    new
    <!-- end -->
    """
    places = MARK.findall(page)
    missing = [name for name in told if name not in places]
    if missing:
        raise InterpError(
            f"the page has no place '<!-- measured: {missing[0]} -->'; it has {', '.join(places) or 'none'}"
        )
    return MARK.sub(lambda m: part(m[1], told[m[1]]) if m[1] in told else m[0], page)


def part(name: str, text: str) -> str:
    """Return a measured part with its marks."""
    return f"<!-- measured: {name} -->\n{text.rstrip()}\n<!-- end -->\n"


def fill(path: Path, told: Mapping[str, str]) -> None:
    """Fill the page in a file."""
    path.write_text(filled(path.read_text(encoding="utf-8"), told), encoding="utf-8")


def shown(cell: Cell) -> str:
    """Return a cell of a table as text.

    >>> shown({"value": -0.5, "low": -0.75, "high": 0.25}), shown("0.70")
    ('−0.500 [−0.750, 0.250]', '0.70')
    """
    if isinstance(cell, str):
        return cell
    value, low, high = (math.nan if (number := cell[k]) is None else number for k in ("value", "low", "high"))
    interval = f" [{low:z.3f}, {high:z.3f}]" if math.isfinite(low) else ""
    return f"{value:z.3f}{interval}".replace("-", "−") if math.isfinite(value) else ""


def markdown(table: Table) -> str:
    """Return the table as Markdown, its longer side down; a figure that a case does not have is a dash.

    >>> half = {"value": 0.5, "low": 0.25, "high": 0.75}
    >>> print(markdown({"a": {"x": half, "y": 2, "z": half}, "b": {"x": half}}), end="")
    | | a | b |
    |---|---:|---:|
    | x | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] |
    | y | 2 | – |
    | z | 0.500 [0.250, 0.750] | – |
    """
    cases, figures = list(table), list(dict.fromkeys(name for row in table.values() for name in row))
    down, across = (figures, cases) if len(figures) > len(cases) else (cases, figures)
    lines = ["| | " + " | ".join(across) + " |", "|---|" + "---:|" * len(across)]
    for name in down:
        cells = [table[c].get(f) for c, f in ((other, name) if down is figures else (name, other) for other in across)]
        lines.append(f"| {name} | " + " | ".join(_in_table(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _in_table(cell: Cell | int | None) -> str:
    return "–" if cell is None else str(cell) if isinstance(cell, int) else shown(cell)
