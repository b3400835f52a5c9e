"""How low and high spatial frequencies of the latents emerge over the steps (arXiv:2405.15330, §4.2)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.bands import BANDS, low_mask, split_bands
from interp.probes.base import probe
from interp.probes.bootstrap import units_of
from interp.probes.labels import sample_labels, trajectory_of
from interp.probes.needs import require
from interp.probes.progress import counted
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

__all__ = ["frequency_energy", "low_mask", "split_bands"]

NORMS = ("x_norm", "data_norm", "noise_norm")
TWIN = "noising_noise_norm"
RATIOS = ("variation", "noising_variation")
LONG_NAME = {
    "x_norm": "norm of the latents x_t",
    "data_norm": "norm of their data part, data_scale·x_0",
    "noise_norm": "norm of their noise part, x_t − data_scale·x_0",
    "variation": "‖x_t − x_0‖ / ‖x_0‖, denoising (this run)",
    "noising_noise_norm": "norm of the noise part when x_0 is noised, noise_scale·ε",
    "noising_variation": "‖x_t − x_0‖ / ‖x_0‖, noising x_0",
}


def draw(ds: xr.Dataset) -> Figure:
    """Draw data and noise norms, variation ratios and the spectrum's balance over the steps (three panels).

    ds: the result of `frequency_energy`. Lines are means over the samples, bands their bootstrap 95 % intervals.
    """
    from interp.probes.style import BLACK, BLUE, ORANGE, legend, new_figure, note, step_axis, title
    from interp.probes.style import curve as drawn

    curve = partial(drawn, units=units_of(ds))

    figure, (norms, ratios, balance) = new_figure(3)
    colour = {"low": BLUE, "high": ORANGE}
    for band in BANDS:
        part = ds.sel(band=band)
        curve(norms, ds.step, part.data_norm, color=colour[band], label=f"data, {band}")
        curve(norms, ds.step, part.noise_norm, color=colour[band], label=f"noise, {band}", dashed=True)
        curve(norms, ds.step, part[TWIN], color=colour[band], label=f"noise, noising, {band}", dashed=":")
        curve(ratios, ds.step, part.variation, color=colour[band], label=f"denoising, {band}")
        curve(ratios, ds.step, part.noising_variation, color=colour[band], label=f"noising, {band}", dashed=True)
    norms.set(ylabel=f"norm ({ds.data_norm.units})")
    title(norms, "Data and noise parts of xₜ")
    ratios.set(ylabel="‖xₜ − x₀‖ / ‖x₀‖ (1)", yscale="log")
    title(ratios, "Distance to the final latent")
    for name, label in {
        "x_norm": "latents xₜ",
        "data_norm": "data part",
        "noise_norm": "noise part",
    }.items():
        share = ds[name].sel(band="high") / ds[name].sel(band="low")
        shade = {"x_norm": BLACK, "data_norm": BLUE, "noise_norm": ORANGE}[name]
        curve(balance, ds.step, share, color=shade, label=label)
    balance.axhline(ds.attrs["white_noise_ratio"], color="0.5", linestyle=":", label="white noise")
    balance.set(ylabel="high norm / low norm (1)", yscale="log")
    title(balance, "Balance of the bands")
    for ax in (norms, ratios, balance):
        step_axis(ax)
    norms.set_ylim(top=1.3 * norms.get_ylim()[1])  # six curves leave no free corner for their names
    norms.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")
    legend(ratios)
    legend(balance)
    note(figure)
    return figure


@probe("frequency_energy", needs={"trajectory": ["latents", "final_latents"]}, plot=draw)
def frequency_energy(
    run: Run,
    *,
    low_fraction: float = 0.2,
    mask: str = "bins",
    data: str = "final",
    noise: str = "initial",
    seed: int = 0,
) -> xr.Dataset:
    """Low- and high-frequency norms of the latents, their data and their noise part (latent units).

    With x_t the latents entering a step and x_0 the final ones, the data part is data_scale·x_0 and the noise
    part x_t − data_scale·x_0 (data_scale is √ᾱ for a variance-preserving schedule, 1 for a σ-schedule, 1 − t
    for flow). Each is split by its orthonormal Fourier transform into the bins near DC (`low`) and the rest
    (`high`), summed over channels; the squared norms of the bands add up to the squared norm (Parseval).
    White noise has high/low = √((1−f)/f), with f the realised share of low bins: 2 for the default 20 %.

    Parameters: `low_fraction` and `mask` ("bins", "square", "radius" or "disc") choose the low bins, see
    `interp.probes.bands.low_mask`; the share realised on this grid is in attrs. `data="predicted"` takes for
    x_0 in the data and noise parts the model's own estimate at that step, from the guided `noise_pred` (refused for
    pipelines that rescale it);
    `"final"` takes the final latents. The variation ratios always compare with the final latents. `noise` is what the
    forward process takes for ε: `"initial"` the run's own initial noise, `"fresh"` noise drawn with `seed`.

    Returns a Dataset, all variables float64 (sample, step, band): `x_norm data_norm noise_norm` (latent units) with
    `x_energy data_energy noise_energy`, their squares; `variation` = ‖x_t − x_0‖/‖x_0‖ within the band; and of the
    forward-noising twin, x_0 noised to each step's level with one ε: `noising_variation`, the same ratio (both plain
    numbers), and `noising_noise_norm`, the norm of its noise_scale·ε (latent units). Samples that are not finished are
    NaN. Samples are read one by one: memory does not grow with their number.

    Raises InterpError for an unknown mask or `data`, a fraction outside (0, 1), what was not captured, and predicted data
    of a pipeline that rescales the guided prediction.
    Source: Yi et al., arXiv:2405.15330, section 4.2, Figure 2, Proposition 1.

    >>> from interp.stores import synthetic_run
    >>> ds = frequency_energy(synthetic_run(samples=2, steps=6, seed=0))
    >>> ds["noise_norm"].dims
    ('sample', 'step', 'band')
    >>> bool((ds["variation"].isel(step=0) > ds["variation"].isel(step=-1)).all())
    True
    """
    if data not in ("final", "predicted"):
        raise InterpError(f"data={data!r} is not possible; it is 'final' or 'predicted'")
    trajectory = trajectory_of(run)
    n, steps = trajectory.sizes["sample"], trajectory.sizes["step"]
    low = low_mask(trajectory.sizes["y"], trajectory.sizes["x"], low_fraction=low_fraction, mask=mask)
    data_scale = trajectory["data_scale"].values.astype(np.float64)[:, None, None, None]
    noise_scale = trajectory["noise_scale"].values.astype(np.float64)[:, None, None, None]
    if noise not in ("initial", "fresh"):
        raise InterpError(f"noise={noise!r} is not possible; it is 'initial' or 'fresh'")
    if data == "predicted":
        require(run, {"trajectory": ["noise_pred", "guidance_scale"]}, asker="frequency_energy(data='predicted')")
    numbers = {name: np.full((n, steps, 2), np.nan) for name in (*NORMS, TWIN, *RATIOS)}
    for i in counted(range(n)):
        one = trajectory.isel(sample=i)
        x = spectrum(one["latents"].values)
        x0 = spectrum(one["final_latents"].values)
        estimate = x0
        if data == "predicted":
            estimate = spectrum(predicted_data(run, one))
        part = data_scale * estimate
        if noise == "fresh":
            drawn = np.random.default_rng([seed, int(trajectory["sample"].values[i])])
            epsilon = spectrum(drawn.standard_normal(x[:1].shape))
        else:  # x_T/√(a² + s²) is the initial noise brought to unit variance
            epsilon = x[:1] / np.sqrt(data_scale[0] ** 2 + noise_scale[0] ** 2)
        reference = band_norms(x0[None], low)
        for name, field in zip(NORMS, (x, part, x - part), strict=True):
            numbers[name][i] = band_norms(field, low)
        noised_again = data_scale * x0 + noise_scale * epsilon
        numbers[TWIN][i] = band_norms(noise_scale * epsilon + 0 * x0, low)
        with np.errstate(invalid="ignore", divide="ignore"):  # a band in which x_0 is empty has no ratio
            numbers["variation"][i] = band_norms(x - x0, low) / reference
            numbers["noising_variation"][i] = band_norms(noised_again - x0, low) / reference
    dims = ("sample", "step", "band")
    variables: dict[str, Any] = {
        name: (
            dims,
            values,
            {"units": "1" if name in RATIOS else "latent units", "long_name": LONG_NAME[name]},
        )
        for name, values in numbers.items()
    }
    for name in NORMS:
        what = f"square of the {LONG_NAME[name]}"
        energy = (dims, numbers[name] ** 2, {"units": "latent units squared", "long_name": what})
        variables[name.replace("norm", "energy")] = energy
    coords = {c: trajectory[c] for c in ("step", "timestep", "sigma", "alpha_bar") if c in trajectory.coords}
    realised = float(low.mean())
    return xr.Dataset(variables, {**coords, "band": list(BANDS), **sample_labels(run)}).assign_attrs(
        low_fraction_realised=realised, white_noise_ratio=float(np.sqrt((1 - realised) / realised))
    )


def spectrum(field: np.ndarray) -> np.ndarray:
    """Return the orthonormal Fourier transform over y and x, complex128, of a field (…, y, x)."""
    return np.fft.fft2(np.asarray(field, dtype=np.float64), norm="ortho")


def band_norms(transformed: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return the L2 norms (step, band) of a spectrum (step, channel, y, x) in the low and the other bins."""
    power = (transformed.real**2 + transformed.imag**2).sum(1)
    return np.sqrt(np.stack([power[:, low].sum(1), power[:, ~low].sum(1)], axis=1))


