"""One self-contained page: sections with a sentence, pictures and tables; no script, no outside link."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd

STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto 5rem; padding: 0 1.25rem; color: #1d1f21; }
img { max-width: 100%; height: auto; display: block; margin: 0.6rem 0; }
section { border-top: 1px solid #ddd; margin-top: 2.6rem; } ul { max-width: 46rem; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 1.4rem 0 0.3rem; }
p { max-width: 46rem; margin: 0.3rem 0; } .facts { color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; }
code { background: #f3f3f3; padding: 0 0.2rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, pictures (file names beside the page), and perhaps a table."""

    title: str
    text: str
    pictures: list[str] = field(default_factory=list)
    table: pd.DataFrame | None = None


def write_page(path: Path, sections: list[Section], facts: str, found: list[str]) -> None:
    """Write the page, what was `found` first; pictures are referred to by their names in the same folder."""
    told = "".join(f"<li>{escape(one)}</li>" for one in found)
    body = "".join(_section(s) for s in sections)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>interp demo</title><style>{STYLE}</style></head>'
        f"<body><h1>interp: one model traced, probed and intervened on</h1>"
        f'<p class="facts">{escape(facts)}</p><ul>{told}</ul>{body}'
        "<h2>Go on</h2><p>The data is in <code>run.zarr</code>: <code>interp info run.zarr</code>, "
        "<code>interp probe frequency_energy run.zarr --out energy.png</code>, or in Python "
        '<code>xr.open_datatree("run.zarr", engine="zarr")</code>.</p></body></html>\n',
        encoding="utf-8",
    )


def _section(section: Section) -> str:
    pictures = "".join(f'<img src="{escape(p)}" alt="{escape(section.title)}">' for p in section.pictures)
    table = "" if section.table is None else f'<div class="wide">{section.table.to_html(index=False, border=0)}</div>'
    return f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{pictures}{table}</section>"
