"""The tables of the program, as Markdown: all figures but "choosing half" are of the reporting half."""

from collections.abc import Callable
from typing import Any

import numpy as np

from interp.probes.bootstrap import mean_interval
from interp.scenes.attribution.pictures import KINDS
from interp.scenes.attribution.recipes import AGAINST, AVERAGES, DAAM, SPREAD, Recipe
from interp.scenes.attribution.scores import CROSS, GEOMETRIC, WAYS, WITH_SELF, Choice, Part, Scores, Whole
from interp.scenes.masks import THRESHOLDS

MEASURES = ("average precision", "pointing", "mIoU")
FIXED = {
    "DAAM's code: mean, without the coarsest grid": Part("mean", "without the coarsest grid", ()),
    "DAAM: mean of all": Whole("all", DAAM),
    "geometric mean": Whole("all", Recipe("geometric", "nothing", "as it is")),
    "mean against the strongest word": Whole("all", Recipe("mean", "the strongest word", "as it is")),
    "geometric mean against the strongest word": Whole("all", GEOMETRIC),
    "… of maps averaged over heads": Whole("mean", GEOMETRIC),
}


class Report:
    """What the two halves of the pictures say."""

    def __init__(
        self, first: Scores, second: Scores, choice: Choice, layers: list[str], levels: tuple[int, ...]
    ) -> None:
        self.first, self.second, self.choice, self.layers, self.levels = first, second, choice, layers, levels
        self.units = np.array(second.picture)
        self.widest = 0.0  # half of the widest interval among figures that are shown without theirs

    def text(self) -> str:
        """Return everything, and how wide the intervals are that the tables leave out."""
        grids = [self.levels_table(way, measure) for way in WAYS for measure in range(len(MEASURES))]
        heads = [self.heads_table(measure) for measure in range(len(MEASURES))]
        tables = [self.main(), self.factors(), self.spreads(), *grids, *heads]
        return "\n\n".join([f"{self.summary()}\n- figures without brackets: ± {self.widest:.3f} or less", *tables])

    def values(self, name: Any) -> tuple[np.ndarray, ...]:
        """Return a name's average precision, pointing, overlap at the first half's threshold, and own object: (target,)."""
        precision, point, overlap, own = self.second.of(name)
        return precision, point, overlap[:, self.threshold(name)], own

    def threshold(self, name: Any) -> int:
        """Return the position of the threshold of the best overlap on the choosing half; of the kin of what it lacks."""
        return int(self.first.of(name if name in self.first.found else self._kin(name))[2].mean(0).argmax())

    def _kin(self, name: str) -> Any:
        if name.startswith("heads weighted"):
            return Whole("all", WAYS[name.rpartition(", ")[2]])
        return self.choice.rows[WITH_SELF if name.startswith(WITH_SELF) else CROSS]

    def bare(self, values: np.ndarray, chosen: Any = slice(None)) -> float:
        """Return the mean of some targets, to be shown without its interval."""
        mean, (low, high) = mean_interval(values[chosen], self.units[chosen], resamples=500)
        self.widest = max(self.widest, float(high - low) / 2) if np.isfinite(high - low) else self.widest
        return float(mean)

    def interval(self, values: np.ndarray) -> str:
        """Return the mean and its 95 % interval over pictures."""
        mean, (low, high) = mean_interval(values, self.units)
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    def summary(self) -> str:
        """Return how much there was, what was chosen, and by how much it is better."""
        lines = [
            f"{len(set(self.first.picture))} pictures chose, {len(set(self.second.picture))} with {len(self.second.kind)} words"
            f" and spans report; noise levels {', '.join(map(str, self.levels))}; chance is {np.mean(self.second.chance):.3f}."
        ]
        lines += [f"- {text}: {' · '.join(n.recipe)}" for text, n in self.choice.rows.items() if isinstance(n, Whole)]
        best = self.second.of(self.choice.rows[CROSS])[0]
        for text in ("DAAM: mean of all", "geometric mean against the strongest word"):
            lines.append(f"- {CROSS} minus {text}: {self.interval(best - self.second.of(FIXED[text])[0])}")
        more = self.second.of(self.choice.rows[WITH_SELF])[0]
        return "\n".join([*lines, f"- what self-attention adds to {CROSS}: {self.interval(more - best)}"])

    def main(self) -> str:
        """Return the table with intervals."""
        names: dict[str, Any] = FIXED | self.choice.rows | {n: n for n in self.second.found if isinstance(n, str)}
        lines = [
            "| recipe | choosing half | average precision | color | shape | span | pointing | own object | mIoU | at |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        kind = np.array(self.second.kind)
        for text, name in names.items():
            precision, point, overlap, own = self.values(name)
            half = f"{self.first.precision(name):.3f}" if name in self.first.found else "–"
            which = f" ({', '.join(map(str, name.at))})" if isinstance(name, Part) and name.at else ""
            of_kind = [f"{self.bare(precision, kind == k):.3f}" for k in KINDS]
            others = [self.interval(values) for values in (point, own, overlap)]
            at = f"{THRESHOLDS[self.threshold(name)]:.2f}"
            cells = [text + which, half, self.interval(precision), *of_kind, *others, at]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def factors(self) -> str:
        """Return the average precision of every average (rows) against everything (columns), every head, not spread."""

        def cell(average: str, against: str) -> float:
            return self.bare(self.second.of(Whole("all", Recipe(average, against, "as it is")))[0])

        return _grid(
            "average precision", list(AVERAGES), list(AGAINST), lambda r, c: cell([*AVERAGES][r], [*AGAINST][c])
        )

    def spreads(self) -> str:
        """Return the average precision of the chosen recipe, spread in every way (rows), of each kind of capture."""
        average, against, _ = self.choice.rows[CROSS].recipe
        captures = {"every head": "all", "heads averaged": "mean"}

        def cell(row: int, column: int) -> float:
            recipe = Recipe(average, against, [*SPREAD][row])
            return self.bare(self.second.of(Whole([*captures.values()][column], recipe))[0])

        return _grid(f"{average} · {against}", list(SPREAD), list(captures), cell)

    def levels_table(self, way: str, measure: int) -> str:
        """Return a measure of each layer (rows) at each noise level (columns)."""

        def cell(row: int, column: int) -> float | None:
            layer, level = row < len(self.layers), column < len(self.levels)
            what = "layer and level" if layer and level else "layer" if layer else "level"
            at = (*((row,) if layer else ()), *((column,) if level else ()))
            return self.bare(self.values(Part(way, what, at))[measure]) if at else None

        rows = [f"{k} `{name}`" for k, name in enumerate(self.layers)]
        return _grid(f"{way}, {MEASURES[measure]}", [*rows, "all"], [*map(str, self.levels), "all"], cell)

    def heads_table(self, measure: int) -> str:
        """Return a measure of each head over all noise levels, by log-odds."""
        heads = sum(isinstance(n, Part) and n[:2] == ("log-odds", "head") for n in self.second.found) // len(
            self.layers
        )

        def cell(row: int, column: int) -> float:
            return self.bare(self.values(Part("log-odds", "head", (row * heads + column,)))[measure])

        rows = [f"{k} `{name}`" for k, name in enumerate(self.layers)]
        return _grid(f"log-odds, {MEASURES[measure]}", rows, [f"head {h}" for h in range(heads)], cell)


def _grid(corner: str, rows: list[str], columns: list[str], cell: Callable[[int, int], float | None]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for r, name in enumerate(rows):
        found = [cell(r, c) for c in range(len(columns))]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in found) + " |")
    return "\n".join(lines)
