"""Prompt tables: what the user gives becomes one column per name, one row per prompt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import pandas as pd

from interp.errors import InterpError, nearest, sentence_list


@dataclass(frozen=True)
class PromptTable:
    """Columns of equal length; `prompt` and `negative_prompt` are always there."""

    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows at `indices` as dicts."""
        return [{name: values[i] for name, values in self.columns.items()} for i in indices]


def prompt_table(prompts: Any, negative_prompt: str = "") -> PromptTable:
    """Read prompts from a string, a list of strings or dicts, a DataFrame, or a CSV, JSON-lines or text file.

    Raises:
        InterpError: no `prompt` column, an empty table, a value that is neither text nor number, or no such file.

    >>> prompt_table([{"prompt": "a cat", "target": "a dog"}]).columns["target"]
    ['a dog']
    """
    frame = _frame(prompts)
    if "prompt" not in frame:
        raise InterpError(
            f"the prompt table has no column 'prompt'; it has {sentence_list(map(str, frame.columns)) or 'none'}"
        )
    if not len(frame):
        raise InterpError("the prompt table is empty; give at least one prompt")
    columns: dict[str, list[Any]] = {str(name): list(frame[name]) for name in frame.columns}
    given = columns.setdefault("negative_prompt", [negative_prompt] * len(frame))
    columns["negative_prompt"] = ["" if pd.isna(v) else v for v in given]
    for name, values in columns.items():
        columns[name] = [_value(name, i, v) for i, v in enumerate(values)]
        if len({isinstance(v, str) for v in columns[name]}) > 1:
            missing = [i for i, v in enumerate(columns[name]) if v != v]  # NaN
            if missing:
                raise InterpError(
                    f"row {missing[0]} of the prompt table has nothing in {name!r}, a column of texts; fill it, or write "
                    "an empty text"
                )
            columns[name] = [str(v) for v in columns[name]]
    for name in ("prompt", "negative_prompt"):
        if not all(isinstance(v, str) for v in columns[name]):
            raise InterpError(f"the column {name!r} of the prompt table holds numbers; it must hold texts")
    for name in ("sample", "seed", "condition", "prompt_id", "batch", "status", "error"):
        if name in columns:
            raise InterpError(f"the prompt table has a column {name!r}, a name that the run itself uses; rename it")
    return PromptTable(columns)


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Fill `"{column}"` in an intervention's text from a row of the prompt table; other text stays as it is.

    >>> fill("{target}", {"prompt": "a cat", "target": "a dog"})
    'a dog'
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InterpError(
            f"an intervention's text {template!r} has a lone brace; braces name a column of the prompt table"
        ) from error
    for name in names:
        if name not in row:
            raise InterpError(
                f"an intervention's text names the column {name!r}, which the prompt table lacks; it has "
                f"{sentence_list(row)}{nearest(name, row)}"
            )
    for name in names:
        template = template.replace("{" + name + "}", str(row[name]))
    return template


def _frame(prompts: Any) -> pd.DataFrame:
    if isinstance(prompts, pd.DataFrame):
        return prompts
    if isinstance(prompts, Path) or (isinstance(prompts, str) and prompts.endswith((".csv", ".jsonl", ".txt"))):
        return _file(Path(prompts))
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        raise InterpError("prompts are a list of dicts, one a row, not a dict; for one row write [{…}]")
    if not isinstance(prompts, Iterable):
        raise InterpError(
            f"prompts={prompts!r}: give a text, a list of texts, a table with a column 'prompt', or a file"
        )
    rows = list(prompts)
    if all(isinstance(r, str) for r in rows):
        return pd.DataFrame({"prompt": rows})
    if all(isinstance(r, Mapping) for r in rows):
        return pd.DataFrame(rows)
    kinds = sorted({type(r).__name__ for r in rows})
    raise InterpError(f"prompts are a list of strings or of dicts with a 'prompt', not of {', '.join(kinds)}")


def _file(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InterpError(f"no such prompt file: {str(path)!r}")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, keep_default_na=False)
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True)
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # pandas' own errors, and bytes that are no UTF-8
        kind = {".csv": "a table of comma-separated values", ".jsonl": "JSON lines"}.get(path.suffix, "UTF-8 text")
        first = str(error).splitlines()[0]
        raise InterpError(f"{str(path)!r} cannot be read as {kind} with a column 'prompt' ({first})") from None
    return pd.DataFrame({"prompt": [line for line in lines if line]})


def _value(name: str, row: int, value: Any) -> Any:
    if isinstance(value, str):
        return value
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool):
        return int(value)
    raise InterpError(
        f"row {row} of the prompt table holds a {type(value).__name__} in {name!r}; a cell is text or a number"
    )
