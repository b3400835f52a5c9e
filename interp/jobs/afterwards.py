"""What a job does when its samples are done: scores are written into the run, probes beside it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from interp.jobs.driver import Report
from interp.jobs.spec import Job
from interp.probes import find_probe
from interp.probes.needs import require
from interp.probes.progress import watched
from interp.stores import Layout, Run, open_run


def finish(job: Job, report: Report, *, say: Callable[[str], None], progress: bool) -> None:
    """Add what is missing of the job's scores, and answer its probes.

    The answers go to `<run>.probes/<name>.zarr`, which plain xarray opens; that of a probe which the job names twice, to
    `<name>-2.zarr`.
    """
    run = open_run(job.path)
    if job.scores:
        from interp.scoring import score

        run = score(run, job.scores, progress=progress)
        say(f"scores: {', '.join(map(str, run.scores.metric.values))}")
    seen: Counter[str] = Counter()
    for name, spec in _asked(job):
        seen[name] += 1
        target = probe_path(job.path, name, seen[name])
        if not report.made and _answers(target, spec):
            continue
        with watched() if progress else nullcontext():
            result = run.done.probe(name, **spec)
        result.attrs["asked"] = json.dumps(spec, sort_keys=True)
        _write(result, target)
        say(f"probe {name}: {target}")


def check_probes(job: Job, layout: Layout) -> None:
    """Raise InterpError for a probe that the job's run could not be asked, before it is made.

    What a probe needs of scores is not looked at: they come first.
    """
    groups = {
        name: xr.Dataset({n: (a.dims, np.broadcast_to(np.int8(0), a.shape)) for n, a in group.arrays.items()})
        for name, group in layout.groups.items()
    }
    columns = xr.Dataset({name: ("sample", np.zeros(len(layout))) for name in layout.samples})
    run = Run(xr.DataTree.from_dict({"/": columns, **groups}))
    for name, params in _asked(job):
        probe = find_probe(name)
        probe.check_params(params)
        needs = {node: wanted for node, wanted in probe.needs.items() if node not in ("scores", "x0")}
        require(run, needs, asker=f"probe {name!r}")


def _asked(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and parameters of the job's probes."""
    for one in job.probes:
        spec = {"name": one} if isinstance(one, str) else dict(one)
        yield str(spec.pop("name")), spec


def probe_path(run: Path, name: str, number: int = 1) -> Path:
    """Return where a job puts the answer of a probe that it names for the `number`-th time."""
    return run.with_name(f"{run.name}.probes") / f"{name}{f'-{number}' if number > 1 else ''}.zarr"


def _answers(target: Path, spec: dict[str, Any]) -> bool:
    """Whether there is an answer to a probe with these parameters."""
    if not target.exists():
        return False
    try:
        with xr.open_zarr(target, consolidated=False) as there:
            return bool(json.loads(there.attrs["asked"]) == json.loads(json.dumps(spec)))
    except (OSError, ValueError, KeyError):
        return False


def _write(result: xr.Dataset, target: Path) -> None:
    """Write an answer in one rename; what was there is replaced."""
    texts = [n for n, v in result.variables.items() if v.dtype.kind in "UT"]
    result = result.assign_coords({n: result[n].astype(object) for n in texts if n in result.coords})
    result = result.assign({n: result[n].astype(object) for n in texts if n in result.data_vars})
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(exist_ok=True)
    result.to_zarr(fresh, consolidated=False)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
