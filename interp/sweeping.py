"""`interp.sweep`: one intervention at every point of a grid of sites, windows, strengths, …, in one run."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from os import PathLike
from typing import Any, Literal

import numpy as np
import xarray as xr

from interp.capture import Capture
from interp.errors import InterpError, nearest, sentence_list
from interp.interventions import Intervention, from_spec
from interp.plan_arguments import Conditions
from interp.probes.comparing import DISTANCES
from interp.probes.sweeping import BETWEEN, point_name
from interp.stores import Run
from interp.tracing import trace

Metric = str | Callable[[Run], Any]
"""A score (`"clip"`, `"judge:target"`), `"image_distance"`, `"latent_distance"`, or a function run → one number a sample."""

WINDOW = "window"


def sweep(
    pipe: Any,
    prompts: Any,
    *,
    over: Mapping[str, Sequence[Any]],
    intervention: Any,
    metric: Metric | Sequence[Metric] = DISTANCES,
    corrupted: Sequence[Intervention] | None = None,
    seeds: Sequence[int] | int = 0,
    steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    batch_size: int | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    store: str | PathLike[str] | None = None,
    capture: Capture | None = None,
    resamples: int = 2000,
    progress: bool = True,
) -> xr.Dataset:
    """Try one intervention at every point of a grid and measure what each point does.

    It is one run: a condition a point beside `baseline`, all with the same prompts, seeds and noise. Asked again with the
    same `store`, it goes on where it stopped; `run.probe("sweep")` gives the answer again, `interp.probes.plot` draws it.

    Args:
        pipe, prompts, seeds, steps, guidance_scale, height, width, negative_prompt, batch_size, options, progress: As in
            `interp.trace`.
        over: The grid: name → values, e.g. `{"site": [...], "window": [(0, 0.5), (0.5, 1)]}`. A name is a field of the
            intervention; `window` gives both `start` and `stop`.
        intervention: A class or function that is called with the grid's names (`interp.Ablate`, `lambda site:
            interp.Patch(clean, site)`) and returns an intervention or a list; or an intervention, or its spec as a dict,
            whose fields are exchanged.
        metric: Scores (`"clip"`, `"judge:target"`, see `interp.score`), `"image_distance"`, `"latent_distance"`, a function
            of the run that returns one number a sample, or several.
        corrupted: Interventions that damage every point first; each point then tries to restore something, and `recovered`
            says how much came back (causal tracing).
        store: Path of the run.
        capture: What to keep; default: the pictures, where a metric needs them.
        resamples: Of the bootstrap over prompts.

    Returns:
        Dims: the grid's, then metric, pair (a prompt and seed). `effect`, `effect_mean`, `effect_interval`, with
        `corrupted` also `recovered` and `recovered_interval`: see the probe `sweep`.

    Raises:
        InterpError: a name of the grid is no field of the intervention, two points have the same name, and whatever
            `interp.trace` and `interp.score` refuse.

    >>> import interp
    >>> ds = interp.sweep("scenes", "a red circle", steps=2, over={"site": ["unet.mid_block:out", "unet.conv_in:out"]},
    ...                   intervention=interp.Ablate, metric="latent_distance", progress=False)
    >>> ds["effect"].dims, bool((ds["effect_mean"] > 0).all())
    (('site', 'metric', 'pair'), True)
    """
    conditions = _conditions(over, intervention, corrupted)
    metrics = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    run = trace(
        pipe, prompts, seeds=seeds, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        negative_prompt=negative_prompt, batch_size=batch_size, options=options, store=store, progress=progress,
        conditions=conditions,
        capture=capture or Capture(attention=None, latents=False, noise_pred=False, image=metrics != ["latent_distance"]),
    )  # fmt: skip
    run, names = _measured(run, metrics)
    return run.probe("sweep", metrics=names, resamples=resamples)


def _conditions(
    over: Mapping[str, Sequence[Any]], intervention: Any, corrupted: Sequence[Intervention] | None
) -> Conditions:
    if not over or any(isinstance(v, str) or not len(v) for v in over.values()):
        raise InterpError(f"over={over!r}: give one or more names, each with a list of values: {{'site': ['…', '…']}}")
    wrong = next((name for name in over if not name.isidentifier()), None)
    if wrong is not None:
        raise InterpError(f"over={{{wrong!r}: …}}: a name of the grid is a field of the intervention, or 'window'")
    taken = [name for name in over if name in ("metric", "pair", "bound", "prompt", "prompt_id", "seed")]
    if taken and not callable(intervention):
        raise InterpError(
            f"over={{{taken[0]!r}: …}}: the result has a {taken[0]!r} of its own; use a function with another name"
        )
    if isinstance(corrupted, Intervention):
        raise InterpError(f"interventions come in lists, in order of application: write corrupted=[{corrupted!r}]")
    first = list(corrupted or [])
    found: dict[str, list[Intervention]] = {"baseline": []} | ({"corrupted": first} if corrupted is not None else {})
    for values in product(*over.values()):
        point = dict(zip(over, values, strict=True))
        name = point_name({key: label(value) for key, value in point.items()})
        if name in found:
            raise InterpError(f"two points of the grid are called {name!r}; leave one out")
        found[name] = first + _filled(intervention, point)
    return found


def label(value: Any) -> str:
    """Return a grid value as text: numbers in short, pairs of numbers as a range, several names joined.

    >>> label((0.0, 0.5)), label(("a", "b")), label(None)
    ('0–0.5', 'a+b', 'all')
    """
    if value is None:
        return "all"
    if isinstance(value, (tuple, list)):
        numbers = len(value) == 2 and not any(isinstance(v, str) for v in value)
        ends = ("", "") if numbers else ()
        texts = [label(v) if v is not None else ends[i] if ends else "all" for i, v in enumerate(value)]
        return ("–" if numbers else "+").join(texts)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if BETWEEN in text:
        raise InterpError(f"the value {text!r} cannot be told from a name of several: it holds {BETWEEN!r}")
    return text


def _filled(intervention: Any, point: Mapping[str, Any]) -> list[Intervention]:
    """The interventions of one point."""
    if isinstance(intervention, Intervention):
        values, known = _expanded(point), [f.name for f in fields(intervention)]
        _check_names(type(intervention).__name__, values, known)
        return [replace(intervention, **values)]
    if isinstance(intervention, Mapping):
        return [from_spec({**intervention, **_expanded(point)})]
    if not callable(intervention):
        raise InterpError(
            f"intervention={intervention!r}: give a class or function, an intervention, or its spec as a dict"
        )
    parameters = inspect.signature(intervention).parameters
    values = dict(point) if WINDOW in parameters else _expanded(point)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _check_names(getattr(intervention, "__name__", repr(intervention)), values, list(parameters))
    made = intervention(**values)
    several = [made] if isinstance(made, Intervention) else made
    if not isinstance(several, Sequence) or not all(isinstance(one, Intervention) for one in several):
        raise InterpError(
            f"the function of the grid returned {made!r}, which is neither an intervention nor a list of them"
        )
    return list(several)


def _expanded(point: Mapping[str, Any]) -> dict[str, Any]:
    """Give `window` as start and stop."""
    if WINDOW not in point:
        return dict(point)
    pair = point[WINDOW]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InterpError(f"a window is a pair (start, stop), not {pair!r}")
    return {**{k: v for k, v in point.items() if k != WINDOW}, "start": pair[0], "stop": pair[1]}


def _check_names(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InterpError(
                f"over={{{name!r}: …}}: {what} has no {name!r}{nearest(name, known)}; it has {sentence_list(known, 12)}"
            )


def _measured(run: Run, metrics: Sequence[Metric]) -> tuple[Run, list[str]]:
    """Add what is missing of the metrics to the run; return it, and the names that were asked for."""
    from interp.scoring import score

    names = [m for m in metrics if isinstance(m, str) and m in DISTANCES]
    wanted = [m for m in metrics if isinstance(m, str) and m not in DISTANCES]
    missing = [m for m in wanted if not _complete(run, m)]
    if missing:
        run = score(run, missing)
    for one in metrics:
        if not isinstance(one, str):
            name = getattr(one, "__name__", type(one).__name__).replace("<lambda>", "metric")
            values = np.asarray(one(run), dtype=np.float64)
            if values.shape != (len(run),):
                raise InterpError(
                    f"the metric {name!r} gave an array of shape {values.shape}; it must give one number a sample ({len(run)})"
                )
            run.write_scores({name: values})
            wanted.append(name)
    return run, names + [n for m in wanted for n in _scores_of(run, m)]


def _scores_of(run: Run, metric: str) -> list[str]:
    """Names of a metric's scores in the run: `clip` may be several."""
    known = [str(n) for n in run.scores["metric"].values] if "scores" in run.tree.children else []
    return [n for n in known if n == metric or n.startswith(f"{metric}:")]


def _complete(run: Run, metric: str) -> bool:
    """Whether every sample has been scored by an earlier call."""
    names = _scores_of(run, metric)
    return bool(names) and bool(np.isfinite(run.scores.sel(metric=names).values).all())
