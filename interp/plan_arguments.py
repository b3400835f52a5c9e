"""The arguments of a plan: each is checked, and said in one sentence if it is wrong, before anything else is done."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from interp.errors import InterpError, nearest
from interp.families import Family, find_family
from interp.interventions import Intervention
from interp.loading import origin
from interp.prompts import PromptTable

Conditions = Mapping[str, Sequence[Intervention]]


def check_options(pipe: Any, family: Family, options: Mapping[str, Any]) -> None:
    """Pipelines swallow unknown arguments in **kwargs: a typo there would be silent."""
    if not isinstance(options, Mapping):
        raise InterpError(
            f"options={options!r}: give arguments of the pipeline's call by name, {{'guidance_rescale': 0.7}}"
        )
    own = {
        "prompt", "negative_prompt", "num_inference_steps", "height", "width", "generator", "num_images_per_prompt",
        "output_type", "return_dict", family.guidance_argument,
    }  # fmt: skip
    known = [n for n in inspect.signature(type(pipe).__call__).parameters if n not in own | {"self", "kwargs", "args"}]
    for name, value in options.items():
        if name in own:
            raise InterpError(
                f"options={{{name!r}: …}}: the run decides this itself; use the argument of the same meaning (seeds= for more "
                "images of a prompt)"
            )
        if name not in known:
            raise InterpError(f"{type(pipe).__name__} has no call argument {name!r}{nearest(name, known)} (options=…)")
        try:
            json.dumps(value)
        except TypeError:
            kind = type(value).__name__
            raise InterpError(
                f"options={{{name!r}: …}} is a {kind}; options are written into the run as JSON"
            ) from None


def read_seeds(seeds: Any) -> list[int]:
    """Return the seeds as a list."""
    given = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) for s in given)
    if not given or not whole or len(set(given)) < len(given):
        raise InterpError(f"seeds={seeds!r}: give one or more different whole numbers")
    if any(not -(2**63) <= s < 2**63 for s in given):
        raise InterpError(f"seeds={seeds!r}: a seed has at most 63 bits")
    return [int(s) for s in given]


def picture_size(family: Family, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the model's own where none is given."""
    default = family.default_size()
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, Integral) or side < 1):
            raise InterpError(f"{name}={side!r}: give a number of pixels, or None for the model's own")
    high, wide = int(height or default[0]), int(width or default[1])
    if high % family.multiple or wide % family.multiple:
        raise InterpError(
            f"a picture of {wide}×{high} pixels cannot be made: both sides must be multiples of {family.multiple}"
        )
    return high, wide


def named_conditions(
    interventions: Sequence[Intervention] | None, conditions: Conditions | None
) -> dict[str, list[Intervention]]:
    """Return the conditions by name; `interventions` are one of them."""
    if conditions is not None and interventions is not None:
        raise InterpError("give either interventions= (one condition) or conditions= (several by name), not both")
    if conditions is not None and not isinstance(conditions, Mapping):
        raise InterpError(f"conditions={conditions!r}: give lists of interventions by name, e.g. {{'baseline': []}}")
    for name, changes in (conditions or {}).items():
        if not str(name).strip() or not isinstance(changes, Sequence | Intervention):
            raise InterpError(
                f"conditions={{{name!r}: {changes!r}}}: a condition is a name and a list of interventions"
            )
    for given in (interventions, *(conditions or {}).values()):
        if isinstance(given, Intervention):
            raise InterpError(f"interventions come in lists, in order of application: write [{given!r}]")
    if conditions is None:
        found = list(interventions or [])
        return {"baseline" if not found else "intervened": found}
    if not conditions:
        raise InterpError('conditions= is empty; give at least {"baseline": []}')
    return {str(name): list(changes) for name, changes in conditions.items()}


def samples_together(pipe: Any, batch_size: int | str) -> int:
    """Return how many samples run together."""
    if batch_size == "auto":  # wide enough to fill the device, narrow enough for a laptop's memory
        # a pipeline looks through all its modules to say where it is
        return 16 if torch.cuda.is_available() and pipe.device.type == "cuda" else 4
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InterpError(f"batch_size={batch_size!r}: give a whole number of samples, at least 1, or 'auto'")
    return batch_size


def default_guidance(pipe: Any) -> float:
    """Return the guidance scale that the model recommends, or that its pipeline class uses."""
    if origin(pipe)["id"] == "scenes":
        from interp.scenes import DEFAULT_GUIDANCE

        return float(DEFAULT_GUIDANCE)
    default = inspect.signature(type(pipe).__call__).parameters.get(find_family(pipe).guidance_argument)
    return float(default.default) if default is not None else 1.0


def ordered_samples(
    table: PromptTable, conditions: Mapping[str, Any], seeds: list[int], batch_size: int
) -> tuple[dict[str, list], list[list[int]]]:
    """Order condition × prompt × seed; a batch never mixes conditions, whose interventions differ."""
    order = [(c, p, s) for c in conditions for p in range(len(table)) for s in seeds]
    per = len(table) * len(seeds)
    batches = [
        list(range(start, min(start + batch_size, first + per)))
        for first in range(0, len(order), per)
        for start in range(first, first + per, batch_size)
    ]
    number = {i: b for b, members in enumerate(batches) for i in members}
    columns: dict[str, list] = {name: [values[p] for _, p, _ in order] for name, values in table.columns.items()}
    columns["seed"] = [s for _, _, s in order]
    columns["condition"] = [c for c, _, _ in order]
    columns["prompt_id"] = [p for _, p, _ in order]
    columns["batch"] = [number[i] for i in range(len(order))]
    return columns, batches
