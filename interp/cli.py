"""The command line: `interp demo · trace · run · sweep · score · probe · probes · sites · info · verify · reproduce`.

Exit codes: 0 done, 1 some samples failed, 2 the user's mistake (one sentence, no traceback).
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from interp.command_values import read_assignments, read_conditions, read_intervention, read_seeds, read_size
from interp.errors import InterpError
from interp.job_commands import RunPath, add_commands
from interp.reproduction.command import add_command
from interp.sweep_command import sweep
from interp.warning import plainly

INTERRUPTED = 130
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from interp import __version__

        print(f"interp {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Trace, probe and intervene on text-to-image diffusion models. Start with: interp demo"""


Model = Annotated[str, typer.Argument(help="'scenes' (bundled), a local diffusers folder, or a Hub id.")]


@app.command(short_help="Figures of the bundled model, traced, probed and changed.")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for run.zarr, the figures and index.html.")] = Path(
        "demo"
    ),
) -> None:
    """Trace, probe and intervene on the bundled model; writes a page of figures (a few minutes on two cores)."""
    from interp.demo import run_demo

    print(run_demo(out))


@app.command(short_help="Generate pictures and record what happens inside.")
def trace(
    model: Model,
    prompts: Annotated[
        list[str], typer.Argument(help="One or more prompts, or a .csv, .jsonl or .txt file with a column 'prompt'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the run goes; a run that lies there is resumed.")],
    seeds: Annotated[str, typer.Option(help="Seeds: '0', '0,1,7' or '0-3'.")] = "0",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default is the model's own.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Picture size in pixels.")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    capture: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="What to keep, e.g. heads=all (repeatable).")
    ] = None,
    intervene: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME FIELD=VALUE …'", help="e.g. 'remove_text start=0.6' (repeatable, in order)."),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME: INTERVENTION; …'",
            help="Several conditions with the same noise, e.g. 'baseline:' and 'late: remove_text start=0.6'.",
        ),
    ] = None,
    score: Annotated[list[str] | None, typer.Option(help="Metric to add: clip, judge (repeatable).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples that run together; default: by device.")] = None,
    plan_only: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its size; compute nothing.")] = False,
) -> None:
    """Generate pictures from prompts and record attention, latents and noise predictions into a run."""
    import interp

    table: Any = Path(prompts[0]) if len(prompts) == 1 and prompts[0].endswith((".csv", ".jsonl", ".txt")) else prompts
    height, width = read_size(size)
    settings: dict[str, Any] = {
        "seeds": read_seeds(seeds),
        "steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "negative_prompt": negative,
        "capture": interp.Capture(**read_assignments(capture or [])),
        "interventions": [read_intervention(text) for text in intervene] if intervene else None,
        "conditions": read_conditions(condition) if condition else None,
        "batch_size": "auto" if batch_size is None else batch_size,
    }
    if plan_only:
        print(interp.plan(model, table, **settings))
        return
    run = interp.trace(model, table, store=out, scores=score or (), **settings)
    print(run.summary())


def _list_metrics(wanted: bool) -> None:
    if wanted:
        from interp.scoring import list_metrics

        _print_plugins(list_metrics())
        raise typer.Exit


@app.command(short_help="Score a run's pictures (alignment, distances, …).")
def score(
    run: RunPath,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            help="A metric, alone or against a column (clip:target) or condition (l1:baseline), or FILE.py:NAME; or "
            "x0: decoded per step (repeatable). Default: clip, and judge for runs of scenes.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="A metric's option (repeatable).")
    ] = None,
    clip_model: Annotated[str | None, typer.Option(help="Hub id of the CLIP for models other than scenes.")] = None,
    model: Annotated[str | None, typer.Option(help="For x0: the model that decodes; default is the run's own.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="For x0: which steps, e.g. '0:50:5' or 0.2 for a fifth; default is all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that are read and scored together.")] = 32,
    again: Annotated[bool, typer.Option("--again", help="Compute anew what is there already.")] = False,
    each: Annotated[bool, typer.Option("--each", help="Print every sample's scores too.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_metrics, help="List the installed metrics.")
    ] = False,
) -> None:
    """Score a run's pictures and write the result into it; prints means with 95 % intervals by condition.

    A plain file is executed: run only what you trust.
    """
    from interp.scoring import mean_scores
    from interp.scoring import score as score_run
    from interp.scoring.means import table

    options = read_assignments(param or []) | ({} if clip_model is None else {"clip_model": clip_model})
    clash = sorted({"pipe", "steps", "batch_size", "again", "progress"} & set(options))
    if clash:
        raise InterpError(f"--param {clash[0]} is no metric's option; see interp score --help")
    scored = score_run(
        run, metric, pipe=model, steps=_steps(steps), batch_size=batch_size, again=again, progress=True, **options
    )
    if set(metric or ()) != {"x0"}:
        if each:
            print(scored.scores.to_pandas().to_string(float_format="%.3f"))
        means = mean_scores(scored)
        print(table(means, scored.tree["scores"].attrs.get("by_condition")))
        print(f"intervals: bootstrap over prompts, {means.attrs['resamples']:,} resamples, seed {means.attrs['seed']}")
    if "x0" in (metric or ()):
        print(f"x0: {' × '.join(f'{d} {n}' for d, n in scored.x0.sizes.items())}")


def _steps(text: str | None) -> Any:
    """Read `0:50:5` as a slice, `0.2` as a share, `0,5,7` as a list."""
    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part else None for part in text.split(":")))
        return float(text) if "." in text else [int(part) for part in text.split(",")]
    except (ValueError, TypeError):
        raise InterpError(f"--steps {text!r}: write '0:50:5', '0,10,20' or a share such as 0.2") from None


