"""E6 and E8: the text left out of the first, or of the last, steps."""

from __future__ import annotations

import numpy as np
import xarray as xr

from interp.probes.style import BLUE, ORANGE
from interp.reproduction import drawing
from interp.reproduction.costs import Cost
from interp.reproduction.experiment import NAMES, Compared, Experiment, Runs, judges, picture_rows
from interp.reproduction.measures import Answer, Check, Estimate, Figure, Table, estimate
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings

NONE = "no text at all"
IMAGE = "clip_image:baseline"
LATE = (0.2, 0.4, 0.6, 0.8)
ACROSS = (
    "CLIPScore(Image) is the cosine of CLIP's picture vectors; L1 the mean absolute difference of pixels as a share of the "
    "full range (the paper gives no scale)."
)


def first(number: int) -> str:
    """Name the condition without text in the first steps."""
    return f"no text in the first {number} step{'s' * (number > 1)}"


def last(number: int) -> str:
    """Name the condition without text in the last steps."""
    return f"no text in the last {number} step{'s' * (number > 1)}"


def _early(settings: Settings) -> Conditions:
    windows: Conditions = {first(n): [{"name": "remove_text", "stop": n, "unit": "step"}] for n in settings.lengths()}
    return {**windows, NONE: [{"name": "remove_text"}]}


def _late(steps: int, lengths: list[int]) -> Conditions:
    return {last(n): [{"name": "remove_text", "start": steps - n, "unit": "step"}] for n in lengths}


def _late_lengths(settings: Settings) -> list[int]:
    return settings.lengths(tuple(s for s in LATE if s >= min(settings.shares)))


# E6


def _needs_e6(settings: Settings) -> dict[str, Conditions]:
    return {"removal": {**_early(settings), **_late(settings.steps, [settings.length(0.4)])}}


def _answer_e6(runs: Runs, settings: Settings) -> Answer:
    run = runs["removal"]
    ds = run.probe("text_window", conditions=list(_early(settings)), resamples=1)
    both = Compared(run, ds, settings)
    names = [str(c) for c in ds["condition"].values]
    a = [int(v) for v in ds["a"].values]
    n = settings.length(0.4)
    late = Compared(run, run.probe("acceleration", conditions=[last(n)], resamples=1), settings)
    checks = [
        Check(f"L1 without text in the first {n} steps, over L1 without any text", both.ratio(first(n), NONE, "L1"), ">", 0.8),
        Check(
            f"CLIP similarity lost without text in the first {n} steps, over that lost without any text",
            both.ratio(first(n), NONE, IMAGE, lost=True), ">", 0.8,
        ),
        Check(f"L1 without text in the last {n} steps, over L1 without any text", _over(late, both, last(n), NONE), "<", 0.2),
    ]  # fmt: skip
    similarity = [both.mean(c, IMAGE) for c in names]
    l1 = [both.mean(c, "L1") for c in names]
    rows = [[t, k, s, d, *(both.mean(c, f"{m}:prompt") for m in judges(run))] for t, k, s, d, c in zip(
        a, ds["steps_without_text"].values.tolist(), similarity, l1, names, strict=True
    )]  # fmt: skip
    panels = [
        ("CLIPScore(Image)", "a (text in t < a only)", "similarity to the baseline", [("", a, similarity, BLUE, "-")]),
        ("L1", "a (text in t < a only)", "L1 distance (share of range)", [("", a, l1, ORANGE, "-")]),
    ]
    shown = ["baseline", *[first(k) for k in settings.lengths()][:5], NONE]
    pictures, heads = picture_rows(run, shown, sorted(set(ds["prompt_id"].values.tolist()))[:5])
    columns = ["a", "steps without text", "CLIPScore(Image)", "L1", *(NAMES[m] for m in judges(run))]
    return Answer(
        checks, [Table(columns, rows, "The paper's Figure 8a, as numbers, with the alignment with the prompt beside it.")],
        [Figure(drawing.lines(panels, "text removed early"), drawing.NOTE), Figure(drawing.grid(pictures, heads), "")],
        {"removal": [*names, last(n)]}, f"{ds.sizes['pair']} prompts",
        f"{checks[0].number.percent()} of the damage by the first {n} steps, {checks[2].number.percent()} by the last {n}",
    )  # fmt: skip


