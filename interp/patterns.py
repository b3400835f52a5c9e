"""Choosing sites by name: globs, and regular expressions that begin with `re:`."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from interp.errors import InterpError

REGEX = "re:"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    r"""Return the names that a glob, or `re:` and a regular expression for the whole name, selects.

    Raises:
        InterpError: the regular expression is malformed.

    >>> matching("*.attn2", ["mid.attn1", "mid.attn2"])
    ['mid.attn2']
    >>> matching(r"re:up\.\d\.attn2", ["up.0.attn2", "up.1.attn1", "mid.attn2"])
    ['up.0.attn2']
    """
    if not isinstance(pattern, str):
        raise InterpError(f"{pattern!r} is no name of a site: give a name, a glob such as '*attn2', or 're:…'")
    if not pattern.startswith(REGEX):
        return [n for n in names if n == pattern or fnmatchcase(n, pattern)]
    try:
        expression = re.compile(pattern.removeprefix(REGEX))
    except re.error as error:
        raise InterpError(f"{pattern!r} is no regular expression: {error}") from error
    return [n for n in names if expression.fullmatch(n)]
