"""Small variants of the model organism, trained alike but for one thing, and what EOS weighs in each.

`python -m interp.scenes.variants --out variants --seconds 420` trains text encoder and UNet of every variant, side by
side on one GPU, each phase boxed by time; then exchanges EOS between prompts and asks the attribute judge, which shares
no weights with any of them. Results are one JSON file, which keeps what it has of other variants. The same command again
goes on where it stopped. The autoencoder and the judge are those that ship. `--merge FILE --json docs/variants.json --page
docs/reproduce.md` trains nothing: it adds the results of FILE and writes the table into the page.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.probes.bootstrap import mean_interval
from interp.scenes import DEFAULT_GUIDANCE, folder
from interp.scenes.bench import Bench
from interp.scenes.captions import pairs
from interp.scenes.grammar import agreement_of, parse
from interp.scenes.marked import fill, shown
from interp.scenes.pack import pack
from interp.scenes.parts import FULL, SMOKE
from interp.scenes.train import RECIPE
from interp.scenes.train_loop import Plan
from interp.scenes.train_phases import PHASES

SHARE = {"clip": 0.4, "unet": 0.42}
"""Of the time box; the rest is for compiling, loading and measuring."""


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe of docs/scenes.md, and in words."""

    text: str
    layers: int = 4
    width: int = 128
    pooling: str = "eos"
    plain: float = 0.5
    negatives: bool = True


VARIANTS = {
    "control": Variant("as shipped: CLIP compares the state of the first EOS with pictures"),
    "words": Variant("CLIP compares the mean of the words' states instead", pooling="words"),
    "plain": Variant("captions of a single order, short", plain=1.0),
    "prototype": Variant("captions of a single order, short, and no hard negatives", plain=1.0, negatives=False),
    "shallow": Variant("text encoder of 2 layers instead of 4", layers=2),
    "narrow": Variant("text encoder of width 64 instead of 128", width=64),
    "wide": Variant("text encoder of width 256 instead of 128", width=256),
    "beside": Variant("as shipped, trained beside narrow and wide, for as many steps"),
}


def main(given: list[str] | None = None) -> None:
    """Train and measure the variants asked for, each in a process of its own."""
    asked = arguments().parse_args(given)
    unknown = set(asked.variants) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"no variant {', '.join(sorted(unknown))}; the variants are {', '.join(VARIANTS)}")
    if asked.alone is not None:
        one(asked.alone, asked)
    elif asked.merge is not None:
        publish(json.loads(asked.merge.read_text(encoding="utf-8"))["variants"], asked)
    else:
        train(asked)


def train(asked: argparse.Namespace) -> None:
    """Train and measure variants side by side; SystemExit if one of them did not end."""
    out: Path = asked.out
    _share_parts(out, asked.smoke, asked.device)
    names = asked.variants or list(VARIANTS)
    options = [f"--{k}={getattr(asked, k)}" for k in ("out", "seconds", "n", "seed", "workers", "device")]
    options += [f"--{k}" for k in ("smoke", "eager") if getattr(asked, k)]
    command = [sys.executable, "-m", "interp.scenes.variants", *options]
    started = [subprocess.Popen([*command, f"--alone={name}"]) for name in names]
    codes = [process.wait() for process in started]
    publish({n: json.loads(path.read_text()) for n in VARIANTS if (path := out / n / "result.json").exists()}, asked)
    failed = [name for name, code in zip(names, codes, strict=True) if code]
    if failed:
        raise SystemExit(f"{', '.join(failed)} did not end; the same command goes on with them")


