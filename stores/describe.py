"""Say in words what a run holds, for `repr(run)` and `interp info`."""

import math
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.stores.table import DONE, FAILED

if TYPE_CHECKING:
    from interp.stores.reader import Run


def describe(run: "Run") -> str:
    """Return a newcomer's overview: samples by status, conditions, how it was made, every node with its
    dims.
    """
    status = run.samples["status"].to_numpy()
    done, failed = int((status == DONE).sum()), int((status == FAILED).sum())
    counts = [f"{done} done"] + ([f"{failed} failed"] if failed else [])
    waiting = len(run) - done - failed
    counts += [f"{waiting} to do"] if waiting else []
    size = _size(_bytes(run.tree))
    lines = [
        f"<Run {run.path or 'in memory'}: {len(run)} samples ({', '.join(counts)}), {size}>",
        f"  conditions: {_shortened(run.conditions)}",
        f"  prompts: {run.samples['prompt_id'].nunique()}, seeds: {run.samples['seed'].nunique()}",
    ]
    lines += [f"  {key}: {_value(run.attrs[key])}" for key in _SHOWN if run.attrs.get(key) is not None]
    for node in run.tree.subtree:
        if node.path == "/" or not node.data_vars:
            continue
        lines.append(f"  {node.path.strip('/')}")
        lines += [f"    {_variable(array)}" for array in node.data_vars.values()]
    return "\n".join(lines)


_SHOWN = ("pipeline", "scheduler", "steps", "guidance_scale", "size", "prediction_type", "created")


def _variable(array: xr.DataArray) -> str:
    dims = ", ".join(f"{d} {s}" for d, s in array.sizes.items())
    return f"{array.name} ({dims}) {array.dtype}, {_size(array.nbytes)}"


def _bytes(tree: xr.DataTree) -> int:
    return sum(v.nbytes for node in tree.subtree for v in node.to_dataset(inherit=False).data_vars.values())


def _size(nbytes: float) -> str:
    """Return a size in the largest unit that leaves at least 1: "3.2 MiB"."""
    power = min(4, int(math.log(nbytes, 1024))) if nbytes >= 1 else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {unit}"


def _shortened(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _value(value: object) -> str:
    """Return an attribute on one line: a pipeline's or scheduler's class rather than its whole
    configuration.
    """
    if isinstance(value, dict):
        named = [str(value[k]) for k in ("class", "_class_name", "name", "id") if value.get(k)]
        return " ".join(named) or ", ".join(f"{k} {v}" for k, v in list(value.items())[:4])
    if isinstance(value, list | tuple | np.ndarray):
        return " × ".join(str(v) for v in value)
    return str(value)
