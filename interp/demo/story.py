"""What the demo runs: eight prompts under six conditions with the same noise, in one run; then the questions."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from interp.demo import figures
from interp.demo.page import Section, write_page
from interp.errors import InterpError
from interp.interventions import Intervention, RemoveText, ReplaceEOS
from interp.loading import load
from interp.plan_arguments import default_guidance
from interp.scoring import score
from interp.stores import Run, open_run
from interp.tracing import BatchDone, trace

PAIRS = [
    ("a large red circle on a gray background", "a large blue star on a navy background"),
    ("a large striped yellow square on a navy background", "a large checkered purple heart on a gray background"),
    ("a small green triangle left of a large orange ring", "a large pink moon above a small cyan cross"),
    ("a dotted cyan heart on a brown background", "a striped red square on a navy background"),
]
ASKED = ("token_attribution", "frequency_energy", "attention_mass")
"""Probes that are asked of the baseline."""
REMOVED = (20, 40, 60, 80)
"""Percent of the steps, counted from the end, in which the text is removed."""


def conditions() -> dict[str, list[Intervention]]:
    """The demo's conditions by name."""
    removed: dict[str, list[Intervention]] = {
        f"text removed for the last {share} %": [RemoveText(start=1 - share / 100)] for share in REMOVED
    }
    return {"baseline": [], "eos": [ReplaceEOS("{target}")], **removed}


