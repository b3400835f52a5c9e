"""The table of docs/reproduce.md, from docs/reproduction/summary.csv: `python -m tests.reproduction.summary` writes it."""

import csv
from pathlib import Path

from interp.scenes.marked import fill

DOCS = Path(__file__).parents[2] / "docs"


def table() -> str:
    """One row an experiment: its verdict, its main number and n."""
    with (DOCS / "reproduction" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| | verdict | |", "|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['experiment']} {r['title']} | {r['verdict']} | {r['number']}{f' ({n})' if (n := r['n']) else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    fill(DOCS / "reproduce.md", {"summary": table()})