def _over(one: Compared, other: Compared, above: str, below: str) -> Estimate:
    """L1 of two probes' conditions, whose rows are the same prompts."""
    values = np.stack([one.values(above, "L1"), other.values(below, "L1")], 1)
    return estimate(values, one.units, resamples=one.settings.resamples, statistic=lambda m: m[:, 0] / m[:, 1])


# E8


def _where(settings: Settings) -> str:
    return "removal" if settings.coco is None else "captions"


def _needs_e8(settings: Settings) -> dict[str, Conditions]:
    half = max(4, settings.steps // 2)
    short = [n for s in LATE if 0 < (n := round(s * half)) < half]
    return {
        _where(settings): _late(settings.steps, _late_lengths(settings)),
        "fewer_steps": _late(half, sorted(set(short))),
    }


def _answer_e8(runs: Runs, settings: Settings) -> Answer:
    checks, tables, figures, used = [], [], [], {}
    panels, said = [], []
    for name, share in ((_where(settings), 0.4), ("fewer_steps", 0.8)):
        run = runs[name]
        asked = _needs_e8(settings)[name]
        ds = run.probe("acceleration", conditions=list(asked), resamples=1)
        got, cost = Compared(run, ds, settings), Cost(run, settings)
        names = [str(c) for c in ds["condition"].values]
        removed = [int(v) for v in ds["steps_removed"].values]
        steps = int(run.attrs["steps"])
        solver = str(run.attrs["scheduler"]["class"]).removesuffix("Scheduler").replace("Multistep", "++")
        chosen = min(range(1, len(names)), key=lambda k: abs(removed[k] - share * steps))
        label = f"{solver}, a = {removed[chosen]} of {steps}"
        found = _closeness(got, names[chosen], label, ds, chosen, name == "fewer_steps")
        saved = cost.saved(names[chosen])
        checks += [*found, Check(f"{label}: share of seconds saved", saved, ">", 0.25, decides=False)]
        said.append((float(ds["passes_saved"].values[chosen]), saved, found[0].number))
        tables += _tables(got, cost, ds, names, f"The paper's Table 2: {solver}, {steps} steps.")
        similarity = [got.mean(c, IMAGE) for c in names]
        panels.append((f"{solver}, {steps} steps", "a (last a steps without text)", "CLIPScore(Image)",
                       [("", removed, similarity, BLUE, "-")]))  # fmt: skip
        pictures, heads = picture_rows(run, names, sorted(set(ds["prompt_id"].values.tolist()))[:5])
        figures.append(Figure(drawing.grid(pictures, heads), f"{solver}, {steps} steps."))
        used[name] = names
    figures.insert(0, Figure(drawing.lines(panels, "text removed late"), drawing.NOTE))
    passes, seconds, near = zip(*said, strict=True)
    known = all(np.isfinite(s.value) for s in seconds)
    clock = f" ({seconds[0].percent()} and {seconds[1].percent()} of the seconds)" if known else ""
    return Answer(
        checks, tables, figures, used, f"{ds.sizes['pair']} prompts for each sampler",
        f"{passes[0]:.0%} and {passes[1]:.0%} of the passes saved{clock}, CLIPScore(Image) {near[0].text()} and "
        f"{near[1].text()}",
    )  # fmt: skip


def _tables(got: Compared, cost: Cost, ds: xr.Dataset, names: list[str], title: str) -> list[Table]:
    """Return the paper's table in two, each as wide as a page: how near the pictures are, and what is saved."""
    removed, metrics, distances = [int(v) for v in ds["steps_removed"].values], judges(got.run), cost.distances()
    near = [
        [a, got.mean(c, IMAGE), got.mean(c, "L1"), *(got.mean(c, f"{m}:prompt") for m in metrics),
         *(values.get(c, float("nan")) for values in distances.values())]
        for a, c in zip(removed, names, strict=True)
    ]  # fmt: skip
    spared = [
        [a, float(ds["passes_saved"].values[k]), float(ds["passes_saved_expected"].values[k]), cost.seconds(c), cost.saved(c)]
        for k, (a, c) in enumerate(zip(removed, names, strict=True))
    ]  # fmt: skip
    return [
        Table(
            ["a", "CLIPScore(Image)", "L1", *(NAMES[m] for m in metrics), *distances], near, f"{title} {cost.missing()}"
        ),
        Table(
            ["a", "passes saved", "a/(2T)", "seconds a picture", "seconds saved"], spared, f"{title} {cost.measured()}"
        ),
    ]


def _closeness(got: Compared, condition: str, label: str, ds: xr.Dataset, k: int, must_save: bool) -> list[Check]:
    metric = judges(got.run)[0]
    saved, expected = float(ds["passes_saved"].values[k]), float(ds["passes_saved_expected"].values[k])
    passes = Estimate(saved, float("nan"), float("nan"), ds.sizes["pair"])
    exact = Estimate(saved - expected, float("nan"), float("nan"), ds.sizes["pair"])
    return [
        Check(f"{label}: CLIPScore(Image) to a = 0", got.mean(condition, IMAGE), ">", 0.95),
        Check(f"{label}: L1 to a = 0", got.mean(condition, "L1"), "<", 0.05),
        Check(
            f"{label}: alignment with the prompt minus that at a = 0, {NAMES[metric]}",
            got.difference(condition, "baseline", f"{metric}:prompt"), ">", -0.02,
        ),
        Check(f"{label}: share of forward passes saved", passes, ">", 0.25, decides=must_save),
        Check(f"{label}: share of passes saved minus a/(2T)", exact, "=", 0.0),
    ]  # fmt: skip


EXPERIMENTS = [
    Experiment(
        "E6", "When the text is used", "Section 5.2, Figures 7 and 8a",
        "Only text removed in the early steps (large a) takes its influence away: missing text in the first steps destroys the "
        "picture, missing text later does not.",
        "ε(∅) alone for t in [a, T], guidance for t < a; the picture is compared with that of full text from the same noise. "
        "Decided by the shares of the damage of no text at all that the first and the last 40 % of the steps do.",
        ("In the paper a is counted as here: a = T is the baseline, a = 0 has no text at all; in its section 6 the same letter "
         "means the reverse (E8).", ACROSS, "The bounds of 80 % and 20 % are ours: the paper has a figure only."),
        _needs_e6, _answer_e6,
    ),
    Experiment(
        "E8", "Acceleration: the text left out at the end", "Section 6, equation 9, Figures 9, 10, 20 and 21, Table 2",
        "Leaving out the pass with text in the last a steps saves up to 27 % of the cost and hardly changes the picture.",
        "Guidance for t ≥ a, ε(∅) alone for t < a. DDIM (or the model's own sampler) with T steps, and DPM-Solver++ of order 2 "
        "with T/2. Decided at a = 40 % of the steps for the first, 80 % for the second (the paper's a = 20 of 50 and of 25).",
        (ACROSS, "Saved cost is counted in forward passes, read from the run (nfe): with one evaluation a step it is "
         "a/(2T), so 27 % at a = 20 cannot come from 50 steps, only from 25.",
         "Seconds are the wall time of the job's batches for each picture, with decoding and writing, on the machine of this "
         "report, which may have done other things; the first batch warms up and is left out where its condition has another. "
         "Their intervals draw batches, not prompts.",
         "FID: the paper compares 30,000 pictures with COCO's photographs. Here the reference is the pictures of a = 0 from "
         "the same prompts and noise, n against n, and features are the unit vectors of the CLIP that scores (for scenes its "
         "own, 128 numbers; Inception-v3 is for photographs). From so few pictures it is biased upwards, alike in all rows.",
         "Prompts are those of the pairs, or COCO captions with --coco. “Close” is read as a similarity above 0.95, L1 below "
         "0.05 and alignment within 0.02."),
        _needs_e8, _answer_e8,
    ),
]  # fmt: skip
