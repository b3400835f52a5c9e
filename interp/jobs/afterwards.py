"""What a job does when its samples are done: scores are written into the run, probes beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from interp.jobs.driver import Report
from interp.jobs.spec import Job
from interp.stores import open_run


def finish(job: Job, report: Report, *, say: Callable[[str], None]) -> None:
    """Add what is missing of the job's scores, and answer its probes.

    The answers go to `<run>.probes/<name>.zarr`, which plain xarray opens.
    """
    run = open_run(job.path)
    if job.scores:
        from interp.scoring import score

        run = score(run, job.scores)
        say(f"scores: {', '.join(map(str, run.scores.metric.values))}")
    for one in job.probes:
        spec = {"name": one} if isinstance(one, str) else dict(one)
        name = str(spec.pop("name"))
        target = probe_path(job.path, name)
        if target.exists() and not report.made:
            continue
        result = run.done.probe(name, **spec)
        texts = [n for n, v in result.variables.items() if v.dtype.kind in "UT"]
        result = result.assign_coords({n: result[n].astype(object) for n in texts if n in result.coords})
        result = result.assign({n: result[n].astype(object) for n in texts if n in result.data_vars})
        fresh = target.with_name(f".{target.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(exist_ok=True)
        result.to_zarr(fresh, consolidated=False)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
        say(f"probe {name}: {target}")


def probe_path(run: Path, name: str) -> Path:
    """Return where a job puts the answer of a probe."""
    return run.with_name(f"{run.name}.probes") / f"{name}.zarr"
