"""Measure word maps against true masks: `python -m interp.scenes.attribution --out attribution.md`.

Real renders of one and two objects, from seeds that training never used, enter at several noise levels; one forward pass
with text is recorded at each. The maps of color and shape words, and of spans such as "red circle", are scored against the
mask of their object, on the latents' grid, where a cell belongs to an object that covers more than half of it. Half of the
pictures choose (threshold, layer, weights), the other half reports.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interp.probes.bootstrap import mean_interval
from interp.probes.maps import resize_matrix
from interp.probes.rivals import FLOOR, log_odds, logarithm
from interp.probes.words import prompt_words
from interp.scenes.grammar import Scene
from interp.scenes.masks import THRESHOLDS, average_precision, intersection_over_union, pointing

LEVELS = (700, 500, 300, 100)
CELL = 4  # pixels of a latent's side
AT_ONCE = 16
KINDS = ("color", "shape", "span")


@dataclass(frozen=True)
class Maps:
    """What was recorded of one picture, and what is looked for in it.

    raw (level, unit, token, pixel): attention of each head of each layer, a unit, to the tokens of words, on the latents'
    grid, and logs, that of its logarithm. words: bool (word, token); wanted: bool (target, token); masks: bool (target,
    pixel); kinds of the targets. layer, grid: (unit,), of each unit.
    """

    raw: np.ndarray
    logs: np.ndarray
    words: np.ndarray
    wanted: np.ndarray
    masks: np.ndarray
    kinds: list[str]
    layer: np.ndarray
    grid: np.ndarray

    @property
    def shared(self) -> np.ndarray:
        """Which words each target is made of, bool (target, word)."""
        return (self.wanted.astype(int) @ self.words.T.astype(int)) > 0


def recorded(n: int, seed: int, levels: tuple[int, ...] = LEVELS, pipe: Any = None) -> Iterator[tuple[int, Maps]]:
    """Draw `n` pictures of the world and yield each with its maps, a few in memory at a time.

    Left out are scenes of two objects of one color or shape: a word would then mean either.
    """
    import interp
    from interp.scenes.world import draw

    drawn = draw(2 * n, seed=seed)
    chosen = [i for i, scene in enumerate(drawn.scenes) if _distinct(scene) and drawn.masks[i].any((1, 2))[0]][:n]
    pipe = interp.load("scenes") if pipe is None else pipe
    keep = interp.Capture(heads="all", latents=False, noise_pred=False, image=False)
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        texts = [drawn.captions[i] for i in part]
        run = interp.encode_image(pipe, drawn.images[part], levels, prompt=texts, capture=keep, batch_size=AT_ONCE)
        for j, i in enumerate(part):
            maps = _maps(run, j, drawn.scenes[i], drawn.masks[i])
            if maps.kinds:
                yield start + j, maps


def _distinct(scene: Scene) -> bool:
    shapes, colors = ({getattr(thing, name) for thing in scene.objects} for name in ("shape", "color"))
    return len(shapes) == len(colors) == len(scene.objects)


def _maps(run: Any, sample: int, scene: Scene, masks: np.ndarray) -> Maps:
    table = run.tokens().isel(sample=sample)
    found = prompt_words(*(table[f"token_{c}"].values.tolist() for c in ("text", "role", "word")))
    columns = np.concatenate([c for _, _, c in found])
    words = np.stack([np.isin(columns, c) for _, _, c in found])
    cells = masks.reshape(2, masks.shape[1] // CELL, CELL, -1, CELL).mean((2, 4)) > 0.5
    texts = [text for text, _, _ in found]
    kinds, wanted, truth = [], [], []
    for thing, mask in zip(scene.objects, cells, strict=False):
        for kind, text in zip(KINDS, ((thing.color,), (thing.shape,), (thing.color, thing.shape)), strict=True):
            at = next((k for k in range(len(texts)) if tuple(texts[k : k + len(text)]) == text), None)
            if at is not None and mask.any():
                kinds.append(kind)
                wanted.append(words[at : at + len(text)].any(0))
                truth.append(mask.ravel())
    raw: list[np.ndarray] = []
    logs: list[np.ndarray] = []
    layer: list[int] = []
    grid: list[int] = []
    side = cells.shape[-1]
    for g, name in enumerate(run.grids):
        probs = run.attention(name).isel(sample=sample, branch=0, token=columns).values.astype(np.float32)
        to = resize_matrix(probs.shape[-1], side).astype(np.float32)
        for values, kept in ((probs, raw), (logarithm(probs), logs)):
            large = to @ values @ to.T  # (level, layer, head, token, y, x)
            kept.append(large.reshape(len(large), -1, len(columns), side * side))
        layer += [len(set(layer)) + k // probs.shape[2] for k in range(probs.shape[1] * probs.shape[2])]
        grid += [g] * (probs.shape[1] * probs.shape[2])
    everything = np.maximum(np.concatenate(raw, 1), 0), np.concatenate(logs, 1)
    return Maps(*everything, words, np.array(wanted), np.array(truth), kinds, np.array(layer), np.array(grid))


# Recipes: from the maps of a picture to a map of each target (target, pixel)


def of_tokens(maps: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return means over tokens: maps (…, token, pixel), member bool (word, token) → (…, word, pixel)."""
    share = (member / member.sum(1, keepdims=True)).astype(maps.dtype)
    return share @ maps


