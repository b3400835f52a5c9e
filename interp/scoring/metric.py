"""What a metric is, and finding one: an installed entry point, a plain file, or a function.

A metric is a function `fn(images)`, `fn(images, texts)` or `fn(images, references)`: images and references are uint8
(sample, height, width, rgb), texts a list of strings; it returns one number a sample. Its keyword-only parameters are
its options. A metric that has something to load is a class, made once: its options are those of `__init__`, and its
`__call__` is the function. One that is of many pictures at once, as FID is, has `update` in place of `__call__`, and
`compute`, which returns the number: the interface of torchmetrics.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InterpError, nearest, sentence_list
from interp.probes.discovery import PluginInfo, find_plugin, list_plugins, load_file, plugins

METRICS = "interp.metrics"
GIVEN = ("run", "device")
"""Options that `score` fills in where a metric has them: the run, and where to compute ("cuda" or "cpu")."""


@dataclass(frozen=True)
class Metric:
    """A metric and its options.

    `wants` is what it compares pictures with: "texts", "references" or "" for nothing. `origin` says which code it is, in
    words that change when the code does; "" for a function of which that is not known.
    """

    name: str
    make: Callable[..., Any]
    origin: str
    wants: str
    whole: bool
    options: Mapping[str, Any]

    @property
    def known(self) -> dict[str, Any]:
        """Its options and their defaults."""
        return {k: v for k, v in _options(self.make).items() if k not in GIVEN}

    @property
    def made_by(self) -> dict[str, Any]:
        """What is written beside its scores: origin and options."""
        return {"origin": self.origin, "options": {k: _plain(v) for k, v in (self.known | dict(self.options)).items()}}

    def made(self, run: Any) -> Any:
        """Return what is called with pictures: the function with its options, or an instance of the class."""
        given = {"run": run, "device": _device()}
        options = {k: given[k] for k in _options(self.make) if k in given} | dict(self.options)
        return self.make(**options) if inspect.isclass(self.make) else _Bound(self.make, options)


@dataclass(frozen=True)
class _Bound:
    """A function with its options, called as an instance would be."""

    fn: Callable[..., Any]
    options: Mapping[str, Any]

    def __call__(self, *pictures: Any) -> Any:
        return self.fn(*pictures, **self.options)


def find_metric(name: str | Callable[..., Any], options: Mapping[str, Any] | None = None) -> Metric:
    """Return an installed metric by name, one of a file by `"my_metric.py"` or `"my_metric.py:name"`, or a function's.

    `options` may hold those of other metrics too; each takes its own. Raises InterpError for an unknown name (with the
    nearest and the list), for a file without metrics or with several, and for what is no metric. Loading a file executes
    it.

    >>> find_metric("l1").wants
    'references'
    """
    if not isinstance(name, str):
        return _metric(str(getattr(name, "__name__", type(name).__name__)), name, "", options)
    file, _, wanted = name.rpartition(":") if ".py:" in name else (name, "", "")
    if file.endswith(".py"):
        return _of_file(file, wanted, options)
    plugin = next((p for p in plugins(METRICS) if p.name == name), None)
    found = find_plugin(name, METRICS)
    assert plugin is not None  # find_plugin has raised otherwise
    try:
        number = version(plugin.distribution)
    except PackageNotFoundError:
        number = "unknown"
    return _metric(name, found, f"{plugin.target} of {plugin.distribution} {number}", options)


def list_metrics() -> list[PluginInfo]:
    """Return name, summary and source of every installed metric, sorted by name; imports none of them.

    >>> [m.name for m in list_metrics() if m.name.startswith("clip")]
    ['clip', 'clip_image']
    """
    return list_plugins(METRICS)


def values_of(metric: Metric, found: Any, count: int) -> np.ndarray:
    """Return what a metric returned for some pictures as float32 (sample,); InterpError if it is something else."""
    numbers = found.detach().cpu().numpy() if hasattr(found, "detach") else np.asarray(found)
    if numbers.shape != (count,) or numbers.dtype.kind not in "fiub":
        raise InterpError(
            f"metric {metric.name!r} returned {type(found).__name__} of shape {numbers.shape} and dtype {numbers.dtype} for "
            f"{count} pictures; it must return one number for each"
        )
    return numbers.astype("float32")


def _of_file(file: str, wanted: str, options: Mapping[str, Any] | None) -> Metric:
    module = load_file(file)
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v)}
    found = {k: v for k, v in own.items() if not k.startswith("_") and _pictures(v)}
    if wanted:
        if wanted not in found:
            listed = f"; it has {', '.join(found)}" if found else "; it has none"
            raise InterpError(f"{file!r} has no metric {wanted!r}{listed}{nearest(wanted, found)}")
        found = {wanted: found[wanted]}
    if not found:
        raise InterpError(f"{file!r} has no metric: a function whose first parameter is 'images'")
    if len(found) > 1:
        raise InterpError(f"{file!r} has several metrics: ask for one of {', '.join(f'{file}:{n}' for n in found)}")
    (name, target), digest = next(iter(found.items())), hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
    return _metric(name, target, f"{Path(file).name}:{name} sha256:{digest[:16]}", options)


def _metric(name: str, make: Any, origin: str, options: Mapping[str, Any] | None) -> Metric:
    parameters = _pictures(make) if callable(make) else []
    further = parameters[1:]
    if not parameters or len(further) > 1 or any(p not in ("texts", "references") for p in further):
        raise InterpError(
            f"metric {name!r} is {_what(make)}: it must be a function of (images), (images, texts) or (images, references), "
            "its options keyword-only with defaults, or a class whose __call__ or update is one"
        )
    mine = {k: v for k, v in (options or {}).items() if k in _options(make) and k not in GIVEN}
    whole = inspect.isclass(make) and hasattr(make, "update")
    return Metric(name, make, origin, further[0] if further else "", whole, mine)


def check_options(metrics: list[Metric], options: Mapping[str, Any]) -> None:
    """Raise InterpError for an option that none of the metrics has."""
    known = sorted({name for m in metrics for name in m.known})
    for name in options:
        if name not in known:
            has = f"options of {sentence_list(m.name for m in metrics)} are {', '.join(known) or 'none'}"
            raise InterpError(f"no metric asked for has an option {name!r}; {has}{nearest(name, known)}")


def _pictures(make: Any) -> list[str]:
    """Names of the parameters that are given pictures and what belongs to them; [] if it is no metric."""
    call = make
    if inspect.isclass(make):
        call = getattr(make, "update", None) or make.__dict__.get("__call__")
    try:
        parameters = list(inspect.signature(call).parameters.values()) if call is not None else []
    except (TypeError, ValueError):
        return []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [n for n in names if n != "self"]
    return names if names[:1] == ["images"] else []


def _options(make: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _what(make: Any) -> str:
    try:
        return f"{type(make).__name__} {inspect.signature(make)}"
    except (TypeError, ValueError):
        return type(make).__name__


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
