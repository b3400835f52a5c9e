"""Whether the fields of a `Capture` have values of the right kind; what else could be meant is said in one sentence."""

from numbers import Integral, Real
from typing import Any

from interp.errors import InterpError, nearest

WORDS = {"heads": ("mean", "all"), "tokens": ("prompt", "all"), "dtype": ("float16", "float32")}
"""Fields that take one of some words; the first two take a list too."""
LISTS = {"heads": "indices", "tokens": "positions, words and roles"}


def check_values(capture: Any) -> None:
    """Raise InterpError for a field of the wrong kind."""
    for name in ("latents", "noise_pred", "image"):
        if not isinstance(getattr(capture, name), bool):
            raise InterpError(f"Capture({name}={getattr(capture, name)!r}): choose True or False")
    if capture.text not in (True, False, "layers"):
        raise InterpError(f"Capture(text={capture.text!r}): choose True, False or 'layers'")
    wrong = [b for b in capture.branches if b not in ("cond", "uncond")]
    if wrong or not capture.branches:
        raise InterpError(f"Capture(branches={list(capture.branches)}): a branch is 'cond' or 'uncond'")
    for name in WORDS:
        _word_or_list(name, getattr(capture, name))
    _globs("attention", capture.attention if capture.attention is not None else ())
    _globs("sites", capture.sites)
    _steps(capture.steps)
    if capture.mantissa is not None and not (_whole(capture.mantissa) and 1 <= capture.mantissa <= 23):
        raise InterpError(f"Capture(mantissa={capture.mantissa!r}): give a number of bits, e.g. 7, or None")


def check_region(region: Any, owner: str) -> None:
    """Raise InterpError, naming its owner, unless this is (top, left, bottom, right) in fractions of the picture."""
    whole = isinstance(region, tuple) and len(region) == 4 and all(isinstance(v, Real) for v in region)
    if not whole or not (0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1):
        raise InterpError(
            f"{owner}(region={region!r}): give (top, left, bottom, right) in fractions of the picture, e.g. "
            "(0, 0, 0.5, 1) for its upper half"
        )


def _word_or_list(name: str, value: Any) -> None:
    words = WORDS[name]
    choices = " or ".join(map(repr, words)) + (f", or a list of {LISTS[name]}" if name in LISTS else "")
    listed = name in LISTS and isinstance(value, tuple) and value
    if listed and all(_whole(v) or (name == "tokens" and isinstance(v, str)) for v in value):
        return
    if isinstance(value, str) and value in words:
        return
    hint = nearest(value, words) if isinstance(value, str) else ""
    raise InterpError(f"Capture({name}={_shown(value)}): choose {choices}{hint}")


def _globs(name: str, value: Any) -> None:
    if not isinstance(value, str) and not (isinstance(value, tuple) and all(isinstance(v, str) for v in value)):
        none = " or None" if name == "attention" else ""
        raise InterpError(f"Capture({name}={_shown(value)}): give a site's name or glob, or a list of them{none}")


def _steps(value: Any) -> None:
    if value is None or isinstance(value, slice):
        return
    if isinstance(value, tuple) and value and all(map(_whole, value)):
        return
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise InterpError(f"Capture(steps={value}): a share of the steps lies in (0, 1]")
        return
    raise InterpError(
        f"Capture(steps={_shown(value)}): give a list of step numbers such as [0, 5], a slice, or a share of the steps such "
        "as 0.2"
    )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
