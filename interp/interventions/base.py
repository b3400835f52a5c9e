"""The contract of an intervention: a frozen dataclass with a window, what it claims, and how it attaches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal, Self

from interp.clock import Timeline
from interp.errors import InterpError, nearest
from interp.families import Family
from interp.hooks import HookRegistry
from interp.tokens import Tokens

Unit = Literal["fraction", "step", "sigma", "timestep"]


@dataclass(frozen=True)
class Batch:
    """What an intervention may know of the samples that run together.

    rows: the samples' rows of the prompt table; tokens: their prompts, tokenised; timeline: the noise levels of the
    run; guidance_scale: as asked for; arguments: of the pipeline's call, defaults filled in; seeds: the samples' own;
    prompt_ids: the numbers of their rows in the prompt table.
    """

    rows: list[dict[str, Any]]
    tokens: list[Tokens]
    timeline: Timeline
    guidance_scale: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    prompt_ids: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change of a sampling run within a window of steps.

    Args:
        start, stop: The window, half-open [start, stop); None reaches to the run's beginning or end. For `sigma` and
            `timestep`, which fall during sampling, start is the larger one.
        unit: `fraction` of the steps (default), `step`, `sigma` or `timestep`; it never depends on int or float.
    """

    start: float | None = None
    stop: float | None = None
    unit: Unit = "fraction"

    name: ClassVar[str]
    serialisable: ClassVar[bool] = True
    skips_more: ClassVar[bool] = False
    """While it runs it may skip more forward passes than `evaluated` tells beforehand."""

    def __post_init__(self) -> None:
        if self.unit not in ("fraction", "step", "sigma", "timestep"):
            raise InterpError(
                f"{self!r}: the unit of a window is 'fraction', 'step', 'sigma' or 'timestep'"
                f"{nearest(str(self.unit), ['fraction', 'step', 'sigma', 'timestep'])}"
            )
        bounds = [v for v in (self.start, self.stop) if v is not None]
        if not all(isinstance(v, Real) for v in bounds):
            raise InterpError(f"{self!r}: start and stop of a window are numbers")
        if self.unit == "fraction" and not all(0 <= v <= 1 for v in bounds):
            raise InterpError(
                f"{self!r}: a window in fractions of the run lies within 0 and 1; for step numbers say unit='step'"
            )
        falls = self.unit in ("sigma", "timestep")
        if len(bounds) == 2 and not falls and bounds[1] < bounds[0]:
            raise InterpError(f"{self!r}: the window ends before it starts")
        if len(bounds) == 2 and falls and bounds[0] < bounds[1]:
            raise InterpError(f"{self!r}: {self.unit} falls during sampling, so start must be larger than stop")

    def as_tuples(self, *names: str) -> None:
        """Let fields that hold several values take one alone, or a list; for `__post_init__`."""
        for name in names:
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else frozen(value))

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={_told(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def steps(self, timeline: Timeline) -> frozenset[int]:
        """Return the sampling steps within the window.

        Raises:
            InterpError: the window lies outside the run.
        """
        count = len(timeline)
        if self.unit in ("fraction", "step"):
            scale = count if self.unit == "fraction" else 1
            first = math.ceil((self.start or 0) * scale - 1e-9)
            last = count if self.stop is None else math.ceil(self.stop * scale - 1e-9)
            if first < 0 or first > count or last > count:
                raise InterpError(f"{self!r}: the window is outside the run, which has the steps 0–{count - 1}")
            return frozenset(range(first, last))
        levels = timeline.sigma if self.unit == "sigma" else timeline.timestep
        first_level = math.inf if self.start is None else self.start
        last_level = -math.inf if self.stop is None else self.stop
        if first_level < levels[-1] or last_level > levels[0]:
            raise InterpError(
                f"{self!r}: the window is outside the run, whose {self.unit} falls from {levels[0]:.4g} to {levels[-1]:.4g}"
            )
        return frozenset(i for i, level in enumerate(levels) if first_level >= level > last_level)

    def identity(self) -> Self:
        """Return this intervention with fields that change nothing: an empty window, unless it says otherwise."""
        return replace(self, start=1.0, stop=1.0, unit="fraction")

    def changes(self, timeline: Timeline) -> frozenset[int]:
        """Return the steps in which it may change something: the window, unless it says otherwise."""
        return self.steps(timeline)

    def claims(self) -> frozenset[str]:
        """Name what the intervention owns in its window: two owners are refused. See `interp.interventions.claims`."""
        return frozenset()

    def claims_in(self, family: Family) -> frozenset[str]:
        """Name what it owns in this model, where globs have become names."""
        return self.claims()

    def acts_on(self) -> tuple[str, ...]:
        """Return the branches whose rows it changes, one of which must be evaluated; () if it is about no rows."""
        return ()

    def writes(self, family: Family) -> list[str]:
        """Name the sites at which it writes, in its window."""
        return []

    def branches(self) -> tuple[str, ...] | None:
        """Return the branches evaluated within the window, or None to leave the choice to the pipeline."""
        return None

    def evaluated(self, timeline: Timeline) -> dict[int, tuple[str, ...]]:
        """Return, for each step in which it decides that, the branches that are evaluated at most."""
        kept = self.branches()
        return {} if kept is None else dict.fromkeys(self.steps(timeline), kept)

    def claimed(self, timeline: Timeline, family: Family | None = None) -> dict[str, frozenset[int]]:
        """Return what it claims, and in which steps: the window, unless it also decides about what lies around it."""
        claims = self.claims() if family is None else self.claims_in(family)
        return dict.fromkeys(claims, self.steps(timeline))

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Raise InterpError if the run cannot carry the intervention; called before anything runs."""

    def check_beside(self, others: Sequence["Intervention"], timeline: Timeline, family: Family) -> None:
        """Raise InterpError if the others of the list leave it, or one of them, without effect; called before anything runs."""

    def check_model(
        self, family: Family, prompts: list[tuple[Tokens, dict[str, Any]]], arguments: Mapping[str, Any]
    ) -> None:
        """Raise InterpError if this pipeline or one of the prompts cannot carry it; called before anything runs.

        prompts: tokenised, each with its row of the prompt table; arguments: of the pipeline's call.
        """

    def check_batch(self, family: Family, batch: Batch) -> None:
        """Raise InterpError if the model, or samples that will run together, lack what the intervention names.

        Called for every batch, before anything runs.
        """

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Put hooks for one batch; the registry takes them away."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Return name and fields as JSON-able values; `from_spec` is the inverse."""
        return {"name": self.name, **{k: _listed(v) for k, v in asdict(self).items()}}

    def window(self) -> dict[str, Any]:
        """Return start, stop and unit."""
        return {"start": self.start, "stop": self.stop, "unit": self.unit}

    def written(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the spec of an intervention that is Python: what is known of it, and that it cannot be rebuilt."""
        return {"name": self.name, **self.window(), **values, "serialisable": False}


def from_spec(spec: Mapping[str, Any]) -> Intervention:
    """Rebuild an intervention from its spec.

    Raises:
        InterpError: the name or a field is unknown; the nearest is named.

    >>> from_spec({"name": "remove_text", "start": 0.6})
    RemoveText(start=0.6)
    """
    from interp.probes.discovery import find_plugin, what_is

    values = dict(spec)
    if values.get("serialisable") is False:
        raise InterpError(
            f"{values.get('name')!r} is an edit in Python, of which a run keeps the text alone; make it again and give it "
            "to interp.trace"
        )
    name = str(values.pop("name", ""))
    cls = find_plugin(name, "interp.interventions")
    usable = isinstance(cls, type) and issubclass(cls, Intervention) and is_dataclass(cls)
    if not usable:
        raise InterpError(
            f"plugin {name!r} is {what_is(cls)}, no intervention: a frozen dataclass that is an Intervention"
        )
    known = [f.name for f in fields(cls)]
    for given in values:
        if given not in known:
            raise InterpError(
                f"{cls.__name__} has no field {given!r}{nearest(given, known) or ';'} it has: {', '.join(known)}"
            )
    return cls(**{k: frozen(v) for k, v in values.items()})


def frozen(value: Any) -> Any:
    """Return lists as tuples, also within each other, so that an intervention can be compared and hashed."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Tell whether a field holds a finite number, of at least so much; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= least


def _told(value: Any) -> str:
    """Return a field's value for a sentence: an array of many numbers (a vector, a mask) by its shape alone."""
    shape, inner = [], value
    while isinstance(inner, tuple) and inner:
        shape.append(len(inner))
        inner = inner[0]
    return f"<{'×'.join(map(str, shape))} numbers>" if math.prod(shape) > 32 and is_number(inner) else repr(value)


def _listed(value: Any) -> Any:
    return list(map(_listed, value)) if isinstance(value, tuple) else value


def attach_all(interventions: Sequence[Intervention], hooks: HookRegistry, batch: Batch) -> None:
    """Attach in order; the order of the list is the order of application."""
    for one in interventions:
        one.attach(hooks, batch)
