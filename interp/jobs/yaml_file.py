"""YAML of strangers: plain data only, no key twice, and no small file that unfolds into a huge one."""

from pathlib import Path
from typing import Any

import yaml

from interp.errors import InterpError

MOST_BYTES = 64 << 20
MOST_VALUES = 5_000_000


class _Loader(yaml.SafeLoader):
    """The safe loader, which makes no objects; and a key that stands twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is no plain value", key_node.start_mark
                ) from None
            if twice:
                text = f"the key {key!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping; InterpError, with the line, if it holds anything else."""
    if path.stat().st_size > MOST_BYTES:
        raise InterpError(
            f"{path} has more than {MOST_BYTES >> 20} MiB; put long prompt tables into a file of their own"
        )
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"{path}: ")
    except UnicodeDecodeError as error:
        raise InterpError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def parse_yaml(text: str, where: str = "") -> dict[str, Any]:
    """Return the mapping that a YAML text holds."""
    try:
        values = yaml.load(text, _Loader)  # noqa: S506  a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = (error.problem or error.context or "it cannot be read").splitlines()[0]
        raise InterpError(f"{where}{line}{problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InterpError(f"{where}it cannot be read as YAML: {first}") from None
    if not isinstance(values, dict):
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise InterpError(f"{where}it holds {kind} instead of keys and values; see docs/jobs.md")
    _bounded(values, where)
    return values


def _bounded(values: Any, where: str) -> None:
    """Refuse aliases that, written out, would be huge or endless."""
    stack, left = [iter((values,))], MOST_VALUES
    while stack:
        try:
            value = next(stack[-1])
        except StopIteration:
            stack.pop()
            continue
        left -= 1
        if left < 0 or len(stack) > 50:
            raise InterpError(f"{where}it is nested too deeply, or unfolds into more than {MOST_VALUES:,} values")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise InterpError(f"{where}the key {key!r} is a {type(key).__name__}, not text; write it in quotes")
            stack.append(iter((*value.keys(), *value.values())))
        elif isinstance(value, list):
            stack.append(iter(value))
        elif value is not None and not isinstance(value, (str, int, float)):
            raise InterpError(f"{where}it holds a {type(value).__name__}, {value!r}; write it in quotes if it is text")