def rival(m: Maps, logs: np.ndarray) -> np.ndarray:
    """Return each target's log-odds against its strongest rival, of logarithms (token, pixel)."""
    return log_odds(of_tokens(logs, m.wanted), of_tokens(logs, m.words), m.shared)


def recipes(m: Maps, levels: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the maps of each target by each recipe that has nothing to choose."""
    raw, logs = m.raw.mean((0, 1)), m.logs.mean((0, 1))
    fine = m.raw[:, m.grid != m.grid.max()].mean((0, 1))
    seen = np.maximum(m.raw, FLOOR)  # a cubic may leave a pixel without any attention
    renormalised = of_tokens(seen, m.wanted) / of_tokens(seen, m.words).sum(2, keepdims=True)
    spread = (m.raw - m.raw.mean(-1, keepdims=True)) / (m.raw.std(-1, keepdims=True) + 1e-12)
    standard = spread.mean((0, 1))
    heads = np.stack([logarithm(m.raw[:, m.layer == k].mean(1)) for k in np.unique(m.layer)]).mean((0, 1))
    late = np.array(levels) <= 300
    words, wanted = of_tokens(logs, m.words), of_tokens(logs, m.wanted)
    return {
        "DAAM: mean, without the coarsest grid": of_tokens(fine, m.wanted),
        "mean of all": of_tokens(raw, m.wanted),
        "mean, share of the words": of_tokens(raw, m.wanted) / np.maximum(of_tokens(raw, m.words).sum(0), FLOOR),
        "each map a share of the words (no BOS), mean": renormalised.mean((0, 1)),
        "each map standardised, mean": of_tokens(standard, m.wanted),
        "each map standardised, minus the mean word": of_tokens(standard, m.wanted)
        - of_tokens(standard, m.words).mean(0),
        "mean, log-odds against the strongest rival": rival(m, logarithm(raw)),
        "geometric mean": wanted,
        "geometric mean, minus the mean word": wanted - words.mean(0),
        "geometric mean, share of the words": np.exp(wanted) / np.exp(words).sum(0),
        "geometric mean, log-odds against the strongest rival": rival(m, logs),
        "the same, of maps averaged over heads": rival(m, heads),
        "the same, noise levels up to 300": rival(m, m.logs[late].mean((0, 1))),
    }


def parts(m: Maps) -> dict[tuple[Any, ...], np.ndarray]:
    """Return the maps of single layers, noise levels, both, and heads, by the mean and by log-odds."""
    found: dict[tuple[Any, ...], np.ndarray] = {}
    for k in np.unique(m.layer):
        mine = m.layer == k
        found["mean", "layer", int(k)] = of_tokens(m.raw[:, mine].mean((0, 1)), m.wanted)
        found["log-odds", "layer", int(k)] = rival(m, m.logs[:, mine].mean((0, 1)))
        for level in range(len(m.raw)):
            found["mean", "layer and level", int(k), level] = of_tokens(m.raw[level, mine].mean(0), m.wanted)
            found["log-odds", "layer and level", int(k), level] = rival(m, m.logs[level, mine].mean(0))
    for level in range(len(m.raw)):
        found["mean", "level", level] = of_tokens(m.raw[level].mean(0), m.wanted)
        found["log-odds", "level", level] = rival(m, m.logs[level].mean(0))
    for unit in range(m.raw.shape[1]):
        found["log-odds", "head", unit] = rival(m, m.logs[:, unit].mean(0))
    return found


def weighted(m: Maps, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return maps in which heads (unit,) weigh differently."""
    share = (weights / weights.sum()).astype(np.float32)
    return {
        "heads weighted, mean": of_tokens(np.tensordot(share, m.raw.mean(0), 1), m.wanted),
        "heads weighted, log-odds against the strongest rival": rival(m, np.tensordot(share, m.logs.mean(0), 1)),
    }


class Scores:
    """Average precision, pointing and overlap of every target by every recipe, and the picture of each target."""

    def __init__(self) -> None:
        self.picture: list[int] = []
        self.kind: list[str] = []
        self.chance: list[float] = []
        self.found: dict[Any, list[tuple[np.ndarray, ...]]] = {}

    def add(self, picture: int, m: Maps, maps: dict[Any, np.ndarray]) -> None:
        """Score the maps of one picture."""
        self.picture += [picture] * len(m.kinds)
        self.kind += m.kinds
        self.chance += m.masks.mean(1).tolist()
        both = np.concatenate(list(maps.values())), np.tile(m.masks, (len(maps), 1))
        scored = [s(*both) for s in (average_precision, pointing, intersection_over_union)]
        for k, name in enumerate(maps):
            at = slice(k * len(m.kinds), (k + 1) * len(m.kinds))
            self.found.setdefault(name, []).append(tuple(s[at] for s in scored))

    def of(self, name: Any) -> tuple[np.ndarray, ...]:
        """Return average precision (target,), pointing (target,) and overlap (target, threshold)."""
        return tuple(np.concatenate(part) for part in zip(*self.found[name], strict=True))

    def precision(self, name: Any) -> float:
        """Return the mean average precision."""
        return float(self.of(name)[0].mean())


def measure(
    n: int, seed: int, levels: tuple[int, ...] = LEVELS, pipe: Any = None
) -> tuple[Scores, Scores, dict[str, tuple[Any, ...]]]:
    """Score every recipe: on the first half of the pictures, on the second, and what the first half chose, by name."""
    first, second = Scores(), Scores()
    chosen: dict[str, tuple[Any, ...]] = {}
    weights = np.ones(1)
    for picture, m in recorded(n, seed, levels, pipe):
        if picture >= n // 2 and not chosen:
            chosen, weights = _choose(first)
        scores = second if picture >= n // 2 else first
        scores.add(picture, m, recipes(m, levels) | parts(m) | (weighted(m, weights) if chosen else {}))
        if picture % 32 == 0:
            sys.stderr.write(f"{picture} of {n} pictures\n")
    return first, second, chosen


CLASSES = (("mean", "layer"), ("mean", "layer and level"), ("log-odds", "layer"), ("log-odds", "layer and level"),
           ("log-odds", "head"))  # fmt: skip
TWIN = {  # whose threshold a recipe takes that was not scored on the first half
    "heads weighted, mean": "mean of all",
    "heads weighted, log-odds against the strongest rival": "geometric mean, log-odds against the strongest rival",
}


def _choose(scores: Scores) -> tuple[dict[str, tuple[Any, ...]], np.ndarray]:
    """Return the best part of each class by average precision, and the weight of each head: its square above chance."""
    best: dict[str, tuple[Any, ...]] = {}
    for how, what in CLASSES:
        names = [name for name in scores.found if name[:2] == (how, what)]
        best[f"best {what}, {how}"] = max(names, key=scores.precision)
    heads = [name for name in scores.found if name[:2] == ("log-odds", "head")]
    above = np.array([scores.precision(name) for name in heads]) - np.mean(scores.chance)
    return best, np.maximum(above, 0) ** 2 + 1e-12


def table(first: Scores, second: Scores, chosen: dict[str, tuple[Any, ...]]) -> str:
    """Return the results on the second half as Markdown, with bootstrap 95 % intervals over pictures."""
    names: dict[str, Any] = {str(n): n for n in second.found if isinstance(n, str)}
    names |= chosen
    lines = [
        "| recipe | choosing half | average precision | color | shape | span | pointing | mIoU | at |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    units, kind = np.array(second.picture), np.array(second.kind)

    def shown(values: np.ndarray) -> str:
        mean, (low, high) = mean_interval(values, units)
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    for text, name in names.items():
        precision, point, overlap = second.of(name)
        at = int(first.of(TWIN.get(text, name))[2].mean(0).argmax())
        of_kind = " | ".join(f"{precision[kind == k].mean():.3f}" for k in KINDS)
        half = f"{first.precision(name):.3f}" if name in first.found else "–"
        which = "" if isinstance(name, str) else f" ({', '.join(map(str, name[2:]))})"
        cells = (
            text + which,
            half,
            shown(precision),
            of_kind,
            shown(point),
            shown(overlap[:, at]),
            f"{THRESHOLDS[at]:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(scores: Scores, how: str, layers: list[str], levels: tuple[int, ...]) -> str:
    """Return the average precision of each layer (rows) at each noise level (columns) as Markdown."""
    lines = [f"| {how} | {' | '.join(map(str, levels))} | all |", "|---|" + "---:|" * (len(levels) + 1)]
    for k, name in enumerate(layers):
        cells = [scores.precision((how, "layer and level", k, level)) for level in range(len(levels))]
        cells.append(scores.precision((how, "layer", k)))
        lines.append(f"| {k} `{name}` | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    every = [scores.precision((how, "level", level)) for level in range(len(levels))]
    return "\n".join([*lines, "| all | " + " | ".join(f"{c:.3f}" for c in every) + " | |"])


def head_table(scores: Scores, layers: list[str], heads: int) -> str:
    """Return the average precision of each head over all noise levels, by log-odds, as Markdown."""
    lines = ["| log-odds | " + " | ".join(f"head {h}" for h in range(heads)) + " |", "|---|" + "---:|" * heads]
    for k, name in enumerate(layers):
        cells = [scores.precision(("log-odds", "head", k * heads + h)) for h in range(heads)]
        lines.append(f"| {k} `{name}` | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.attribution", description=__doc__)
    parser.add_argument("--n", type=int, default=512, help="pictures, half of which choose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="timesteps, the noisiest first")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    asked = parser.parse_args(given)
    import interp

    levels, started = tuple(asked.levels), time.monotonic()
    pipe = interp.load("scenes")
    first, second, chosen = measure(asked.n, asked.seed, levels, pipe)
    layers = _layers(pipe, levels)
    heads = sum(name[:2] == ("log-odds", "head") for name in second.found) // len(layers)
    text = "\n\n".join(
        [
            f"{len(set(first.picture))} pictures chose, {len(set(second.picture))} with {len(second.kind)} words and spans "
            f"report; noise levels {', '.join(map(str, levels))}; chance is {np.mean(second.chance):.3f}.",
            table(first, second, chosen),
            *(grid_table(second, how, layers, levels) for how in ("mean", "log-odds")),
            head_table(second, layers, heads),
        ]
    )
    sys.stdout.write(text + "\n")
    sys.stderr.write(f"{time.monotonic() - started:.0f} s\n")
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
