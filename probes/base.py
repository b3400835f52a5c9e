"""`@probe`: mark a function of a run as a probe, and check what goes in and what comes out."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from interp.probes.needs import require
from interp.probes.sparing import LARGE, sparing
from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

Result = xr.Dataset | xr.DataArray
FILE_MODULE = "_interp_file_"  # the modules of plain plugin files bear this prefix (see discovery.py)


class Parameter(NamedTuple):
    """A parameter of a probe: its default and its annotation as written."""

    default: Any
    annotation: str


@dataclass(frozen=True, eq=False)
class Probe:
    """A named function of a run; call it as `probe(run, **parameters)` for a Dataset.

    `name`, `summary` (the docstring's first line), `params` (name → default and annotation), `needs` and
    `plot` can be read without running it. Two probes are equal when they are the same object; pickling is by
    reference.
    """

    name: str
    fn: Callable[..., Result]
    needs: Mapping[str, Any] = field(default_factory=dict)
    plot: Callable[..., Figure] | None = None

    def __post_init__(self) -> None:
        signature_of(self.name, self.fn)
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            object.__setattr__(self, attribute, getattr(self.fn, attribute, ""))
        object.__setattr__(self, "__wrapped__", self.fn)  # where help(), inspect and doctest look

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    @property
    def params(self) -> dict[str, Parameter]:
        """Each parameter's default and annotation, in order."""
        return {
            p.name: Parameter(p.default, "" if p.annotation is p.empty else inspect.formatannotation(p.annotation))
            for p in signature_of(self.name, self.fn)
        }

    def __call__(self, run: Run, **params: Any) -> xr.Dataset:
        """Ask the run; returns a Dataset with the probe's name, parameters and versions in its attrs.

        Large arrays of a stored run reach the probe as dask arrays, a chunk a sample: a run may be larger than the
        memory. A result that could not fit either stays lazy.

        Raises InterpError for an unknown parameter, for data that the run did not capture, and for a result
        without labels or units.
        """
        self.check_params(params)
        if not hasattr(run, "tree"):
            raise InterpError(
                f"probe {self.name!r} was given {type(run).__name__} where a run is expected: "
                f"pass interp.open_run(path)"
            )
        require(run, self.needs, asker=f"probe {self.name!r}")
        result = _labelled(self.name, self.fn(sparing(run), **params))
        if result.nbytes <= LARGE:  # a larger one stays lazy if it is
            result = result.compute()
        actual = {name: params.get(name, parameter.default) for name, parameter in self.params.items()}
        result.attrs |= {
            "probe": self.name,
            "parameters": json.dumps(actual, default=_plain),
            "version": import_module("interp").__version__,
            "run_format": str(run.attrs.get("format", "")),
        }
        return result

    def check_params(self, names: Iterable[str]) -> None:
        """Raise InterpError for a parameter that the probe does not have."""
        known = self.params
        for name in names:
            if name not in known:
                listed = f"it has {', '.join(known) or 'none'}{nearest(name, known)}"
                raise InterpError(f"probe {self.name!r} has no parameter {name!r}; {listed}")

    def __repr__(self) -> str:
        args = "".join(f", {name}={p.default!r}" for name, p in self.params.items())
        return f"<probe {self.name}(run{args})>"

    def __reduce__(self) -> tuple[Callable[..., Probe], tuple[str, ...]]:
        module, name = self.fn.__module__, self.fn.__qualname__
        path = getattr(sys.modules.get(module), "__file__", None)
        return _find_again, (module, name, str(path) if module.startswith(FILE_MODULE) else "")


def probe(
    name: str, *, needs: Mapping[str, Any] | None = None, plot: Callable[..., Figure] | None = None
) -> Callable[[Callable[..., Result]], Probe]:
    """Mark a function as the probe `name`; registers nothing (discovery.py says how probes are found).

    The function's first argument is a run; all others are keyword-only with a default. It returns a Dataset
    or a DataArray whose variables carry `units` in their attrs. `needs` names what the run must hold, e.g.
    `{"trajectory": ["latents"], "attention": True, "scores": ["clip:prompt"]}`: a missing piece is reported
    in one sentence before anything runs. `plot(ds, **options)` draws a result as a matplotlib Figure.

    Raises InterpError when the signature breaks these rules.

    >>> from interp.stores import synthetic_run
    >>> @probe("std", needs={"trajectory": ["latents"]})
    ... def std(run, *, power: int = 1):
    ...     '''Standard deviation of the latents at each step (latent units).'''
    ...     width = run.latents.std(["channel", "y", "x"]) ** power
    ...     return width.assign_attrs(units="latent units")
    >>> std(synthetic_run(samples=2, steps=6))["std"].dims
    ('sample', 'step')
    >>> std(synthetic_run(), powr=2)
    Traceback (most recent call last):
    interp.stores.errors.InterpError: probe 'std' has no parameter 'powr'; it has power; did you mean 'power'?
    """
    if not isinstance(name, str):
        raise InterpError('@probe was used without a name: write @probe("my_probe") above the function')

    def mark(fn: Callable[..., Result]) -> Probe:
        return Probe(name, fn, dict(needs or {}), plot)

    return mark


def signature_of(name: str, fn: Callable[..., Result]) -> list[inspect.Parameter]:
    """Return the parameters after the run; raises InterpError unless they are keyword-only with defaults."""
    everything = list(inspect.signature(fn).parameters.values())
    if not everything or everything[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise InterpError(f"probe {name!r} takes no run: its first parameter must be one, e.g. def f(run): …")
    params = everything[1:]
    for p in params:
        if p.kind is not p.KEYWORD_ONLY or p.default is p.empty:
            raise InterpError(
                f"probe {name!r}: parameter {p.name!r} must be keyword-only with a default, "
                f"so that it can be listed, recorded and set from a job file: def f(run, *, {p.name}=…)"
            )
    return params


def _labelled(name: str, result: Any) -> xr.Dataset:
    """Return the result as a Dataset of its own, or say what is missing from it."""
    if isinstance(result, xr.DataArray):
        result = result.rename(None).to_dataset(name=name)
    if not isinstance(result, xr.Dataset):
        kind = type(result).__name__
        raise InterpError(f"probe {name!r} returned {kind}, not an xarray Dataset or DataArray")
    for key, variable in result.data_vars.items():
        if unnamed := [str(d) for d in variable.dims if str(d).startswith("dim_")]:
            raise InterpError(f"probe {name!r}: variable {key!r} has unnamed dimensions {', '.join(unnamed)}")
        if not variable.attrs.get("units"):
            raise InterpError(
                f"probe {name!r}: variable {key!r} has no units; set them with .assign_attrs(units=…) "
                f'("1" for a plain number)'
            )
    # Chunking and compression belong to the store that was read, not to a file that the result may go to.
    return result.drop_encoding().assign_attrs()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | xr.DataArray):
        return value.tolist() if isinstance(value, np.ndarray) else value.values.tolist()
    if isinstance(value, tuple | set | frozenset | range):
        return list(value)
    return repr(value)


def _find_again(module: str, qualname: str, path: str) -> Probe:
    if path:
        from interp.probes.discovery import load_file

        target: Any = load_file(path)
    else:
        target = import_module(module)
    for part in qualname.split("."):
        target = getattr(target, part)
    found: Probe = target
    return found
