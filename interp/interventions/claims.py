"""What interventions own: two owners of one thing in the same steps are refused.

A claim is a name. Parts of a thing are written `text:word`, which is part of `text`; positions of a part
`text:eos[0:5]`; and what is owned along a dimension behind semicolons, `site unet.mid_block:out;branch=cond;channels=0,1`.
A dimension that is not named is owned whole.
"""

import re
import sys
from collections.abc import Iterable, Sequence

from interp.stores.table import ROLES
from interp.tokens import WORD

_NAME = re.compile(r"(.*?)(?:\[(\d+):(\d*)\])?")


def claim(what: str, **parts: Iterable[object] | None) -> str:
    """Name a part of a run; dimensions that are None are left out.

    >>> claim("site unet.mid_block:out", branch=("cond",), channels=(0, 1), tokens=None)
    'site unet.mid_block:out;branch=cond;channels=0,1'
    """
    given = (f"{name}={','.join(map(str, values))}" for name, values in parts.items() if values is not None)
    return ";".join([what, *given])


def overlap(a: str, b: str) -> bool:
    """Tell whether two claims meet.

    >>> overlap("text", "text:eos[0:5];side=k"), overlap("text:eos;side=v", "text:eos[0:5];side=k")
    (True, False)
    """
    (one, *first), (other, *second) = a.split(";"), b.split(";")
    if not _names_meet(one, other):
        return False
    mine, theirs = (dict(part.partition("=")[::2] for part in parts) for parts in (first, second))
    return all(_values_meet(name, mine[name].split(","), theirs[name].split(",")) for name in mine if name in theirs)


def _names_meet(a: str, b: str) -> bool:
    (one, first, stop), (other, second, end) = (_NAME.fullmatch(c).groups() for c in (a, b))  # type: ignore[union-attr]
    if one != other:
        return bool(one.startswith(f"{other}:") or other.startswith(f"{one}:"))
    return max(int(first or 0), int(second or 0)) < min(int(stop or sys.maxsize), int(end or sys.maxsize))


def _values_meet(dimension: str, a: Sequence[str], b: Sequence[str]) -> bool:
    if dimension == "region":
        (top, left, bottom, right), (above, before, below, after) = (map(float, values) for values in (a, b))
        return max(top, above) < min(bottom, below) and max(left, before) < min(right, after)
    if dimension == "cells" and a[0] != b[0]:  # of masks of different sizes
        return True
    if dimension == "cells":
        a, b = a[1:], b[1:]
    if dimension == "tokens" and any(map(_any_word, a)) | any(map(_any_word, b)):
        a, b = (["word" if _is_word(item) else item for item in items] for items in (a, b))
    return not {*a}.isdisjoint(b)


def _is_word(token: str) -> bool:
    return not token.isdigit() and (token == "word" or token not in ROLES)


def _any_word(token: str) -> bool:
    return token == "word" or "{" in token


def token_claims(
    what: str, words: Sequence[str], roles: Sequence[str], indices: Sequence[int], occurrence: int | None = None,
    count: int | None = None,
) -> frozenset[str]:  # fmt: skip
    """Name tokens of `what`, as far as they are known without a prompt.

    >>> sorted(token_claims("text", ["blue square"], ["eos"], [3]))
    ['text:eos[0:1]', 'text:word:blue', 'text:word:square', 'text[3:4]']
    """
    claims = {f"{what}:{role}" for role in roles if role not in ("eos", "pad")}
    run = {role: (int(role == "pad"), int(role == "eos") or None) for role in roles if role in ("eos", "pad")}
    if run:
        first, stop = min(a for a, _ in run.values()), None if "pad" in run else 1
        if count is not None:
            stop = min(first + count, stop or first + count)
        claims.add(f"{what}:eos[{first}:{'' if stop is None else stop}]")
    which = "" if occurrence is None else f"[{occurrence}:{occurrence + 1}]"
    for phrase in words:
        any_word = {f"{what}:word"}
        claims |= any_word if "{" in phrase else {f"{what}:word:{w}{which}" for w in WORD.findall(phrase.lower())}
    return frozenset(claims | {f"{what}[{i}:{i + 1}]" for i in indices})
