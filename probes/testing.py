"""For authors of probes: `check_probe` yields the checks that every probe should pass; data needs no model.

```python
import pytest
from interp.probes.testing import check_probe
from my_probe import sharpness

@pytest.mark.parametrize("check", check_probe(sharpness), ids=str)
def test_sharpness(check):
    check()
```
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import xarray as xr

from interp.probes.base import Probe
from interp.probes.made import changed_run, film_run, like, swap_run
from interp.probes.watching import MANY, bounded
from interp.stores import Run, synthetic_run
from interp.stores.errors import InterpError

__all__ = ["Check", "changed_run", "check_probe", "film_run", "swap_run"]

PARTS = {  # what a run may lack, and the needs that it then does not meet
    "latents": ("trajectory", ("latents", "final_latents")),
    "noise_pred": ("trajectory", ("noise_pred",)),
    "attention": ("attention", ()),
    "images": ("images", ()),
    "text": ("text", ()),
    "scores": ("scores", ()),
}


@dataclass(frozen=True)
class Check:
    """A named check: call it; an AssertionError (or whatever the probe raises) says what is wrong."""

    name: str
    body: Callable[[], str | None]

    def __call__(self) -> str | None:
        """Run the check; some checks return what came of it."""
        return self.body()

    def __str__(self) -> str:
        return self.name


def check_probe(probe: Probe, make_run: Callable[..., Run] = synthetic_run, **params: Any) -> Iterator[Check]:
    """Yield the checks of a probe, with `params` passed on to it.

    make_run makes the runs, with the keywords of `interp.stores.synthetic_run` (samples, heads, branches): pass
    another for a probe that needs more than that gives, such as `swap_run`.

    Checked: documented keyword-only parameters with defaults; one and several samples; heads averaged and
    apart; a branch that was evaluated half of the time, or not captured at all; a run that lacks a part (an
    InterpError of one sentence, or a result with numbers in it); labels and units; the same result again, from dask arrays, and
    after pickling the probe; the run left as it was; no large array read whole, so that a run may be larger than
    the memory; its plot.

    >>> from interp.probes import find_probe
    >>> for check in check_probe(find_probe("frequency_energy")):
    ...     check()
    """
    runs = cache(make_run)
    several = {"samples": 3}

    def ask(run: Run, which: Probe = probe) -> xr.Dataset:
        result = which(run, **params).load()
        assert isinstance(result, xr.Dataset), f"the result is {type(result).__name__}, not a Dataset"
        return result

    @cache
    def asked() -> xr.Dataset:
        return ask(runs(**several))

    def checks(name: str, **kwargs: Any) -> Check:
        return Check(name, lambda: _has_numbers(ask(runs(**kwargs))))

    yield Check("documented parameters", lambda: _documented(probe))
    yield checks("one sample", samples=1)
    yield Check("several samples", lambda: _has_numbers(asked()))
    yield checks("heads averaged", heads="mean")
    yield checks("heads apart", heads=3)
    yield checks("both branches", branches=("cond", "uncond"))
    yield Check("branch evaluated half of the time", lambda: _clean(lambda: _has_numbers(ask(_half(runs(**several))))))
    for branch in ("cond", "uncond"):
        yield Check(f"branch {branch} alone", partial(_one_branch, ask, runs, branch))
    for part in PARTS:
        yield Check(f"without {part}", partial(_lacking, probe, partial(runs, **several), part, ask))
    yield Check("labels and units", lambda: _labels(asked()))
    yield Check("same again", lambda: _same(asked(), ask(runs(**several)), exact=True))
    yield Check("dask as eager", lambda: _same(asked(), ask(_lazy(runs(**several)))))
    yield Check("run left as it was", lambda: _unchanged(runs(**several), ask))
    yield Check("bounded memory", lambda: bounded(probe, make_run(samples=MANY), **params))
    yield Check("pickled", lambda: _same(asked(), ask(runs(**several), _pickled(probe)), exact=True))
    if probe.plot is not None:
        yield Check("plot", lambda: _drawn(probe, asked().copy(deep=True)))


def _documented(probe: Probe) -> None:
    text = inspect.getdoc(probe.fn) or ""
    assert probe.summary.endswith((".", ")")), "the docstring's first line is missing or no sentence"
    for name, p in list(inspect.signature(probe.fn).parameters.items())[1:]:
        assert p.kind is p.KEYWORD_ONLY, f"parameter {name!r} is not keyword-only"
        assert p.default is not p.empty, f"parameter {name!r} has no default"
        assert name in text.replace("`", " ").split() or f"`{name}" in text, f"the docstring does not explain {name!r}"


def _has_numbers(result: xr.Dataset) -> None:
    numbers = [v for v in result.data_vars.values() if v.dtype.kind in "fiub"]
    assert any(np.isfinite(v.values).any() for v in numbers), "nothing in the result is a finite number"


def _labels(result: xr.Dataset) -> None:
    for name, variable in result.data_vars.items():
        assert variable.attrs.get("units"), f"variable {name!r} has no units"
        for dim in {"sample", "step", "band", "layer", "head", "branch"} & set(variable.dims):
            assert dim in result.coords, f"dimension {dim!r} of {name!r} has lost its labels"


def _clean(body: Callable[[], object]) -> None:
    """Run `body`; an InterpError of one sentence is as good as a result."""
    try:
        body()
    except InterpError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, f"not a clear sentence: {error}"


def _one_branch(ask: Callable[[Run], xr.Dataset], runs: Callable[..., Run], branch: str) -> None:
    run = runs(branches=(branch,))
    _clean(lambda: _has_numbers(ask(run)))


def _lacking(probe: Probe, whole: Callable[[], Run], part: str, ask: Callable[[Run], xr.Dataset]) -> None:
    node, names = PARTS[part]
    run = _stripped(whole(), node, names)
    wanted = probe.needs.get(node)
    declared = wanted is not None and (not names or wanted is True or bool({*names} & {*wanted}))
    try:
        result = ask(run)
    except InterpError as error:
        text = str(error)
        assert "\n" not in text and len(text) > 20, f"without {part}: not a clear sentence: {text}"
    except Exception as error:
        raise AssertionError(
            f"without {part}: {type(error).__name__}: {error}; declare that the probe needs {node!r}"
        ) from error
    else:
        assert not declared, f"the probe declares that it needs {node}, yet runs without {part}"
        _has_numbers(result)


def _stripped(run: Run, node: str, names: Collection[str]) -> Run:
    """The same run without a node, or without some of its arrays."""
    tree = run.tree.copy()
    if names and node in tree.children:
        tree[node] = xr.DataTree(tree.children[node].to_dataset(inherit=False).drop_vars(names, errors="ignore"))
    return Run(tree if names else tree.drop_nodes(node, errors="ignore"))


def _same(one: xr.Dataset, other: xr.Dataset, *, exact: bool = False) -> None:
    if exact:
        xr.testing.assert_identical(one, other)
    else:
        xr.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def _unchanged(run: Run, ask: Callable[[Run], xr.Dataset]) -> None:
    before = run.tree.copy(deep=True)
    ask(run)
    assert run.tree.identical(before), "the probe changed the run that it was given"


def _pickled(probe: Probe) -> Probe:
    try:
        pickle.dumps(probe)
        rebuild, arguments = probe.__reduce__()  # what unpickling would call; nothing here ever unpickles
        again = rebuild(*arguments)
    except (pickle.PicklingError, AttributeError, ImportError, TypeError) as error:
        raise AssertionError(f"the probe cannot be pickled (define it at the top of a module): {error}") from error
    return again


def _drawn(probe: Probe, result: xr.Dataset) -> None:
    from matplotlib.figure import Figure

    assert probe.plot is not None
    figure = probe.plot(result)
    assert isinstance(figure, Figure), f"the plot returned {type(figure).__name__}, not a matplotlib Figure"
    figure.canvas.draw()


def _lazy(run: Run) -> Run:
    """The same run with dask arrays, one chunk a sample."""

    def chunked(dataset: xr.Dataset) -> xr.Dataset:
        return dataset.map(
            lambda v: v.chunk({"sample": 1}) if "sample" in v.dims and v.dtype.kind in "fiub" else v,
            keep_attrs=True,
        )

    return like(run, chunked)


def _half(run: Run) -> Run:
    """The same run with every branch evaluated in the first half of the steps only."""

    def halved(dataset: xr.Dataset) -> xr.Dataset:
        def cut(v: xr.DataArray) -> xr.DataArray:
            evaluated = {"step", "branch"} <= set(v.dims) and v.dtype.kind == "f"
            return v.where(v["step"] < v["step"].max() / 2).astype(v.dtype) if evaluated else v

        return dataset.map(cut, keep_attrs=True)

    return like(run, halved)
