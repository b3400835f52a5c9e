"""E2 and E7: what the latents and the two noise predictions say along the trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.probes.style import BLACK, BLUE, ORANGE
from interp.reproduction import drawing
from interp.reproduction.experiment import Experiment, Runs, pair_units
from interp.reproduction.measures import Answer, Check, Estimate, Figure, Table, curve, estimate
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings


def _needs(settings: Settings) -> dict[str, Conditions]:
    return {"trajectory": {}}


def _answer_e2(runs: Runs, settings: Settings) -> Answer:
    run = runs["trajectory"].condition("baseline")
    ds = run.probe("frequency_energy")
    ds["fresh_noise_norm"] = run.probe("frequency_energy", noise="fresh")["noising_noise_norm"]
    units = pair_units(run, ds)
    t = (settings.steps - ds["step"].values).tolist()
    more: Any = {"resamples": settings.resamples}
    band = {b: ds.sel(band=b) for b in ("low", "high")}

    def ratio(name: str, above: str, below: str, step: int) -> Estimate:
        values = np.stack([band[b][name].values[:, step] for b in (above, below)], 1)
        return estimate(values, units, statistic=lambda m: m[:, 0] / m[:, 1], **more)

    middle = settings.steps // 2
    gap = np.log(band["high"]["variation"].values) - np.log(band["low"]["variation"].values)
    found = curve(gap, units, **more)
    least = min(found, key=lambda e: e.low)
    alike = np.abs(np.log(ds["variation"].values) - np.log(ds["noising_variation"].values)).mean((1, 2))
    checks = [
        Check(
            "data part x_0: norm of the low band over that of the high band",
            ratio("data_norm", "low", "high", -1),
            ">",
            1.0,
        ),
        Check(
            "noise: norm of the high band over that of the low band",
            ratio("fresh_noise_norm", "high", "low", 0),
            ">",
            1.0,
        ),
        Check("log of the ratio of variations, high over low, at the step where it is least", least, ">", 0.0),
        Check(
            "mean |log ratio| of the variations in denoising and in noising", estimate(alike, units, **more), "<", 0.25
        ),
    ]
    color = {"low": BLUE, "high": ORANGE}
    norms = [
        (f"{what}, {b}", t, curve(band[b][name].values, units, **more), color[b], style)
        for b in band
        for name, what, style in (("data_norm", "data", "-"), ("fresh_noise_norm", "noise", "--"))
    ]
    variations = [
        (f"{what}, {b}", t, curve(band[b][name].values, units, **more), color[b], style)
        for b in band
        for name, what, style in (("variation", "denoising", "-"), ("noising_variation", "noising", "--"))
    ]
    panels = [
        ("Norms of data and noise", drawing.LABEL, "norm (latent units)", norms),
        ("Variation ratio", drawing.LABEL, "‖x_t − x_0‖ / ‖x_0‖", variations),
    ]
    rows: list[list[Any]] = [
        [settings.steps - k, *(curve(band[b]["variation"].values[:, k : k + 1], units, **more)[0] for b in band)]
        for k in sorted({0, settings.steps // 5, middle, 4 * settings.steps // 5})
    ]
    white = float(ds.attrs["white_noise_ratio"])
    table = Table(
        ["t", "variation, low", "variation, high"], rows,
        f"White noise has high/low = {white:.3f} with this mask (Proposition 1: its spectrum is flat).",
    )  # fmt: skip
    return Answer(
        checks, [table], [Figure(drawing.lines(panels, "frequency bands", log=[False, True]), drawing.NOTE)],
        {"trajectory": ["baseline"]}, f"{ds.sizes['sample']} prompts",
        f"at half the steps the low band is {rows[len(rows) // 2][1].text(2)} of its norm away, the high band "
        f"{rows[len(rows) // 2][2].text(2)}",
    )  # fmt: skip


def _answer_e7(runs: Runs, settings: Settings) -> Answer:
    run = runs["trajectory"].condition("baseline")
    ds = run.probe("guidance_norm")
    units = pair_units(run, ds)
    t = (settings.steps - ds["step"].values).tolist()
    more: Any = {"resamples": settings.resamples}
    guidance, ratio = ds["guidance_norm"].values, ds["ratio"].values
    fifth = max(1, settings.steps // 5)

    def ends(values: np.ndarray, part: slice) -> Estimate:
        both = np.stack([values[:, part].mean(1), values[:, :fifth].mean(1)], 1)
        return estimate(both, units, statistic=lambda m: m[:, 0] / m[:, 1], **more)

    half = slice(settings.steps // 2, None)
    checks = [
        Check("guidance term, second half of the steps over the first fifth", ends(guidance, half), "<", 0.5),
        Check("guidance over unconditional score, second half over the first fifth", ends(ratio, half), "<", 0.5),
    ]
    panels = [
        ("Norms per dimension", drawing.LABEL, "norm / √dimensions", [
            ("‖ε(∅)‖", t, curve(ds["uncond_norm"].values, units, **more), BLACK, "--"),
            ("w‖ε(C) − ε(∅)‖", t, curve(guidance, units, **more), ORANGE, "-"),
        ]),
        ("Ratio", drawing.LABEL, "guidance / unconditional", [("", t, curve(ratio, units, **more), ORANGE, "-")]),
    ]  # fmt: skip
    names = ("uncond_norm", "guidance_norm", "ratio")
    every = {name: curve(ds[name].values, units, **more) for name in names}
    chosen = sorted({0, fifth, settings.steps // 2, settings.steps - 1})
    rows = [[settings.steps - k, *(every[name][k] for name in names)] for k in chosen]
    table = Table(["t", "‖ε(∅)‖", "guidance", "ratio"], rows, "Norms per latent dimension.")
    return Answer(
        checks, [table], [Figure(drawing.lines(panels, "guidance"), drawing.NOTE)], {"trajectory": ["baseline"]},
        f"{ds.sizes['sample']} prompts",
        f"in the second half the guidance term is {checks[0].number.text(2)} of what it is in the first fifth",
    )  # fmt: skip


EXPERIMENTS = [
    Experiment(
        "E2", "Low frequencies first", "Section 4.2, Figure 2, Proposition 1",
        "The picture's own signal is mostly low-frequency and noise mostly high-frequency; so the low band is "
        "recovered earlier than the high band, in denoising as in noising.",
        "Fourier transform of each latent channel; the 20 % of bins nearest to zero frequency are low, the rest high. Norms of "
        "√ᾱ x_0 and √(1−ᾱ) ε in each band; variation ‖x_t − x_0‖/‖x_0‖ in each band along the run, and for x_0 noised again "
        "with the run's own initial noise. The norms of noise are those of noise drawn anew for each prompt.",
        ("The exact mask is lost with the paper's footnote: “high has 80 % of the spectrum” is read as 80 % of the bins.",
         "“Alike” is read as: the two variation curves differ by less than a factor e^0.25 on average.",
         "The paper's Figure 2a (one photograph) needs no model and is left out."),
        _needs, _answer_e2,
    ),
    Experiment(
        "E7", "How much of a step is guidance", "Section 5.2, Figure 8b",
        "The guidance term decays quickly as denoising goes on, while the unconditional score does not.",
        "‖ε(t, x_t, ∅)‖ and w‖ε(t, x_t, C) − ε(t, x_t, ∅)‖, divided by √(number of dimensions), along the guided trajectory.",
        ("“Quickly” is read as: in the second half of the steps less than half of its size in the first fifth.",),
        _needs, _answer_e7,
    ),
]  # fmt: skip
