"""What is typed on the command line, read as values: assignments, interventions, conditions, seeds, sizes."""

import shlex
from typing import Any

import yaml

from interp.errors import InterpError


def read_assignments(texts: list[str]) -> dict[str, Any]:
    """Read `name=value` pairs; values are YAML scalars or lists (`steps=[0, 5]`)."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InterpError(f"cannot read {text!r}: write name=value")
        try:
            found[name.strip()] = _plain(yaml.safe_load(value))
        except yaml.YAMLError:  # a glob such as *attn2 is no YAML, but plain text
            found[name.strip()] = value
    return found


def _plain(value: Any) -> Any:
    """Take `{target}`, a column of the prompt table, as the text that it is; YAML reads a mapping."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    column = isinstance(value, dict) and list(value.values()) == [None]
    return f"{{{next(iter(value))}}}" if column else value


def read_intervention(text: str) -> Any:
    """Read `remove_text start=0.6`."""
    from interp.interventions import from_spec

    name, fields = read_call(text)
    return from_spec({"name": name, **fields})


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Read `remove_text start=0.6` as a name and its fields."""
    try:
        name, *fields = shlex.split(text) or [""]
    except ValueError as error:
        raise InterpError(f"cannot read {text!r} ({str(error).lower()}): write 'name field=value …'") from None
    if not name or "=" in name:
        raise InterpError(f"cannot read {text!r}: write 'name field=value …', e.g. 'remove_text start=0.6'")
    return name, read_assignments(fields)


def read_conditions(texts: list[str]) -> dict[str, list[Any]]:
    """Read `late: remove_text start=0.6; replace_eos prompt={target}`."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        if not colon or not name.strip():
            raise InterpError(f"cannot read the condition {text!r}: write 'name: intervention field=value; …'")
        if name.strip() in found:
            raise InterpError(f"two conditions are called {name.strip()!r}; give each a name of its own")
        found[name.strip()] = [read_intervention(part) for part in rest.split(";") if part.strip()]
    return found


def read_seeds(text: str) -> list[int]:
    """Read `0`, `0,1,7` or `0-3`."""
    from interp.jobs.spec import parse_seeds

    try:
        return parse_seeds(text)
    except ValueError as error:
        raise InterpError(str(error)) from None


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """Read `HEIGHTxWIDTH`."""
    if text is None:
        return None, None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise InterpError(f"cannot read the size {text!r}: write HEIGHTxWIDTH, e.g. 512x768")
    return int(height), int(width)
