"""E4, E5 and E9: EOS of one prompt behind the words of another."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from interp.probes.bootstrap import mean_interval
from interp.probes.comparing import relative
from interp.probes.style import BLUE, ORANGE
from interp.reproduction import drawing
from interp.reproduction.experiment import NAMES, Experiment, Runs, alignment, judges
from interp.reproduction.measures import Answer, Check, Estimate, Figure, Table, curve, estimate
from interp.reproduction.runs import Conditions, Spec
from interp.reproduction.settings import Settings
from interp.stores import Run

SWAP = "EOS of B"
ALIGN = (
    "When A and B differ in length, B's run of EOS states is shifted to begin right after A's last word, and its last "
    "state repeated where it is too short (the paper does not say)."
)
PAIRS = (
    "How prompts are paired is not stated. Every pair gives two pictures, words of A with EOS of B and the reverse; the "
    "bootstrap draws pairs."
)
SCORES = (
    "Alignment by CLIP (cosine) and by a judge that shares no weights with it: for scenes the attribute judge (share of the "
    "attributes named in the text that are seen), for other models BLIP-VQA, if one is named. The paper has CLIPScore, "
    "BLIP-VQA and MiniGPT4-CoT. CLIP pools text at EOS, so where there is the other judge, the verdict rests on it alone."
)


def swap(side: str = "kv", **window: object) -> Spec:
    """Return the spec of an exchange of EOS."""
    return {"name": "replace_eos", "prompt": "{target}", "side": side, **window}


# E4


def _needs_e4(settings: Settings) -> dict[str, Conditions]:
    return {"exchange": {SWAP: [swap()]}}


def _answer_e4(runs: Runs, settings: Settings) -> Answer:
    run = runs["exchange"]
    ds, units = alignment(run, SWAP, settings)
    of = partial(estimate, units=units, resamples=settings.resamples)
    checks, panels = [], []
    rows: list[list[Any]] = []
    for metric in judges(run):
        one = ds["alignment"].sel(metric=metric)
        found = {
            (image, text): of(one.sel(image=image, text=text).values)
            for image in ("source", "swap", "target")
            for text in ("source", "target")
        }
        gap = of(ds["advantage"].sel(metric=metric).values)
        wins = of((np.sign(ds["advantage"].sel(metric=metric).values) + 1) / 2)
        first = metric == judges(run)[0]
        checks.append(
            Check(f"alignment with B (EOS) minus that with A (words), {NAMES[metric]}", gap, ">", 0.0, decides=first)
        )
        rows.append([NAMES[metric], found["swap", "source"], found["swap", "target"], gap, wins])
        series = [
            ("with A", [found[i, "source"] for i in ("source", "swap", "target")], BLUE),
            ("with B", [found[i, "target"] for i in ("source", "swap", "target")], ORANGE),
        ]
        panels.append((NAMES[metric], "alignment", series))
    names = ["A whole", "words of A, EOS of B", "B whole"]
    figures = [
        Figure(drawing.bars(panels, names, "alignment of exchanged pictures"), drawing.NOTE),
        Figure(_triples(run), "In each column: A, its words with the EOS of B, and B, all from the same noise."),
    ]
    table = Table(
        ["metric", "source A (words)", "target B (EOS)", "B − A", "B ahead in"], rows,
        "The paper's Table 1: alignment of [SOS] + A + [EOS] of B with both prompts.",
    )  # fmt: skip
    lead = rows[0]
    return Answer(
        checks, [table], figures, {"exchange": ["baseline", SWAP]},
        f"{ds.sizes['pair']} exchanged pictures of {len(np.unique(units))} pairs",
        f"{lead[0]}: A {lead[1].text()}, B {lead[2].text()}",
    )  # fmt: skip


def _triples(run: Run) -> str:
    table = run.samples
    done = {(c, p): i for i, (c, p) in enumerate(zip(table["condition"], table["prompt_id"], strict=True))}
    chosen = [p for p in sorted(set(table["prompt_id"])) if p % 2 == 0][:6]
    order = [("A", "baseline", 0), ("words of A, EOS of B", SWAP, 0), ("B", "baseline", 1)]
    rows = []
    for label, condition, shift in order:
        cells = []
        for p in chosen:
            at = done[condition, p + shift]
            cells.append(drawing.inline(run.images.isel(sample=at).values, f"{label}: {table['prompt'].iloc[at]}"))
        rows.append((label, cells))
    heads = [
        f"A: {table['prompt'].iloc[done['baseline', p]]} · B: {table['target'].iloc[done['baseline', p]]}"
        for p in chosen
    ]
    return drawing.grid(rows, heads)


# E5


def _first(number: int) -> str:
    return f"EOS of B in the first {number} step{'s' * (number > 1)}"


def _needs_e5(settings: Settings) -> dict[str, Conditions]:
    windows = {_first(n): [swap(stop=n, unit="step")] for n in settings.lengths()}
    return {"exchange": {SWAP: [swap()], **windows}}


def _answer_e5(runs: Runs, settings: Settings) -> Answer:
    run, lengths = runs["exchange"], settings.lengths()
    whole, units = alignment(run, SWAP, settings)
    points = [0, *lengths, settings.steps]
    stack = [whole["alignment"].sel(image="source")]
    stack += [alignment(run, _first(n), settings)[0]["alignment"].sel(image="swap") for n in lengths]
    stack += [whole["alignment"].sel(image="swap")]
    checks, rows, panels = [], [], []
    at = [settings.steps - n for n in points]
    for metric in judges(run):
        found = {
            text: np.stack([s.sel(metric=metric, text=text).values for s in stack], 1) for text in ("source", "target")
        }
        means = {t: curve(v, units, resamples=settings.resamples) for t, v in found.items()}
        shown = {t: _relative(v, units, settings) for t, v in found.items()}
        panels.append((NAMES[metric], "StartStep (label t)", "relative alignment", [
            ("with A", at, shown["source"], BLUE, "-"), ("with B", at, shown["target"], ORANGE, "--"),
        ]))  # fmt: skip
        if metric == judges(run)[0]:
            rows = [[t, n, a, b] for t, n, a, b in zip(at, points, means["source"], means["target"], strict=True)]
            for share in (0.2, 0.4):
                n = settings.length(share)
                k = points.index(n)
                got = estimate(
                    found["target"][:, [0, k, -1]], units, resamples=settings.resamples,
                    statistic=lambda m: (m[:, 1] - m[:, 0]) / (m[:, 2] - m[:, 0]),
                )  # fmt: skip
                checks.append(Check(
                    f"share of the gain in alignment with B that EOS of B in the first {n} of {settings.steps} steps brings",
                    got, ">", 0.8,
                ))  # fmt: skip
    figure = Figure(
        drawing.lines(panels, "relative alignment over StartStep", limits=[(-0.05, 1.05)] * len(panels)),
        "EOS of B is used for t ≥ StartStep, A's own after. " + drawing.NOTE,
    )
    table = Table(
        ["StartStep t", "steps with EOS of B", "alignment with A", "alignment with B"], rows, f"By the {NAMES[judges(run)[0]]}."
    )  # fmt: skip
    return Answer(
        checks, [table], [figure], {"exchange": ["baseline", SWAP, *map(_first, lengths)]},
        f"{whole.sizes['pair']} pictures of {len(np.unique(units))} pairs at each point",
        f"{checks[0].number.percent()} of the gain by step {settings.length(0.2)}, {checks[1].number.percent()} by step "
        f"{settings.length(0.4)} of {settings.steps}",
    )  # fmt: skip


def _relative(values: np.ndarray, units: np.ndarray, settings: Settings) -> list[Estimate]:
    mean, interval = mean_interval(
        values, units, resamples=settings.resamples, statistic=lambda m: relative(m.T, best="high").T
    )
    n = len(np.unique(units))
    return [Estimate(float(m), float(i[0]), float(i[1]), n) for m, i in zip(mean, interval, strict=True)]


# E9

EARLY, NEXT = "EOS of B at the first 16 positions", "EOS of B at the next 16 positions"


def _counts(settings: Settings) -> list[int]:
    return [8, 16, 32, 48] if len(settings.lengths()) > 5 else [16, 40]


def _fewer(count: int) -> str:
    return f"EOS of B after {count} repeated words"


def _needs_e9(settings: Settings) -> dict[str, Conditions]:
    def repeated(count: int) -> Spec:
        return {"name": "replace_tokens", "roles": ["eos", "pad"], "count": count, "value": "repeat"}

    fewer = {_fewer(c): [swap(skip=c), repeated(c)] for c in _counts(settings)}
    return {"exchange": {SWAP: [swap()], **fewer, EARLY: [swap(count=16)], NEXT: [swap(skip=16, count=16)]}}


def _answer_e9(runs: Runs, settings: Settings) -> Answer:
    run, counts = runs["exchange"], _counts(settings)
    names = [SWAP, *map(_fewer, counts)]
    found = {name: alignment(run, name, settings) for name in (*names, EARLY, NEXT)}
    units = found[SWAP][1]
    of = partial(estimate, units=units, resamples=settings.resamples)

    def values(name: str, metric: str, text: str) -> np.ndarray:
        return np.asarray(found[name][0]["alignment"].sel(metric=metric, image="swap", text=text).values)

    checks, panels, rows, lead = [], [], [], judges(run)[0]
    gain = values(names[-1], lead, "source") - values(SWAP, lead, "source")
    loss = values(names[-1], lead, "target") - values(SWAP, lead, "target")
    part = {n: values(n, lead, "target") - values(n, lead, "source") for n in (EARLY, NEXT)}
    checks = [
        Check(f"alignment with A, {counts[-1]} repeated words minus none, {NAMES[lead]}", of(gain), ">", 0.0),
        Check(f"alignment with B, {counts[-1]} repeated words minus none, {NAMES[lead]}", of(loss), "<", 0.0),
        Check(f"(B − A) of EOS of B at the first 16 positions minus that at the next 16, {NAMES[lead]}",
              of(part[EARLY] - part[NEXT]), ">", 0.0),
    ]  # fmt: skip
    for metric in judges(run):
        both = {t: np.stack([values(n, metric, t) for n in names], 1) for t in ("source", "target")}
        shares = {t: _of_largest(v, units, settings) for t, v in both.items()}
        panels.append((NAMES[metric], "EOS positions that became repeated words", "alignment / its largest", [
            ("with A", [0, *counts], shares["source"], BLUE, "-"), ("with B", [0, *counts], shares["target"], ORANGE, "--"),
        ]))  # fmt: skip
    for name in (*names, EARLY, NEXT):
        rows.append([name, *(of(values(name, m, t)) for m in judges(run) for t in ("source", "target"))])
    columns = ["condition", *(f"{t}, {NAMES[m]}" for m in judges(run) for t in ("A", "B"))]
    return Answer(
        checks, [Table(columns, rows, "The paper's Figure 11, as numbers.")],
        [Figure(drawing.lines(panels, "number of EOS", limits=[(0, 1.08)] * len(panels)), drawing.NOTE)],
        {"exchange": [*names, EARLY, NEXT]}, f"{len(units)} pictures of {len(np.unique(units))} pairs at each point",
        f"{counts[-1]} EOS fewer: {NAMES[lead]} with A by {checks[0].number.text()}, with B by {checks[1].number.text()}",
    )  # fmt: skip


def _of_largest(values: np.ndarray, units: np.ndarray, settings: Settings) -> list[Estimate]:
    mean, interval = mean_interval(
        values, units, resamples=settings.resamples, statistic=lambda m: m / m.max(-1, keepdims=True)
    )
    n = len(np.unique(units))
    return [Estimate(float(m), float(i[0]), float(i[1]), n) for m, i in zip(mean, interval, strict=True)]


EXPERIMENTS = [
    Experiment(
        "E4", "Words of one prompt, EOS of another", "Section 5.1, Table 1, Figures 4 and 19",
        "When the end-of-sequence tokens come from another prompt than the words, the picture agrees more with the prompt "
        "of the EOS tokens (B) than with that of the words (A).",
        "For each pair, pictures from [SOS] + words of A + [EOS] run of B, from the noise of the baselines A and B. Reported "
        "is the mean alignment with the text of A and of B.",
        ("“[EOS]” is the first end-of-text token and all padding after it (76 positions with the words).", ALIGN, PAIRS,
         SCORES),
        _needs_e4, _answer_e4,
    ),
    Experiment(
        "E5", "When EOS is used", "Section 5.2, Figures 5 and 6",
        "EOS of B in the first few (noisiest) steps alone turns the picture to B: what EOS says is conveyed there.",
        "EOS of B for labels t ≥ StartStep, A's own after that. Relative alignment is (mean − worst)/(best − worst) over the "
        "points of the sweep. Decided by the share of the whole gain in alignment with B that 20 % and 40 % of the steps "
        "bring.",
        ("t counts down from the number of steps, as in the paper.", "The bound of 80 % is ours: the paper has a figure only.",
         ALIGN, SCORES),
        _needs_e5, _answer_e5,
    ),
    Experiment(
        "E9", "The number of EOS", "Appendix C, Figure 11",
        "The fewer EOS tokens of B there are, the more the picture agrees with A and the less with B; earlier EOS positions "
        "matter more than later ones.",
        "E4 with the first positions of the EOS run taken by A's words, repeated as states over and over, and EOS of B at the "
        "rest; alignment divided by its largest value over the sweep. For the positions: EOS of B at the first 16 positions of "
        "the run, or at the next 16, and A's own EOS elsewhere.",
        ("The paper repeats words in the prompt, which also changes what the EOS states say; here words are repeated "
         "as states, so that nothing else changes.", "The paper gives no measure for positions; 16 and 16 are ours.", ALIGN,
         SCORES),
        _needs_e9, _answer_e9,
    ),
]  # fmt: skip
