"""Execute a notebook in this process and write it with its outputs: `python -m tests.reproduction.notebook IN --out OUT`.

A cell prints, and shows its last expression (figures as PNG, tables as HTML); no kernel and no Jupyter are needed.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any


def execute(path: Path, out: Path) -> str:
    """Run the code cells of `path` in order, write the notebook with their outputs to `out`, return what was printed."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__notebook__"}
    printed, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            value = run("".join(cell["source"]), names, f"{path.name}[{count}]")
        said = text.getvalue()
        printed.append(said)
        cell["execution_count"] = count
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": said.splitlines(True)}] if said else []
        if value is not None:
            cell["outputs"].append(
                {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": shown(value)}
            )
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return "".join(printed)


def run(source: str, names: dict[str, Any], where: str) -> Any:
    """Run a cell and return the value of its last line, if that is an expression."""
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)


def shown(value: Any) -> dict[str, Any]:
    """Return a value as a notebook keeps it, by media type."""
    if hasattr(value, "savefig"):
        buffer = io.BytesIO()
        value.savefig(buffer, format="png", dpi=110)
        return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["figure"]}
    text = value.to_string() if hasattr(value, "to_string") else str(value)
    data: dict[str, Any] = {"text/plain": text.splitlines(True)}
    if hasattr(value, "to_html"):
        data["text/html"] = value.to_html().splitlines(True)
    return data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    print(execute(asked.notebook, asked.out))