@app.command(short_help="Ask a question of a run.")
def probe(
    name: Annotated[str, typer.Argument(help="A probe (interp probes lists them), FILE.py or FILE.py:NAME.")],
    run: RunPath,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter (repeatable).")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", help="Write .png, .csv or .zarr, by suffix (repeatable).")
    ] = None,
) -> None:
    """Ask a question of a run; prints the labelled answer. A plain file is executed: run only what you trust."""
    from interp.probes import plot
    from interp.probes.progress import watched
    from interp.stores import open_run

    for path in out or []:
        if path.suffix not in (".png", ".csv", ".zarr"):
            raise InterpError(f"cannot write {str(path)!r}: the suffix must be .png, .csv or .zarr")
        if any(parent.is_file() for parent in path.parents):
            raise InterpError(f"cannot write {str(path)!r}: {str(path.parent)!r} is no folder")
        if path.suffix == ".zarr" and path.exists():
            raise InterpError(f"{str(path)!r} exists already; choose another path")
    opened = open_run(run)
    with watched():
        result = opened.probe(name, **read_assignments(param or []))
    print(result)
    for path in out or []:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            plot(result).savefig(path, dpi=150)
        elif path.suffix == ".csv":
            _long_table(result).to_csv(path, index=False)
        else:
            texts = [name for name, v in result.variables.items() if v.dtype.kind == "U"]
            result = result.assign({n: result[n].astype(object) for n in texts if n in result.data_vars}).assign_coords(
                {
                    n: result[n].astype(object) for n in texts if n in result.coords
                }  # fixed-width text has no Zarr 3 spec
            )
            result.to_zarr(path, consolidated=False)
        print(f"wrote {path}", file=sys.stderr)


@app.command(short_help="List the installed probes.")
def probes() -> None:
    """List the installed probes."""
    from interp.probes import list_probes

    _print_plugins(list_probes())


def _print_plugins(found: list[Any]) -> None:
    width = max((len(p.name) for p in found), default=0)
    for p in found:
        print(f"{p.name:<{width}}  {p.summary}\n{'':<{width}}  {p.source}")


@app.command(short_help="List what of a model can be recorded or changed.")
def sites(
    model: Model,
    match: Annotated[str, typer.Option("--match", "-m", help="Glob over site names, e.g. '*attn2:probs'.")] = "*",
) -> None:
    """List every place of a model that can be recorded or changed: name, kind, shape of one sample."""
    import interp

    print(interp.sites(model, match))


add_commands(app)
app.command(short_help="Try an intervention over sites, windows, ….")(sweep)
add_command(app)


def _long_table(result: Any) -> Any:
    """One row a number: `variable`, the dims that it has, `value`, and the labels of these; pictures are left out."""
    import pandas as pd

    parts = []
    for name, array in result.data_vars.items():
        if array.dtype.kind in "fiub" and array.dtype != "uint8":
            parts.append(array.to_dataframe("value").reset_index().assign(variable=name))
    table = pd.concat(parts)
    first = ["variable", *(d for d in map(str, result.sizes) if d in table), "value"]
    return table[[*first, *(c for c in table if c not in first)]]


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices on optional packages are not our user's
    try:
        with plainly():
            app()
    except InterpError as error:
        print(f"interp: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # which Typer makes of Ctrl-C
            print("interp: interrupted; the same command goes on where it stopped", file=sys.stderr)
            _leave()
        raise


def _leave() -> NoReturn:
    """End at once: everything is closed by now, and Python would take seconds to take the model libraries apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
