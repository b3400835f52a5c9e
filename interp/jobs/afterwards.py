"""What a job does when its samples are done: scores are written into the run, probes beside it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import xarray as xr

from interp.jobs.driver import Report
from interp.jobs.spec import Job
from interp.probes.progress import watched
from interp.stores import open_run


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
    for one in job.probes:
        spec = {"name": one} if isinstance(one, str) else dict(one)
        name = str(spec.pop("name"))
        seen[name] += 1
        target = probe_path(job.path, name, seen[name])
        if not report.made and _answers(target, spec):
            continue
        with watched() if progress else nullcontext():
            result = run.done.probe(name, **spec)
        result.attrs["asked"] = json.dumps(spec, sort_keys=True)
        _write(result, target)
        say(f"probe {name}: {target}")


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
