"""Put the measured tables into the model card: `python -m interp.scenes.card`, after `quality --out quality.json`."""

import json
from pathlib import Path
from typing import Any

from interp.scenes import folder
from interp.scenes.marked import filled, markdown


def with_tables(card: str, measured: dict[str, Any]) -> str:
    """Return the card with the tables of `measured` (what `quality` wrote) between its marks.

    >>> print(with_tables("<!-- measured: A -->\\nold\\n<!-- end -->\\n", {"A": {"x": {"pictures": 256}}}), end="")
    <!-- measured: A -->
    | | pictures |
    |---|---:|
    | x | 256 |
    <!-- end -->
    """
    told = {title: markdown(table) for title, table in measured.items() if title != "settings"}
    about = measured.get("settings")
    if about:
        told["settings"] = (
            f"n = {about['n']} pictures of each kind, {about['steps']} DDIM steps, guidance {about['guidance']:g}, "
            f"{about['device']}; where a table says nothing else.\n"
        )
    return filled(card, told)


def main() -> None:
    """Rewrite the card beside the weights, and its copy under docs/ where there is one."""
    path = folder() / "README.md"
    card = with_tables(path.read_text(encoding="utf-8"), json.loads((folder() / "quality.json").read_text()))
    copy = Path(__file__).parents[2] / "docs" / "scenes.md"
    for target in (path, *([copy] if copy.exists() else [])):
        target.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
