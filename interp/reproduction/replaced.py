"""E11 and E12: the states of words, EOS or all tokens replaced."""

from __future__ import annotations

from typing import Any

import xarray as xr

from interp.probes.style import BLUE, GREEN, ORANGE
from interp.reproduction import drawing
from interp.reproduction.absence import ACROSS, IMAGE, NONE
from interp.reproduction.experiment import NAMES, Compared, Experiment, Runs, judges, picture_rows
from interp.reproduction.measures import Answer, Check, Figure, Table
from interp.reproduction.runs import Conditions, Spec
from interp.reproduction.settings import Settings

ALL_BOS, ALL_EOS = "all [SOS]", "[SOS] and 76 [EOS]"
SEM_ZERO, SEM_RAND, ZERO_EOS, RAND_EOS = "Sem+Zero", "Sem+Rand", "Zero+EOS", "Rand+EOS"
WORD, EOS = ["word"], ["eos", "pad"]


def _replaced(roles: list[str], value: str) -> list[Spec]:
    return [{"name": "replace_tokens", "roles": roles, "value": value}]


# E11


def _needs_e11(settings: Settings) -> dict[str, Conditions]:
    every = {ALL_BOS: _replaced([*WORD, *EOS], "bos"), ALL_EOS: _replaced([*WORD, *EOS], "eos")}
    return {"removal": {**every, NONE: [{"name": "remove_text"}]}}


def _answer_e11(runs: Runs, settings: Settings) -> Answer:
    run, names = runs["removal"], [ALL_BOS, ALL_EOS]
    got = Compared(run, run.probe("token_ablation", conditions=names, resamples=1), settings)
    bare = Compared(run, run.probe("acceleration", conditions=[NONE], resamples=1), settings)
    lead = f"{judges(run)[0]}:prompt"
    joined = Compared(run, _joined(got, bare), settings)
    checks = [
        Check(
            f"what all [SOS] keeps of the alignment that the text brings, {NAMES[judges(run)[0]]}",
            joined.ratio(ALL_BOS, "baseline", lead, minus=NONE), "<", 0.2,
        ),
        Check(
            f"what [SOS] and 76 [EOS] keep of it, {NAMES[judges(run)[0]]}",
            joined.ratio(ALL_EOS, "baseline", lead, minus=NONE), ">", 0.5,
        ),
    ]  # fmt: skip
    shown = ["baseline", ALL_BOS, ALL_EOS, NONE]
    rows = [
        [c, *(joined.mean(c, f"{m}:prompt") for m in judges(run)), joined.mean(c, IMAGE), joined.mean(c, "L1")]
        for c in shown
    ]
    columns = ["states", *(NAMES[m] for m in judges(run)), "CLIPScore(Image)", "L1"]
    pictures, heads = picture_rows(run, shown, sorted(set(got.ds["prompt_id"].values.tolist()))[:5])
    return Answer(
        checks, [Table(columns, rows, "Alignment with the prompt, and closeness to the baseline.")],
        [Figure(drawing.grid(pictures, heads), "")], {"removal": shown}, f"{got.ds.sizes['pair']} prompts",
        f"all [SOS] keeps {checks[0].number.percent()}, [EOS] alone {checks[1].number.percent()} of what the text brings",
    )  # fmt: skip


def _joined(one: Compared, other: Compared) -> xr.Dataset:
    shared = ["image_distance", "score"]
    return xr.concat(
        [
            one.ds[shared].drop_vars(_own(one.ds)),
            other.ds[shared].drop_vars(_own(other.ds)).isel(condition=slice(1, None)),
        ],
        dim="condition",
    )


def _own(ds: xr.Dataset) -> list[str]:
    return [str(c) for c in ds.coords if "condition" in ds[c].dims and c != "condition"]


# E12


def _needs_e12(settings: Settings) -> dict[str, Conditions]:
    return {
        "removal": {
            SEM_ZERO: _replaced(EOS, "zero"), SEM_RAND: _replaced(EOS, "random"),
            ZERO_EOS: _replaced(WORD, "zero"), RAND_EOS: _replaced(WORD, "random"),
        }
    }  # fmt: skip


def _answer_e12(runs: Runs, settings: Settings) -> Answer:
    run, names = runs["removal"], [SEM_ZERO, SEM_RAND, ZERO_EOS, RAND_EOS]
    got = Compared(run, run.probe("token_ablation", conditions=names, resamples=1), settings)
    shown = ["baseline", *names]
    metrics = judges(run)
    checks = []
    for what, one, other in (("zero", ZERO_EOS, SEM_ZERO), ("random", RAND_EOS, SEM_RAND)):
        for k, m in enumerate(metrics):
            gap = got.difference(one, other, f"{m}:prompt")
            checks.append(
                Check(
                    f"{what}: alignment with EOS kept minus that with words kept, {NAMES[m]}",
                    gap,
                    ">",
                    0.0,
                    decides=k == 0,
                )
            )
        checks.append(
            Check(
                f"{what}: CLIPScore(Image) with EOS kept minus that with words kept",
                got.difference(one, other, IMAGE),
                ">",
                0.0,
            )
        )
    rows: list[list[Any]] = [
        [c, *(got.mean(c, f"{m}:prompt") for m in metrics), got.mean(c, IMAGE), got.mean(c, "L1")] for c in shown
    ]
    color = {"judge": BLUE, "blip_vqa": BLUE, "clip": GREEN}
    panels = [
        ("Alignment with the prompt", "alignment", [
            (NAMES[m], [got.mean(c, f"{m}:prompt") for c in shown], color[m]) for m in metrics
        ]),
        ("Closeness to the baseline", "CLIPScore(Image)", [("", [got.mean(c, IMAGE) for c in shown], ORANGE)]),
    ]  # fmt: skip
    pictures, heads = picture_rows(run, shown, sorted(set(got.ds["prompt_id"].values.tolist()))[:5])
    columns = ["states", *(NAMES[m] for m in metrics), "CLIPScore(Image)", "L1"]
    return Answer(
        checks, [Table(columns, rows, "The paper's Table 3. “Sem+EOS” is the baseline.")],
        [Figure(drawing.bars(panels, shown, "tokens replaced"), drawing.NOTE), Figure(drawing.grid(pictures, heads), "")],
        {"removal": shown}, f"{got.ds.sizes['pair']} prompts",
        f"{NAMES[metrics[0]]}: Zero+EOS {rows[3][1].text()}, Sem+Zero {rows[1][1].text()}",
    )  # fmt: skip


EXPERIMENTS = [
    Experiment(
        "E11", "The start token says nothing", "Appendix E, Figure 13",
        "With all states replaced by that of [SOS] no text content is left; with [SOS] and 76 times [EOS] it is kept.",
        "Two conditions from the baseline's noise: the states at positions 1 to 76 replaced by that of [SOS], or by "
        "that of the prompt's first [EOS]. What is kept is (alignment − that of no text)/(alignment of the baseline − that of "
        "no text).",
        ("The paper shows pictures; numbers and bounds (below 20 %, above 50 %) are ours.",),
        _needs_e11, _answer_e11,
    ),
    Experiment(
        "E12", "Words or EOS replaced by zeros or noise", "Appendix F, Table 3, Figure 14",
        "Pictures keep far more of the prompt when EOS states are kept and words replaced than the other way round.",
        "All word states, or all EOS and padding states, replaced by zeros or by Gaussian vectors; alignment with the "
        "prompt and similarity to the baseline.",
        ("The scale of the noise is not stated: it has the standard deviation of the prompt's own states, and mean 0.", ACROSS),
        _needs_e12, _answer_e12,
    ),
]  # fmt: skip
