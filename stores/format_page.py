"""The tables of the documentation page on the trace format, generated from the table itself."""

from interp.stores.table import TABLE, Variable

_STORED = {
    "table": "written at creation",
    "batch": "shared by the samples of a batch",
    "sample": "one file a sample",
    "shard": "one shard a sample",
    "auto": "by size",
}
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def format_tables() -> str:
    """Return one Markdown table for each node of a run."""
    nodes = dict.fromkeys(v.node for v in TABLE)
    return "\n\n".join(_node(node, [v for v in TABLE if v.node == node]) for node in nodes)


def with_tables(page: str) -> str:
    """Return the page with what lies between its two marks replaced by the tables."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{format_tables()}\n\n{END}{rest.partition(END)[2]}"


def _node(node: str, rows: list[Variable]) -> str:
    title = f"### `/{node}`" if node else "### `/` (the root)"
    head = "| variable | dims | dtype | units | stored as | meaning |\n|---|---|---|---|---|---|"
    return "\n".join([title, "", head, *(_row(row) for row in rows)])


def _row(row: Variable) -> str:
    name = f"`{row.name}`" + (" (coord)" if row.coord else "") + ("" if row.required else " (optional)")
    dtypes = " or ".join(row.dtypes)
    cells = (name, ", ".join(row.dims), dtypes, row.units, _STORED[row.storage], row.meaning)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    import pathlib

    target = pathlib.Path("docs/format.md")
    target.write_text(with_tables(target.read_text()))
