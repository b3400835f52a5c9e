"""Train the bundled model organism: `python -m interp.scenes.train --out training`, all phases, one command.

Each phase resumes from its checkpoint, so a run that was cut off, or boxed with `--seconds`, goes on where it
stopped. `--smoke` trains a miniature of the miniature for a few steps, in seconds, on a CPU.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from interp.scenes.pack import pack
from interp.scenes.parts import FULL, SMOKE
from interp.scenes.train_loop import Plan
from interp.scenes.train_phases import PHASES

# The recipe of the weights that ship: steps, batch, learning rate, weight decay, cooldown, and how slowly averaged
# weights follow.
RECIPE = {
    "vae": {"steps": 1042, "batch": 128, "rate": 1e-3, "decay": 0.0, "cooldown": 0.5, "average": 0.998},
    "clip": {"steps": 2811, "batch": 1024, "rate": 8e-4, "decay": 0.02, "cooldown": 0.6, "average": 0.998},
    "judge": {"steps": 2788, "batch": 384, "rate": 1.5e-3, "decay": 0.02, "cooldown": 0.5, "average": 0.998},
    "unet": {"steps": 13922, "batch": 256, "rate": 1e-3, "decay": 0.01, "cooldown": 0.4, "average": 0.9985},
}


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.train", description=__doc__)
    parser.add_argument("phases", nargs="*", help=f"which phases, in order; all: {' '.join(PHASES)} pack")
    parser.add_argument("--out", type=Path, default=Path("training"), help="where checkpoints and models go")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, a few steps")
    parser.add_argument("--steps", type=int, help="steps of each phase, in place of the recipe's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop each phase after so long")
    parser.add_argument("--budget", type=float, default=float("inf"), help="end the schedule after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that write captions (default: 0 on a CPU, else 4)")
    parser.add_argument("--text-layers", type=int, help="depth of the text encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile, even on a GPU")
    return parser


def main(given: list[str] | None = None) -> None:
    """Run the phases asked for."""
    asked = arguments().parse_args(given)
    sizes = SMOKE if asked.smoke else FULL
    if asked.text_layers:
        sizes = replace(sizes, text_layers=asked.text_layers)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    unknown = set(asked.phases) - {*PHASES, "pack"}
    if unknown:
        raise SystemExit(f"no phase {', '.join(sorted(unknown))}; the phases are {' '.join(PHASES)} pack")
    for name in asked.phases or [*PHASES, "pack"]:
        if name == "pack":
            pack(asked.out, asked.out / "weights")
            continue
        recipe = dict(RECIPE[name])
        if asked.smoke:
            recipe |= {"steps": 4, "batch": 16}
        if asked.steps is not None:
            recipe["steps"] = asked.steps
        plan = Plan(
            name,
            asked.out,
            steps=int(recipe["steps"]),
            batch=int(recipe["batch"]),
            rate=recipe["rate"],
            decay=recipe["decay"],
            cooldown=recipe["cooldown"],
            average=recipe["average"],
            seconds=asked.seconds,
            budget=asked.budget,
            seed=asked.seed,
            workers=asked.workers if asked.workers is not None else (4 if asked.device == "cuda" else 0),
            device=asked.device,
            compiled=asked.device == "cuda" and not asked.eager,
        )
        PHASES[name](plan, sizes)


if __name__ == "__main__":
    main()