def publish(found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Add results to the JSON file, and write the table of all that it then has into the page, if one is given."""
    target = asked.json or asked.out / "variants.json"
    every = json.loads(target.read_text(encoding="utf-8"))["variants"] if target.exists() else {}
    every |= found
    ordered = {name: every[name] for name in sorted(every, key=[*VARIANTS, *every].index)}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"variants": ordered}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(table(ordered) + "\n")
    if asked.page is not None:
        fill(asked.page, {"variants": table(ordered)})


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown, one row a variant, numbers with their intervals."""
    lines = [
        "| variant | UNet steps | A alone: shows A | words of A, EOS of B: shows A | shows B | B − A | n, device, seconds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, v in found.items():
        swapped, about = v["words of A, EOS of B"], v["settings"]
        cells = [shown(e) for e in (v["whole"]["with A"], *(swapped[k] for k in ("with A", "with B", "B − A")))]
        how = f"{v['n']}, {about['device']}, {about['seconds']:g}"
        lines.append(f"| {name}: {v['text']} | {v['unet']['steps']:,} | {' | '.join(cells)} | {how} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.variants", description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"which; all: {' '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("variants"), help="where checkpoints and models go")
    parser.add_argument(
        "--json", type=Path, help="file that the results are added to; default: variants.json in the folder"
    )
    parser.add_argument("--merge", type=Path, metavar="FILE", help="train nothing: add the results of this file")
    parser.add_argument("--page", type=Path, help="page, such as docs/reproduce.md, to write the table into")
    parser.add_argument("--seconds", type=float, default=420.0, help="time for everything")
    parser.add_argument("--n", type=int, default=256, help="pairs of prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that write captions, of each variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile, even on a GPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, a few steps")
    parser.add_argument("--alone", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser


def _settings(asked: Any) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    return {"seconds": asked.seconds, "seed": asked.seed, "device": name, "share": SHARE}


def _share_parts(out: Path, smoke: bool, device: str) -> None:
    """Put autoencoder and judge where the phases look for shared parts: those that ship, or, to try it, a tiny autoencoder."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "vae").exists():
        return
    shutil.copytree(folder() / "judge", out / "judge", dirs_exist_ok=True)
    if smoke:
        PHASES["vae"](Plan("vae", out, steps=1, batch=8, rate=1e-3, device=device), SMOKE)
    else:
        shutil.copytree(folder() / "vae", out / "vae")


def one(name: str, asked: Any) -> None:
    """Train one variant within its time, and measure it."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    chosen, out = VARIANTS[name], asked.out / name
    size = SMOKE if asked.smoke else FULL
    width = size.text_width * chosen.width // FULL.text_width
    sizes = replace(size, text_layers=chosen.layers, text_width=width, pooling=chosen.pooling)
    about: dict[str, Any] = {"text": chosen.text, "settings": _settings(asked)}
    for phase in SHARE:
        recipe = {**RECIPE[phase], **({"steps": 2, "batch": 8} if asked.smoke else {})}
        plan = Plan(
            phase, out, steps=int(recipe["steps"]), batch=int(recipe["batch"]), rate=recipe["rate"],
            decay=recipe["decay"], cooldown=recipe["cooldown"], average=recipe["average"],
            budget=SHARE[phase] * asked.seconds, seed=asked.seed, workers=0 if asked.smoke else asked.workers,
            plain=chosen.plain, negatives=chosen.negatives,
            device=asked.device, compiled=asked.device == "cuda" and not asked.eager,
        )  # fmt: skip
        PHASES[phase](plan, sizes)
        about[phase] = progress_of(plan)
    pack(out, out / "weights")
    about |= measure(out / "weights", asked.device, 2 if asked.smoke else asked.n, 2 if asked.smoke else 25)
    (out / "result.json").write_text(json.dumps(about, indent=1) + "\n")


def progress_of(plan: Plan) -> dict[str, float]:
    """Return the steps and the seconds of a phase, read from its checkpoint."""
    from safetensors import safe_open

    with safe_open(plan.checkpoint, "pt") as file:
        found = file.metadata()
    return {"steps": int(found["step"]), "batch": plan.batch, "seconds": round(json.loads(found["spent"]), 1)}


def measure(source: Path, device: str, n: int, steps: int) -> dict[str, Any]:
    """Return how well the variant draws, and what the judge sees when EOS of B follows the words of A.

    Numbers are {"value", "low", "high"}: means over prompts or pairs with bootstrap 95 % intervals.
    """
    bench = Bench(source, device, n, steps, DEFAULT_GUIDANCE)
    both = pairs(n, seed=4)
    first, second = [a for a, _ in both], [b for _, b in both]
    a, b = bench.model.read(first), bench.model.read(second)

    def seen(text: Any) -> np.ndarray:
        images = bench.generate(text)
        if images.shape[-1] != FULL.pixels:
            images = torch.nn.functional.interpolate(images, size=(FULL.pixels, FULL.pixels))
        found = bench.scorer.judge(images)
        return np.array(
            [[agreement_of(parse(p), s) for p in (x, y)] for x, y, s in zip(first, second, found, strict=True)]
        )

    conditions = {
        "whole": a,
        "words of A, EOS of B": a.with_eos_of(b),
        "words only": a.only(True, False),
        "EOS only": a.only(False, True),
    }
    objects = np.array([len(parse(p).objects) for p in first])
    found: dict[str, Any] = {"n": n, "steps": steps, "guidance": DEFAULT_GUIDANCE}
    for name, text in conditions.items():
        values = seen(text)
        found[name] = {
            "with A": _mean(values[:, 0]),
            "with B": _mean(values[:, 1]),
            "B − A": _mean(values[:, 1] - values[:, 0]),
        }
        for number in (1, 2):
            gap = (values[:, 1] - values[:, 0])[objects == number]
            found[name][f"B − A, {number} object{'s' * (number > 1)}"] = _mean(gap)
    return found


def _mean(values: np.ndarray) -> dict[str, float]:
    mean, interval = mean_interval(values[:, None], np.arange(len(values)))
    numbers = {"value": float(mean[0]), "low": float(interval[0, 0]), "high": float(interval[0, 1])}
    return {k: round(v, 4) for k, v in numbers.items()}


if __name__ == "__main__":
    main()
