"""The commands of the command line that are about runs and batch jobs: `run`, `info`, `verify`."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from interp.errors import InterpError

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run: run.zarr, run.zarr.zip or s3://bucket/run.zarr.")]


def add_commands(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(name="run", short_help="Run a batch job from a file, or go on with it.")(run)
    app.command(short_help="Say what a run holds and how it was made.")(info)
    app.command(short_help="Check that a run is whole.")(verify)


def run(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file; see docs/jobs.md.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where the run goes, instead of the job file's 'store'.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompt table, instead of the job file's 'prompts'.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its size; compute nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed samples again.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", "-w", help="Processes of this machine, each on its own GPU; 0 is this process.")
    ] = 0,
    limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="A worker's batch that takes longer is ended.")
    ] = 3600.0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask scheduler, e.g. tcp://10.0.0.1:8786.")
    ] = None,
    scheduler_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of a Dask scheduler; one is started if it is not there.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of job files, for editors.")] = False,
) -> None:
    """Run a batch job, or go on with it: the same command again does what is missing.

    Exit code: 0 all samples done, 1 some failed, 2 a mistake in the job or the command, 130 stopped by Ctrl-C.
    """
    from interp.jobs import job_schema, read_job, run_job

    if schema:
        print(json.dumps(job_schema(), indent=2))
        return
    if job is None:
        raise InterpError("interp run needs a job file: interp run job.yaml (interp run --schema describes it)")
    if sum((workers > 0, scheduler is not None, scheduler_file is not None)) > 1:
        raise InterpError("give one of --workers, --scheduler and --scheduler-file")
    wanted = read_job(job, store=store, prompts=prompts)
    if dry_run:
        from interp.jobs.tracing import TraceWork

        print(TraceWork(wanted.model_dump(mode="json"), str(wanted.path)).describe())
        return
    signal.signal(signal.SIGTERM, _stop)  # what a batch system sends before it kills
    report = run_job(
        wanted, workers=workers, scheduler=scheduler, scheduler_file=None if scheduler_file is None else str(scheduler_file),
        limit=limit, retry_failed=retry_failed,
    )  # fmt: skip
    print(report)
    raise typer.Exit(report.code)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def info(path: RunPath) -> None:
    """Say what a run holds: samples, conditions, arrays, how it was made."""
    from interp.stores import open_run

    opened = open_run(path)
    print(opened.summary())
    failed = opened.samples.query("status == 2")
    for number, text in failed["error"].head(10).items():
        print(f"sample {number} failed: {text}")
    if len(failed) > 10:
        print(f"… and {len(failed) - 10} more")
    raise typer.Exit(1 if len(failed) else 0)


def verify(
    path: RunPath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged samples to be done again, by interp run or interp trace.")
    ] = False,
) -> None:
    """Read every finished sample of a run and check shapes, checksums and finiteness."""
    from interp.stores import StoreError, open_run
    from interp.stores.integrity import broken_tables, check, repair_run

    try:
        opened = open_run(path)
    except StoreError as error:
        try:
            broken = broken_tables(Path(path))
        except ValueError:  # there is no run
            raise error from None
        if not broken:
            raise
        print("\n".join([*broken, f"{_counted(len(broken), 'problem')} found, without which the run cannot be opened"]))
        raise typer.Exit(1) from None
    problems = check(opened, progress=True)
    for problem in problems:
        print(problem)
    print(f"{_counted(len(problems), 'problem')} found")
    if repair and problems:
        again = repair_run(opened, problems)
        own = sum(p.path.endswith("zarr.json") for p in problems)
        if own:
            print(f"{_counted(own, 'file')} of metadata written again")
        numbers = f": {', '.join(map(str, again))}" if again else ""
        print(f"{_counted(len(again), 'sample')} will be done again by the command that made the run{numbers}")
    raise typer.Exit(1 if problems else 0)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