def predicted_data(run: Run, one: xr.Dataset) -> np.ndarray:
    """Return the model's estimate of x_0 at each step, (step, channel, y, x) in latent units, for one sample.

    one: the trajectory of one sample. The two branches are combined as uncond + g·(cond − uncond); where one
    was not evaluated (NaN) the other stands alone. Raises InterpError for a prediction type that is not
    known, and for steps at which the pipeline made more of both branches than that (rescaled guidance).

    >>> from interp.stores import synthetic_run
    >>> run = synthetic_run(samples=1, steps=6)
    >>> predicted_data(run, run.trajectory.isel(sample=0)).shape == run.latents.isel(sample=0).shape
    True
    """
    kind = str(run.attrs.get("prediction_type", ""))
    branch = {str(b): one["noise_pred"].sel(branch=b).values.astype(np.float64) for b in one["branch"].values}
    missing = np.full_like(next(iter(branch.values())), np.nan)
    cond, uncond = branch.get("cond", missing), branch.get("uncond", missing)
    if run.attrs.get("rescaled_guidance") and not np.isnan(cond + uncond).all():
        raise InterpError(
            "x_0 cannot be predicted from this run's noise_pred: its pipeline rescales the guided prediction "
            "(guidance_rescale, or Qwen-Image's norm), which u + w·(c − u) is not; use data='final', or look at x̂0 itself, "
            "which `interp score RUN --metric x0` decodes with the pipeline's own rule"
        )
    scale = one["guidance_scale"].values.astype(np.float64)[:, None, None, None]
    guided = uncond + scale * (cond - uncond)
    guided = np.where(np.isnan(cond), uncond, np.where(np.isnan(uncond), cond, guided))
    x = one["latents"].values.astype(np.float64)
    a, s = (one[c].values.astype(np.float64)[:, None, None, None] for c in ("data_scale", "noise_scale"))
    if kind == "epsilon":
        return (x - s * guided) / a
    if kind == "v_prediction":
        c = np.hypot(a, s)  # 1 where variance is preserved; a σ-schedule stores c times the preserved latents
        return (a * x / c - s * guided) / c
    if kind in ("flow_prediction", "flow"):
        return x - s * guided
    if kind == "sample":
        return guided
    raise InterpError(f"this run's prediction_type is {kind!r}, from which x_0 cannot be predicted: use data='final'")
