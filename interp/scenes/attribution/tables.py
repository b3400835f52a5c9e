"""The tables of the program: means with 95 % intervals over pictures, of the reporting half but for "choosing half"."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from interp.probes.bootstrap import mean_interval
from interp.scenes.attribution.pictures import KINDS
from interp.scenes.attribution.recipes import AGAINST, AVERAGES, DAAM, SPREAD, Recipe
from interp.scenes.attribution.scores import CROSS, GEOMETRIC, WAYS, WITH_SELF, Choice, Part, Scores, Whole
from interp.scenes.marked import Cell, shown
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


class Table(NamedTuple):
    """Columns, the first of which names the rows, and rows of cells."""

    columns: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"| {' | '.join(self.columns)} |", "|---|" + "---:|" * (len(self.columns) - 1)]
        return "\n".join([*lines, *(f"| {' | '.join(map(shown, row))} |" for row in self.rows)])


class Report:
    """What the two halves of the pictures say."""

    def __init__(
        self, first: Scores, second: Scores, choice: Choice, layers: list[str], levels: tuple[int, ...]
    ) -> None:
        self.first, self.second, self.choice, self.layers, self.levels = first, second, choice, layers, levels
        self.units = np.array(second.picture)
        self.rows = [f"{k} `{name}`" for k, name in enumerate(layers)]
        self.asked: list[tuple[dict[str, float | None], np.ndarray]] = []  # cells that wait for their numbers

    def tables(self) -> dict[str, Table]:
        """Return every table by its name."""
        found = {
            "recipes": self.recipes(),
            "kinds": self.kinds(),
            "averages": self.averages(),
            "spreading": self.spreading(),
        }
        for measure, name in enumerate(MEASURES):
            found |= {f"levels, {way}, {name}": self.by_level(way, measure) for way in WAYS}
            found[f"heads, {name}"] = self.by_head(measure)
        self.settle()
        return found

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

    def mean(self, values: np.ndarray, chosen: Any = slice(None)) -> dict[str, float | None]:
        """Return a cell that `settle` gives the mean of some targets and its 95 % interval over pictures."""
        some = np.full(len(values), np.nan)
        some[chosen] = values[chosen]
        self.asked.append(({}, some))
        return self.asked[-1][0]

    def settle(self) -> None:
        """Compute all cells that were asked for at once: drawing pictures anew is what takes time."""
        means, intervals = mean_interval(np.stack([values for _, values in self.asked], 1), self.units)
        for (cell, _), mean, (low, high) in zip(self.asked, means, intervals, strict=True):
            cell |= {"value": float(mean), "low": float(low), "high": float(high)}
        self.asked.clear()

    def summary(self) -> str:
        """Return how much there was, what was chosen, and by how much it is better."""
        lines = [
            f"{len(set(self.first.picture))} pictures chose, {len(set(self.second.picture))} with {len(self.second.kind)} words"
            f" and spans report; noise levels {', '.join(map(str, self.levels))}; chance is {np.mean(self.second.chance):.3f}.",
            "",
        ]
        lines += [f"- {text}: {' · '.join(n.recipe)}" for text, n in self.choice.rows.items() if isinstance(n, Whole)]
        best, more = (self.second.of(self.choice.rows[text])[0] for text in (CROSS, WITH_SELF))
        others = ("DAAM: mean of all", "geometric mean against the strongest word")
        gaps = {f"{CROSS} minus {text}": self.mean(best - self.second.of(FIXED[text])[0]) for text in others}
        gaps[f"what self-attention adds to {CROSS}"] = self.mean(more - best)
        self.settle()
        return "\n".join([*lines, *(f"- {text}: {shown(cell)}" for text, cell in gaps.items())])

    def named(self) -> dict[str, Any]:
        """Return what the first tables have rows of, by their texts: fixed recipes, what was chosen, what needs the choice."""
        names: dict[str, Any] = FIXED | self.choice.rows | {n: n for n in self.second.found if isinstance(n, str)}
        at = {text: n.at if isinstance(n, Part) else () for text, n in names.items()}
        return {text + (f" ({', '.join(map(str, at[text]))})" if at[text] else ""): n for text, n in names.items()}

    def recipes(self) -> Table:
        """Return every measure of every named recipe."""
        rows: list[list[Cell]] = []
        for text, name in self.named().items():
            precision, point, overlap, own = self.values(name)
            half = f"{self.first.precision(name):.3f}" if name in self.first.found else "–"
            at = f"{THRESHOLDS[self.threshold(name)]:.2f}"
            rows.append([text, half, *(self.mean(v) for v in (precision, point, own, overlap)), at])
        return Table(["recipe", "choosing half", "average precision", "pointing", "own object", "mIoU", "at"], rows)

    def kinds(self) -> Table:
        """Return the average precision of every named recipe by what is looked for."""
        kind = np.array(self.second.kind)
        rows: list[list[Cell]] = []
        for text, name in self.named().items():
            rows.append([text, *(self.mean(self.second.of(name)[0], kind == k) for k in KINDS)])
        return Table(["average precision", *KINDS], rows)

    def averages(self) -> Table:
        """Return the average precision of every average (rows) against everything (columns), every head, not spread."""

        def cell(average: str, against: str) -> Cell:
            return self.mean(self.second.of(Whole("all", Recipe(average, against, "as it is")))[0])

        return _table("average precision", list(AVERAGES), list(AGAINST), cell)

    def spreading(self) -> Table:
        """Return the average precision of the chosen recipe, spread in every way (rows), of each kind of capture."""
        average, against, _ = self.choice.rows[CROSS].recipe
        captures = {"every head": "all", "heads averaged": "mean"}

        def cell(spread: str, capture: str) -> Cell:
            return self.mean(self.second.of(Whole(captures[capture], Recipe(average, against, spread)))[0])

        return _table(f"{average} · {against}", list(SPREAD), list(captures), cell)

    def by_level(self, way: str, measure: int) -> Table:
        """Return a measure of each layer (rows) at each noise level (columns)."""
        levels = list(map(str, self.levels))

        def cell(row: str, column: str) -> Cell:
            layer = (self.rows.index(row),) if row in self.rows else ()
            level = (levels.index(column),) if column in levels else ()
            what = " and ".join(name for name, at in (("layer", layer), ("level", level)) if at)
            name = Part(way, what, (*layer, *level)) if what else Whole("all", WAYS[way])
            return self.mean(self.values(name)[measure])

        return _table(f"{way}, {MEASURES[measure]}", [*self.rows, "all"], [*levels, "all"], cell)

    def by_head(self, measure: int) -> Table:
        """Return a measure of each head over all noise levels, by log-odds."""
        every = sum(isinstance(n, Part) and n[:2] == ("log-odds", "head") for n in self.second.found)
        heads = [f"head {h}" for h in range(every // len(self.layers))]

        def cell(row: str, column: str) -> Cell:
            at = self.rows.index(row) * len(heads) + heads.index(column)
            return self.mean(self.values(Part("log-odds", "head", (at,)))[measure])

        return _table(f"log-odds, {MEASURES[measure]}", self.rows, heads, cell)


def _table(corner: str, rows: list[str], columns: list[str], cell: Callable[[str, str], Cell]) -> Table:
    return Table([corner, *columns], [[row, *(cell(row, column) for column in columns)] for row in rows])
