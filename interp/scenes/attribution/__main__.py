"""The program: `python -m interp.scenes.attribution --n 512 --out attribution.md`."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from interp.scenes.attribution.pictures import LEVELS, recorded
from interp.scenes.attribution.scores import Choice, Scores, afterwards, choose, everything
from interp.scenes.attribution.tables import Report


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
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.attribution", description=__doc__)
    parser.add_argument("--n", type=int, default=512, help="pictures, half of which choose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="timesteps, the noisiest first")
    parser.add_argument("--at-once", type=int, default=16, help="pictures recorded together")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    asked = parser.parse_args(given)
    import interp

    levels, started = tuple(asked.levels), time.monotonic()
    pipe = interp.load("scenes")
    found = measure(asked.n, asked.seed, levels, pipe, asked.at_once)
    text = Report(*found, _layers(pipe, levels), levels).text()
    sys.stdout.write(text + "\n")
    sys.stderr.write(f"{time.monotonic() - started:.0f} s on {pipe.device}\n")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")


def _layers(pipe: Any, levels: tuple[int, ...]) -> list[str]:
    """Return the names of the layers, as they are numbered in the tables."""
    import interp

    keep = interp.Capture(heads="mean", latents=False, noise_pred=False, image=False)
    run = interp.encode_image(pipe, np.zeros((128, 128, 3), "uint8"), levels[:1], prompt="a", capture=keep)
    sites = [str(site) for g in run.grids for site in run.attention(g)["layer"].values]
    return [s.replace(".transformer_blocks.0.attn2", "").replace("unet.", "") for s in sites]


if __name__ == "__main__":
    main()
