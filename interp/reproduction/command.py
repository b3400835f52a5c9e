"""The command `interp reproduce`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def add_command(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(short_help="The experiments of arXiv:2405.15330, as a report.")(reproduce)


def reproduce(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the runs and the report; resumed if it exists.")
    ] = Path("reproduction"),
    model: Annotated[str, typer.Option(help="'scenes' (bundled), a local diffusers folder, or a Hub id.")] = "scenes",
    quick: Annotated[bool, typer.Option("--quick", help="Five pairs, ten steps: minutes on two cores.")] = False,
    pairs: Annotated[int | None, typer.Option(help="Pairs of prompts; each gives two exchanged pictures.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise that all prompts and conditions start from.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default is the model's own.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Picture size in pixels.")] = None,
    only: Annotated[str | None, typer.Option(metavar="E4,E8", help="These experiments alone.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="T2I-CompBench's color.txt, texture.txt and complex.txt.")
    ] = None,
    coco: Annotated[Path | None, typer.Option(metavar="FILE", help="captions_val2014.json, for E8.")] = None,
    clip_model: Annotated[str | None, typer.Option(help="CLIP that scores models other than scenes.")] = None,
    blip_model: Annotated[
        str | None, typer.Option(help="BLIP that judges them by questions (BLIP-VQA), and then decides.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples that run together; default: by device.")] = None,
) -> None:
    """Run the experiments of arXiv:2405.15330 and write a report with intervals and verdicts; resumes."""
    from dataclasses import replace

    from interp.reproduction import driver
    from interp.reproduction.settings import Settings
    from interp.reproduction.settings import quick as small

    settings = small(model) if quick else Settings(model=model)
    given: dict[str, Any] = {
        "pairs": pairs, "steps": steps, "guidance_scale": guidance, "clip_model": clip_model, "batch_size": batch_size,
        "blip_model": blip_model,
        "prompts": None if prompts is None else str(prompts), "coco": None if coco is None else str(coco), "size": _size(size),
    }  # fmt: skip
    settings = replace(settings, seed=seed, **{k: v for k, v in given.items() if v is not None})
    print(driver.reproduce(out, settings, only=None if only is None else [k.strip() for k in only.split(",")]))


def _size(text: str | None) -> tuple[int, int] | None:
    from interp.errors import InterpError

    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise InterpError(f"cannot read the size {text!r}: write HEIGHTxWIDTH, e.g. 512x512")
    return int(height), int(width)
