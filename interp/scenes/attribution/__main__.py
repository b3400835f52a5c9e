"""The program: `python -m interp.scenes.attribution --n 512 --out attribution.md`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.scenes.attribution.pictures import LEVELS, recorded
from interp.scenes.attribution.scores import Choice, Scores, afterwards, choose, everything
from interp.scenes.attribution.tables import Report, Table
from interp.scenes.marked import fill, part


def measure(
    n: int, seed: int, levels: tuple[int, ...] = LEVELS, pipe: Any = None, at_once: int = 16
) -> tuple[Scores, Scores, Choice]:
    """Score everything: on the first half of the pictures, on the second, and what the first half chose."""
    first, second = Scores(), Scores()
    choice: Choice | None = None
    for picture, p in recorded(n, seed, levels, pipe, at_once):
        if picture >= n // 2 and choice is None:
            choice = choose(first)
        scores = first if choice is None else second
        scores.add(picture, p, everything(p) | (afterwards(p, choice, levels) if choice else {}))
        if picture % 32 == 0:
            sys.stderr.write(f"{picture} of {n} pictures\n")
    assert choice is not None
    return first, second, choice


def main(given: list[str] | None = None) -> None:
    """Measure, or read what was measured, print the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.attribution", description=__doc__)
    parser.add_argument("--n", type=int, default=512, help="pictures, half of which choose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="timesteps, the noisiest first")
    parser.add_argument("--at-once", type=int, default=16, help="pictures recorded together")
    parser.add_argument("--out", type=Path, help="Markdown file to write; every number goes to a .json file beside it")
    parser.add_argument("--measured", type=Path, help="a .json file that was written so: read it, measure nothing")
    parser.add_argument("--page", type=Path, help="page, such as docs/attribution.md, to put the tables into")
    asked = parser.parse_args(given)
    found = json.loads(asked.measured.read_text(encoding="utf-8")) if asked.measured else measured(asked)
    told = {"settings": found["settings"]["text"], "summary": found["summary"]}
    told |= {name: Table(**table).markdown() for name, table in found["tables"].items()}
    text = "\n".join(part(name, said) for name, said in told.items())
    sys.stdout.write(text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8")
        numbers = json.dumps(found, indent=1, ensure_ascii=False)
        asked.out.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    if asked.page:
        fill(asked.page, told)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for: settings, summary, and every table as columns and rows."""
    import interp

    levels, started = tuple(asked.levels), time.monotonic()
    pipe = interp.load("scenes")
    report = Report(*measure(asked.n, asked.seed, levels, pipe, asked.at_once), _layers(pipe, levels), levels)
    tables = {name: table._asdict() for name, table in report.tables().items()}
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else "CPU"
    seconds = round(time.monotonic() - started)
    said = f"n = {asked.n}, seed {asked.seed}; 95 % intervals from 2,000 resamples of pictures; {device}, {seconds} s."
    settings = {"n": asked.n, "seed": asked.seed, "levels": levels, "device": device, "seconds": seconds, "text": said}
    return {"settings": settings, "summary": report.summary(), "tables": _rounded(tables)}


def _rounded(value: Any) -> Any:
    """Return it with floats of 5 digits; NaN is null, as JSON has none."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return (round(value, 5) if value == value else None) if isinstance(value, float) else value


def _layers(pipe: Any, levels: tuple[int, ...]) -> list[str]:
    """Return the names of the layers, as they are numbered in the tables."""
    import interp

    keep = interp.Capture(heads="mean", latents=False, noise_pred=False, image=False)
    run = interp.encode_image(pipe, np.zeros((128, 128, 3), "uint8"), levels[:1], prompt="a", capture=keep)
    sites = [str(site) for g in run.grids for site in run.attention(g)["layer"].values]
    return [s.replace(".transformer_blocks.0.attn2", "").replace("unet.", "") for s in sites]


if __name__ == "__main__":
    main()
