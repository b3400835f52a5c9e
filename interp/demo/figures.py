"""The demo's own pictures: film-strip, swap triples, and the text removed late."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from interp.probes.frequency import predicted_data, split_bands
from interp.probes.style import new_figure
from interp.stores import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def decode(pipe: Any, latents: np.ndarray) -> np.ndarray:
    """Decode latents (sample, channel, y, x) to pictures (sample, height, width, rgb) in [0, 1]."""
    z = torch.from_numpy(np.ascontiguousarray(latents)).to(pipe.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
    pixels = pipe.vae.decode(z).sample.float().cpu().numpy()
    return np.moveaxis(np.clip(pixels / 2 + 0.5, 0, 1), 1, -1)


def filmstrip(pipe: Any, run: Run, *, sample: int = 0, columns: int = 8) -> "Figure":
    """Draw x_t, the predicted final picture, and its low- and high-frequency parts at some steps."""
    one = run.isel(sample=[sample])
    trajectory = one.trajectory.isel(sample=0).load()
    steps = np.unique(np.linspace(0, trajectory.sizes["step"] - 1, columns).round().astype(int))
    predicted = xr.DataArray(predicted_data(one, trajectory)[steps], dims=("step", "channel", "y", "x"))
    bands = split_bands(predicted)
    rows = {
        "latents x_t": trajectory["latents"].values[steps],
        "predicted picture": predicted.values,
        "its low frequencies": bands.sel(band="low").values,
        "its high frequencies": bands.sel(band="high").values,
    }
    figure, axes = new_figure(len(steps), len(rows), width=1.25, height=1.35)
    for r, (label, latents) in enumerate(rows.items()):
        for c, picture in enumerate(decode(pipe, latents.astype("float32"))):
            ax = axes[r * len(steps) + c]
            _picture(ax, picture)
            if r == 0:
                ax.set_title(f"step {steps[c]}", fontsize=8)
            if c == 0:
                ax.set_ylabel(label, fontsize=8)
    figure.suptitle(str(one.samples["prompt"].iloc[0]), fontsize=10)
    return figure


def swap_pictures(run: Run) -> "Figure":
    """Draw A, B, and A's words with B's end-of-text states, one row a prompt."""
    baseline, swapped = run.condition("baseline"), run.condition("eos")
    prompts, targets = list(baseline.samples["prompt"]), list(swapped.samples["target"])
    count = len(prompts)
    figure, axes = new_figure(6, (count + 1) // 2, width=1.6, height=1.75)
    for i in range(count):
        three = (
            (f"A: {prompts[i]}", baseline.images.values[i]),
            (f"B: {targets[i]}", baseline.images.values[prompts.index(targets[i])]),
            ("words of A, [EOS] of B", swapped.images.values[i]),
        )
        for j, (label, picture) in enumerate(three):
            ax = axes[i * 3 + j]
            _picture(ax, picture)
            ax.set_title(_wrapped(label), fontsize=6)
    return figure


def swap_sentence(swap: xr.Dataset) -> str:
    """Say in a sentence which prompt won here, by each metric, with 95 % intervals."""
    from interp.reproduction.measures import Estimate

    def told(mean: str, interval: str, **where: str) -> Estimate:
        low, high = swap[interval].sel(where).values
        return Estimate(float(swap[mean].sel(where)), float(low), float(high), swap.sizes["pair"])

    said = []
    for metric in map(str, swap["metric"].values):
        source, target = (
            told("alignment_mean", "alignment_interval", metric=metric, image="swap", text=text).text(2)
            for text in ("source", "target")
        )
        wins = told("target_wins", "target_wins_interval", metric=metric).percent()
        said.append(f"by {metric}: {source} with A, {target} with B, B wins in {wins} of the pairs")
    return "Alignment of the swapped picture " + "; ".join(said) + "."


def removed_pictures(run: Run, shares: Sequence[int], *, samples: int = 8) -> "Figure":
    """Draw each prompt's picture with the text removed for the last 0 … % of the steps, one row a share."""
    names = ["baseline", *(f"text removed for the last {share} %" for share in shares)]
    samples = min(samples, len(run.condition("baseline")))
    figure, axes = new_figure(samples, len(names), width=1.25, height=1.3)
    for r, (share, name) in enumerate(zip((0, *shares), names, strict=True)):
        part = run.condition(name)
        for c, picture in enumerate(part.images.values[:samples]):
            ax = axes[r * samples + c]
            _picture(ax, picture)
            if c == 0:
                ax.set_ylabel(f"last {share} %", fontsize=8)
            if r == 0:
                ax.set_title(_wrapped(str(part.samples["prompt"].iloc[c]), 22), fontsize=6)
    return figure


def _picture(ax: Any, picture: np.ndarray) -> None:
    ax.imshow(picture, interpolation="bilinear")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _wrapped(text: str, width: int = 30) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