def run_demo(out: str | PathLike[str], *, steps: int | None = None, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """Run the demo and write `run.zarr`, PNG figures and `index.html` into a folder; return the summary as text.

    Args:
        out: The folder; a demo that was interrupted there goes on, a finished one is only drawn anew.
        steps: Sampling steps; default is the bundled model's own.
        pairs: Prompts (A, B), at least two pairs: each is drawn, and each gets the [EOS] of the other.

    Raises:
        InterpError: the folder holds something else.
    """
    from interp.scenes import DEFAULT_STEPS

    out = Path(out)
    _claim(out)
    began = time.perf_counter()
    pipe = load("scenes")
    rows = [{"prompt": a, "target": b} for pair in pairs for a, b in (pair, pair[::-1])]
    steps = steps or DEFAULT_STEPS
    run, seconds = _traced(pipe, rows, steps, out / "run.zarr")
    seconds = _remembered(seconds, out / "seconds.json")
    run = score(run, ("clip", "judge"))
    table = removal_table(run, seconds)
    table.to_csv(out / "text_removed.csv", index=False)
    answers = {name: run.condition("baseline").probe(name) for name in ASKED}
    sections = draw_sections(pipe, run, table, answers, out)
    write_page(out / "index.html", sections, _facts(pipe, run, steps), found(answers, table))
    return "\n\n".join(
        [
            shown(table).to_string(index=False),
            f"Done in {time.perf_counter() - began:.0f} s. Look at {out / 'index.html'}; the data is in "
            f'{out / "run.zarr"}, which plain xarray opens: xr.open_datatree("{out / "run.zarr"}", engine="zarr").',
        ]
    )


def _claim(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InterpError(f"{str(out)!r} is a file; give a folder for the demo")
    if out.is_dir() and any(out.iterdir()) and not (out / ".interp-demo").exists():
        raise InterpError(
            f"the folder {str(out)!r} holds something else; give a new or empty one: interp demo --out NAME"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / ".interp-demo").touch()


def _traced(pipe: Any, rows: list[dict[str, str]], steps: int, store: Path) -> tuple[Run, dict[str, float]]:
    """Trace all conditions; return the run and the seconds a sample of each condition took (empty if resumed)."""
    from tqdm.auto import tqdm

    pipe.set_progress_bar_config(disable=True)
    pipe("warm-up", num_inference_steps=1)  # the first call allocates: keep it out of the timing
    seconds: dict[str, float] = {}
    with tqdm(total=len(rows) * len(conditions()), unit="picture") as bar:

        def done(batch: BatchDone) -> None:
            seconds[batch.condition] = seconds.get(batch.condition, 0.0) + batch.seconds / len(rows)
            bar.set_description(batch.condition)
            bar.update(batch.samples)

        try:
            run = trace(
                pipe, rows, conditions=conditions(), steps=steps, store=store, batch_size=len(rows), progress=done
            )
        except InterpError:
            if not store.exists():
                raise
            shutil.rmtree(store)  # ours, see _claim: another version's demo
            run = trace(
                pipe, rows, conditions=conditions(), steps=steps, store=store, batch_size=len(rows), progress=done
            )
    return open_run(store) if run.path else run, seconds


def _remembered(seconds: dict[str, float], path: Path) -> dict[str, float]:
    """Keep the timings beside the run: a demo that is drawn anew computes nothing that could be timed."""
    if path.exists():
        seconds = {**json.loads(path.read_text()), **seconds}
    path.write_text(json.dumps(seconds))
    return seconds


def removal_table(run: Run, seconds: dict[str, float]) -> pd.DataFrame:
    """What removing the text late costs and saves: one row a share of the steps, means over the prompts.

    Columns: share removed (%), forward passes a picture, passes saved (%), seconds a picture, seconds saved (%),
    alignment by CLIP (cosine) and by the attribute judge (share of named attributes), L1 to the baseline (% of range),
    these three with the bounds of their bootstrap 95 % intervals over prompts ("… low", "… high").
    """
    import numpy as np

    from interp.reproduction.measures import estimate

    names = ["baseline", *(f"text removed for the last {share} %" for share in REMOVED)]
    baseline = run.condition("baseline")
    passes = {name: float(run.condition(name).nfe.sum("branch").mean()) for name in names}
    pictures = baseline.images.values.astype(float)
    rows = []
    for share, name in zip((0, *REMOVED), names, strict=True):
        part = run.condition(name)
        prompts = part.samples["prompt_id"].to_numpy()
        values = {
            "CLIP": part.scores.sel(metric="clip:prompt").values,
            "judge": part.scores.sel(metric="judge:prompt").values,
            "L1 to baseline %": 100 * np.abs(part.images.values - pictures).mean((1, 2, 3)) / 255,
        }
        measured = {k: estimate(v, prompts) for k, v in values.items()}
        spent, base = seconds.get(name, np.nan), seconds.get("baseline", np.nan)
        rows.append(
            {
                "text removed last %": share,
                "passes": passes[name],
                "passes saved %": 100 * (1 - passes[name] / passes["baseline"]),
                "seconds": spent,
                "seconds saved %": 100 * (1 - spent / base),
                **{k: e.value for k, e in measured.items()},
                **{f"{k} {side}": getattr(e, side) for k, e in measured.items() for side in ("low", "high")},
            }
        )
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as texts: passes and percentages as whole numbers, the rest with two digits; with intervals."""
    whole = ("text removed last %", "passes", "passes saved %", "seconds saved %")
    texts: dict[str, list[str]] = {}
    for name, column in table.items():
        if str(name).endswith((" low", " high")):
            continue
        texts[str(name)] = ["–" if v != v else f"{v:.0f}" if name in whole else f"{v:.2f}" for v in column]
        if f"{name} low" in table:
            bounds = zip(texts[str(name)], table[f"{name} low"], table[f"{name} high"], strict=True)
            texts[str(name)] = [f"{text} [{low:.2f}, {high:.2f}]" for text, low, high in bounds]
    return pd.DataFrame(texts)


def found(answers: Mapping[str, xr.Dataset], table: pd.DataFrame) -> list[str]:
    """Say in a sentence each what the run shows, with its numbers."""
    from interp.reproduction.measures import Estimate, estimate

    energy = answers["frequency_energy"]
    middle = energy.variation.isel(step=energy.sizes["step"] // 2)
    prompts = energy["prompt_id"].values
    low, high = (estimate(middle.sel(band=band).values, prompts).text(2) for band in ("low", "high"))
    mass = answers["attention_mass"].mass.mean(["step", "layer"])
    shares = {"words": ["word"], "beyond": ["eos", "pad"], "start": ["bos"]}
    got = {
        k: estimate(mass.sel(role=r).sum("role").values, mass["prompt_id"].values).percent() for k, r in shares.items()
    }
    late, whole = (
        (row, Estimate(row["judge"], row["judge low"], row["judge high"], 0).percent())
        for row in (table.iloc[-2], table.iloc[0])
    )
    return [
        f"Shape before detail: half-way, the low frequencies are {low} of their norm away from the final latent, the high "
        f"ones {high}.",
        f"Words get {got['words']} of the attention, end-of-text and its padding {got['beyond']}, the start token "
        f"{got['start']}.",
        f"The text has its say early: left out for the last {late[0]['text removed last %']:.0f} % of the steps, it saves "
        f"{late[0]['passes saved %']:.0f} % of the forward passes, and the judge sees {late[1]} of what was asked where it saw "
        f"{whole[1]} before. (Brackets: bootstrap 95 % intervals over these few prompts.)",
    ]


def draw_sections(
    pipe: Any, run: Run, table: pd.DataFrame, answers: Mapping[str, xr.Dataset], out: Path
) -> list[Section]:
    """Draw every figure into `out`; return the page's sections in order."""
    from interp.probes import plot

    baseline = run.condition("baseline")
    swap = run.probe("eos_replacement")
    drawn = {
        "filmstrip": figures.filmstrip(pipe, baseline, sample=2),
        "words": plot(answers["token_attribution"], samples=[2, min(4, len(baseline) - 1)]),
        "energy": plot(answers["frequency_energy"]),
        "mass": plot(answers["attention_mass"]),
        "swap_pictures": figures.swap_pictures(run),
        "swap": plot(swap),
        "removed": figures.removed_pictures(run, REMOVED),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=130)
    return [
        Section(
            "The shape comes first, details later",
            "What the model predicts as the final picture at some of its steps, and that prediction's low- and "
            "high-frequency parts: the low part shows shape and place within the first steps.",
            ["filmstrip.png"],
        ),
        Section(
            "Where each word looks",
            "Cross-attention of every word, averaged over layers and steps, over the picture (gray). Words made of several "
            "tokens are merged.",
            ["words.png"],
        ),
        Section(
            "Band energies over the steps",
            "Norms of the latents' data and noise parts in the 20 % lowest frequencies and in the rest, and how far each band "
            "still is from its final value: the low band arrives earlier.",
            ["energy.png"],
        ),
        Section(
            "Who gets the attention",
            "Attention per token of each role, over steps and layers (numbered from the finest grid): the begin-of-text token "
            "takes by far the most, end-of-text counts early.",
            ["mass.png"],
        ),
        Section(
            "The words of one prompt, the [EOS] of another",
            "In threes: the picture of prompt A, of prompt B, and of A's words followed by B's end-of-text states. "
            + figures.swap_sentence(swap)
            + " So few pictures do not decide it; with 512 the [EOS] is ahead (docs/reproduce.md, E4).",
            ["swap_pictures.png", "swap.png"],
        ),
        Section(
            "The text removed late",
            "The same noise, with the text removed for the last part of the steps: the pass with text is really not computed. "
            "One row a share of the steps; seconds are those of this machine.",
            ["removed.png"],
            shown(table),
        ),
    ]


def _facts(pipe: Any, run: Run, steps: int) -> str:
    size = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    return (
        f"Model: scenes, a Stable Diffusion of {size:.0f} million UNet parameters, trained on drawn scenes and bundled with "
        f"interp. {len(run)} pictures, {steps} DDIM steps, guidance {default_guidance(pipe):g}. So few prompts are an "
        "illustration, not a measurement: the model card (docs/scenes.md) has figures with their n."
    )
