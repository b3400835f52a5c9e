"""The command `interp sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.command_values import read_assignments, read_call, read_intervention, read_seeds
from interp.errors import InterpError


def sweep(
    model: Annotated[str, typer.Argument(help="'scenes' (bundled), a local diffusers folder, or a Hub id.")],
    prompts: Annotated[
        list[str], typer.Argument(help="One or more prompts, or a .csv, .jsonl or .txt file with a column 'prompt'.")
    ],
    over: Annotated[
        list[str],
        typer.Option(metavar="NAME=[…]", help="A field and its values, 'window=[[0, 0.5], [0.5, 1]]' (repeatable)."),
    ],
    intervene: Annotated[
        str,
        typer.Option(metavar="'NAME FIELD=VALUE …'", help="The intervention that is tried, e.g. 'ablate value=mean'."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the run goes; a run that lies there is resumed.")],
    corrupt: Annotated[
        list[str] | None,
        typer.Option(help="What damages every point first, e.g. 'add_noise site=… scale=3' (repeatable)."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="A score or distance (repeatable); default: distances.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds: '0', '0,1,7' or '0-3'.")] = "0",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default is the model's own.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the answer into this .png.")] = None,
) -> None:
    """Try an intervention over a grid of sites, windows, …; prints mean effects with 95 % intervals."""
    import interp
    from interp.probes import plot
    from interp.probes.comparing import DISTANCES

    table: Any = Path(prompts[0]) if len(prompts) == 1 and prompts[0].endswith((".csv", ".jsonl", ".txt")) else prompts
    grid = read_assignments(over)
    for name, values in grid.items():
        if not isinstance(values, list):
            raise InterpError(f"--over {name}={values}: write a list of values, e.g. '{name}=[a, b]'")
    template, fields = read_call(intervene)
    spec = {"name": template, **fields}
    ds = interp.sweep(
        model, table, over=grid, intervention=spec, metric=metric or DISTANCES, seeds=read_seeds(seeds), steps=steps,
        guidance_scale=guidance, corrupted=[read_intervention(c) for c in corrupt] if corrupt else None, store=out,
    )  # fmt: skip
    name = "recovered" if corrupt else "effect"
    found = ds["recovered" if corrupt else "effect_mean"].to_dataframe(name=name)
    for bound in ("low", "high"):
        found[bound] = ds[f"{name}_interval"].sel(bound=bound).to_series()
    print(found[[name, "low", "high"]].to_string(float_format="%.3f"))
    if figure is not None:
        plot(ds).savefig(figure, dpi=150)
