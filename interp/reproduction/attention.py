"""E1, E3 and E10: shapes and masses of cross-attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.probes.bootstrap import mean_interval
from interp.probes.convergence import LUMINANCE, edge_f1, edges, shrunk
from interp.probes.style import BLACK, BLUE, ORANGE
from interp.reproduction import drawing
from interp.reproduction.exchange import ALIGN, SWAP, swap
from interp.reproduction.experiment import Experiment, Runs, pair_units
from interp.reproduction.measures import Answer, Check, Estimate, Figure, Table, curve, estimate
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings
from interp.stores import Run

CANNY = (
    "Canny's smoothing and thresholds, the size of the maps and the tolerance of edges are not stated: 1 pixel, 0.1 and 0.2 of "
    "the range, the latents' grid, none. Maps are means over all layers and heads of the branch with text."
)


def _needs(settings: Settings) -> dict[str, Conditions]:
    return {"attention": {}}


# E1


def _answer_e1(runs: Runs, settings: Settings) -> Answer:
    run = runs["attention"].condition("baseline")
    ds = run.probe("attention_convergence", resamples=1)
    units = pair_units(run, ds)
    steps = ds["step"].values
    count = np.isfinite(ds["f1"].values).sum(2)
    f1 = np.where(count > 0, np.nansum(ds["f1"].values, 2) / np.maximum(count, 1), np.nan)
    mean, interval = mean_interval(f1, units, resamples=settings.resamples, statistic=lambda m: m / m[:, -1:])
    n = len(np.unique(units))
    shown = [Estimate(float(m), float(i[0]), float(i[1]), n) for m, i in zip(mean, interval, strict=True)]
    k = int(np.argmin(np.abs(steps - 0.2 * settings.steps)))
    rise = f1[:, k] - f1[:, 0]
    label = f"t = {settings.steps - int(steps[k])}"
    checks = [
        Check(f"F1 at {label} over that of the last step", shown[k], ">", 0.8),
        Check(
            f"F1 at {label} minus that of the first step", estimate(rise, units, resamples=settings.resamples), ">", 0.0
        ),
    ]
    t = (settings.steps - steps).tolist()
    absolute = curve(f1, units, resamples=settings.resamples)
    panels = [
        ("Edges of maps against the picture", drawing.LABEL, "F1 / F1 of the last step", [("", t, shown, ORANGE, "-")]),
        ("The same, absolute", drawing.LABEL, "F1", [("", t, absolute, BLUE, "-")]),
    ]
    chosen = sorted({0, k // 2, k, len(steps) // 2, len(steps) - 1})
    rows = [[t[j], absolute[j], shown[j]] for j in chosen]
    figures = [
        Figure(drawing.lines(panels, "convergence of attention", limits=[(0, None), (0, None)]), drawing.NOTE),
        Figure(
            _strip(run, [int(steps[j]) for j in chosen]),
            "Maps of the words of one prompt, each scaled to its own range.",
        ),
    ]
    return Answer(
        checks, [Table(["t", "F1", "relative F1"], rows, "The paper's Figure 1, as numbers.")], figures,
        {"attention": ["baseline"]}, f"{len(run)} prompts of {n} pairs, {len(steps)} of {settings.steps} steps",
        f"relative F1 {shown[k].text(2)} at {label}",
    )  # fmt: skip


def _strip(run: Run, steps: list[int]) -> str:
    one = run.isel(sample=[0])
    rows, words = [], []
    picture = drawing.inline(one.images.isel(sample=0).values, "final picture")
    for s in steps:
        ds = one.probe("token_attribution", steps=[s], recipe="daam", normalize="none")
        words = [str(w) for w in ds["word_text"].values[0] if str(w)][:7]
        maps = ds["word_map"].values[0]
        rows.append(
            (f"t = {int(run.attrs['steps']) - s}", [drawing.heat(maps[w], words[w]) for w in range(len(words))])
        )
    return drawing.grid([*rows, ("picture", [picture])], words)


# E3


def _answer_e3(runs: Runs, settings: Settings) -> Answer:
    run = runs["attention"].condition("baseline")
    ds = run.probe("attention_mass").mean("layer")
    units = pair_units(run, ds)
    table = run.tokens()
    role, counts = table["token_role"].values, table["token_count"].values
    number = {r: np.where(role == r, counts, 0).sum(1)[:, None] for r in ("eos", "pad")}
    mass = {r: np.nan_to_num(ds["mass"].sel(role=r).values) for r in ("eos", "pad")}
    per = {
        "[SOS]": ds["mass_per_token"].sel(role="bos").values,
        "words": ds["mass_per_token"].sel(role="word").values,
        "[EOS]": (mass["eos"] + mass["pad"]) / (number["eos"] + number["pad"]),
    }
    whole = {
        "[SOS]": ds["mass"].sel(role="bos").values, "words": ds["mass"].sel(role="word").values,
        "[EOS]": mass["eos"] + mass["pad"],
    }  # fmt: skip
    t = (settings.steps - ds["step"].values).tolist()
    more: Any = {"resamples": settings.resamples}
    curves = {k: curve(v, units, **more) for k, v in per.items()}
    sums = {k: curve(v, units, **more) for k, v in whole.items()}
    color = {"[SOS]": BLACK, "words": BLUE, "[EOS]": ORANGE}
    panels = [
        (title, drawing.LABEL, "share of attention", [(k, t, v, color[k], "-") for k, v in found.items()])
        for title, found in (("A token of the class", curves), ("All tokens of the class", sums))
    ]
    least = min(curves["[SOS]"], key=lambda e: e.value)
    gap = (per["[SOS]"] - np.maximum(per["words"], per["[EOS]"])).min(1)
    checks = [
        Check("attention to [SOS] at the step where it is least", least, ">", 0.9),
        Check(
            "attention to [SOS] minus that to a token of the next class, at the step where it is least",
            estimate(gap, units, **more), ">", 0.0,
        ),
    ]  # fmt: skip
    rows: list[list[Any]] = [[k, *(estimate(v[k].mean(1), units, **more) for v in (per, whole))] for k in per]
    return Answer(
        checks, [Table(["class", "a token", "all tokens"], rows, "Means over steps, layers, heads and pixels.")],
        [Figure(drawing.lines(panels, "attention by class", limits=[(0, 1), (0, 1)]), drawing.NOTE)],
        {"attention": ["baseline"]}, f"{len(run)} prompts of {len(np.unique(units))} pairs, {len(t)} of {settings.steps} steps",
        f"[SOS] gets {rows[0][1].text(2)} of the attention",
    )  # fmt: skip


# E10


def _needs_e10(settings: Settings) -> dict[str, Conditions]:
    return {"attention": {SWAP: [swap()]}}


def _answer_e10(runs: Runs, settings: Settings) -> Answer:
    run = runs["attention"]
    base, exchanged = run.condition("baseline"), run.condition(SWAP)
    kept = base.attention(base.grids[0])["step"].values
    step = int(kept[np.argmin(np.abs(kept - 0.4 * settings.steps))])
    ds = exchanged.probe("token_attribution", steps=[step], recipe="daam", normalize="none")
    units = pair_units(run, ds)
    size = ds.sizes["y"], ds.sizes["x"]
    outline = {
        int(p): edges(shrunk(base.images.isel(sample=i).values @ LUMINANCE, size))
        for i, p in enumerate(base.samples["prompt_id"])
    }
    found = np.full((len(exchanged), 2), np.nan)
    for i, p in enumerate(ds["prompt_id"].values):
        maps = [edges(m) for m in ds["word_map"].values[i] if np.isfinite(m).all()]
        for k, other in enumerate((int(p), int(p) ^ 1)):  # rows come in pairs: A after B, B after A
            values = [edge_f1(m, outline[other]) for m in maps]
            found[i, k] = np.nanmean(values) if np.isfinite(values).any() else np.nan
    more: Any = {"resamples": settings.resamples}
    gap = estimate(found[:, 1] - found[:, 0], units, **more)
    checks = [Check(f"F1 of A's words' maps with the outlines of B minus that with those of A, at t = {settings.steps - step}",
                    gap, ">", 0.0)]  # fmt: skip
    row: list[Any] = [f"t = {settings.steps - step}", *curve(found, units, **more), gap]
    table = Table(["maps at", "with A's picture", "with B's picture", "B − A"], [row], "F1 of edges, mean over words.")
    figures = [
        Figure(_maps(run, pair, step), "Maps of A's words without and with the EOS of B, each scaled to its own range.")
        for pair in range(min(2, len(base) // 2))
    ]
    return Answer(
        checks, [table], figures, {"attention": ["baseline", SWAP]},
        f"{len(exchanged)} exchanged pictures of {len(np.unique(units))} pairs",
        f"F1 with B's outlines {row[2].text(2)}, with A's {row[1].text(2)}",
    )  # fmt: skip


def _maps(run: Run, pair: int, step: int) -> str:
    rows, words = [], []
    for label, condition in (("A", "baseline"), ("words of A, EOS of B", SWAP)):
        part = run.condition(condition)
        one = part.isel(sample=[int(np.flatnonzero((part.samples["prompt_id"] == 2 * pair).to_numpy())[0])])
        ds = one.probe("token_attribution", steps=[step], recipe="daam", normalize="none")
        words = [str(w) for w in ds["word_text"].values[0] if str(w)][:7]
        cells = [drawing.inline(one.images.isel(sample=0).values, label)]
        rows.append((label, cells + [drawing.heat(ds["word_map"].values[0, w], words[w]) for w in range(len(words))]))
    other = run.condition("baseline")
    at = int(np.flatnonzero((other.samples["prompt_id"] == 2 * pair + 1).to_numpy())[0])
    rows.append(("B", [drawing.inline(other.images.isel(sample=at).values, "B")]))
    return drawing.grid(rows, ["picture", *words])


EXPERIMENTS = [
    Experiment(
        "E1", "The shape of attention comes early", "Section 4.1, Figure 1",
        "Within the first few steps the cross-attention maps of the words have the outlines of the final picture.",
        "Edges (Canny) of each word's attention map and of the final picture; F1 of the two edge images, averaged over words "
        "and prompts, at each step relative to the last. Decided at 20 % of the steps.",
        (CANNY, "“Near one” is read as: at least 80 % of the last step's F1.",
         "The paper averages over all tokens; here over the words of the prompt."),
        _needs, _answer_e1,
    ),
    Experiment(
        "E3", "Which tokens get the attention", "Section 5.1, Figure 3",
        "The start token takes more than 0.9 of the attention at every step; words and EOS share the rest.",
        "Cross-attention averaged over pixels, heads and layers; of each class ([SOS], words, [EOS]) the mean per token, then "
        "the mean over prompts, at each step.",
        ("Layers and heads weigh alike. [EOS] is the first end-of-text token and all padding. The sum over a class's tokens is "
         "shown beside the paper's mean per token.",),
        _needs, _answer_e3,
    ),
    Experiment(
        "E10", "Attention maps under exchanged EOS", "Appendix D, Figure 12",
        "With the EOS of B, the maps of A's words take the shape of B's object.",
        "E4 with the maps of A's words at 40 % of the steps: F1 of their edges with the outlines of B's picture, "
        "minus that with A's. The paper shows pictures alone; the number is ours.",
        (CANNY, ALIGN),
        _needs_e10, _answer_e10,
    ),
]  # fmt: skip
