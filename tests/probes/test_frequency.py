import numpy as np
import pytest
import xarray as xr

from interp.probes.bands import low_mask, split_bands
from interp.probes.frequency import frequency_energy, predicted_data
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import make_run, trajectory

A = np.array([0.1, 0.5, 0.9])
S = np.sqrt(1 - A**2)


def noised(final, noise, a=A, s=S):
    """(sample, step, channel, y, x) = a·final + s·noise."""
    a, s = (np.asarray(v)[None, :, None, None, None] for v in (a, s))
    return a * final[:, None] + s * noise[:, None]


def field_run(final, noise=None, **more):
    noise = np.zeros_like(final) if noise is None else noise
    return make_run({"trajectory": trajectory(noised(final, noise), final, A, S, **more)})


@pytest.mark.parametrize("mask", ["bins", "square", "radius", "disc"])
@pytest.mark.parametrize("shape", [(8, 8), (12, 7), (9, 16), (64, 64)])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_masks_hold_dc_and_mirror_images(mask, shape, fraction):
    low = low_mask(*shape, low_fraction=fraction, mask=mask)
    mirrored = np.roll(low[::-1, ::-1], (1, 1), (0, 1))
    assert low[0, 0] and not low.all() and np.array_equal(low, mirrored)
    if mask in ("bins", "square") and shape == (64, 64):
        assert abs(low.mean() - fraction) < 0.03


def test_bins_are_the_nearest_to_dc():
    low = low_mask(16, 10)
    distance = np.hypot(np.fft.fftfreq(16)[:, None], np.fft.fftfreq(10))
    assert distance[low].max() < distance[~low].min()


def test_the_three_readings_of_the_paper():
    assert low_mask(64, 64).mean() == pytest.approx(0.2, abs=0.003)
    assert 0.03 < low_mask(64, 64, mask="radius").mean() < 0.04
    assert low_mask(64, 64, mask="disc").mean() == pytest.approx(0.108, abs=0.001)


def test_a_constant_is_low_only():
    ds = frequency_energy(field_run(np.full((1, 2, 8, 8), 3.0)))
    assert np.allclose(ds.x_energy.sel(band="high"), 0, atol=1e-20)
    assert np.allclose(ds.x_norm.sel(band="low")[0], A * 3 * np.sqrt(2 * 64))


def test_a_fast_cosine_is_high_only():
    wave = np.cos(2 * np.pi * 3 * np.arange(8) / 8) * np.ones((1, 1, 8, 1))
    ds = frequency_energy(field_run(wave))
    assert np.allclose(ds.x_energy.sel(band="low"), 0, atol=1e-12)
    assert np.allclose(ds.data_norm.sel(band="high")[0], A * np.linalg.norm(wave))


def test_parseval_and_parts_against_plain_loops():
    rng = np.random.default_rng(0)
    final, noise = rng.standard_normal((2, 2, 3, 6, 10))
    run = field_run(final, noise)
    ds = frequency_energy(run, low_fraction=0.3)
    low = low_mask(6, 10, low_fraction=0.3)
    for i in range(2):
        for t in range(3):
            x, x0 = run.latents.values[i, t].astype(float), run.final_latents.values[i].astype(float)
            assert float(ds.x_energy[i, t].sum()) == pytest.approx((x**2).sum())
            part = {"x": x, "data": A[t] * x0, "noise": x - A[t] * x0}
            for name, whole in part.items():
                smooth = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in whole])
                for band, field in (("low", smooth), ("high", whole - smooth)):
                    got = float(ds[f"{name}_norm"].sel(band=band)[i, t])
                    assert got == pytest.approx(np.linalg.norm(field), abs=1e-9)
            gap = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in x - x0])
            base = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in x0])
            expected = np.linalg.norm(gap) / np.linalg.norm(base)
            assert float(ds.variation.sel(band="low")[i, t]) == pytest.approx(expected)


def test_noise_part_is_the_noise():
    rng = np.random.default_rng(1)
    final, noise = rng.standard_normal((2, 1, 4, 16, 16))
    ds = frequency_energy(field_run(final, noise))
    assert np.allclose(np.sqrt(ds.noise_energy.sum("band"))[0], S * np.linalg.norm(noise), rtol=1e-6)
    zero = frequency_energy(field_run(final))
    assert np.allclose(zero.noise_norm, 0, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
def test_white_noise_has_the_ratio_of_the_numbers_of_bins(fraction):
    noise = np.random.default_rng(2).standard_normal((1, 16, 64, 64))
    ds = frequency_energy(field_run(np.zeros_like(noise) + 1e-9, noise), low_fraction=fraction)
    ratio = (ds.noise_norm.sel(band="high") / ds.noise_norm.sel(band="low")).values
    assert np.allclose(ratio, np.sqrt((1 - fraction) / fraction), rtol=0.02)
    assert ds.attrs["white_noise_ratio"] == pytest.approx(np.sqrt((1 - fraction) / fraction), rel=0.01)


def test_noising_again_is_what_an_exact_denoiser_does():
    rng = np.random.default_rng(3)
    final, noise = rng.standard_normal((2, 1, 4, 16, 16))
    a = np.array([1e-4, 0.5, 0.9])
    run = make_run({"trajectory": trajectory(noised(final, noise, a, np.sqrt(1 - a**2)), final, a, np.sqrt(1 - a**2))})
    ds = frequency_energy(run)
    assert np.allclose(ds.variation, ds.noising_variation, rtol=1e-3)


def test_the_twin_has_the_noise_of_the_forward_process():
    """Proposition 1 and Figure 2b: √(1 − ᾱ)·ε with a flat spectrum, whatever the run did."""
    final = np.random.default_rng(5).standard_normal((2, 4, 64, 64))
    run = field_run(final, 0 * final)
    ds = frequency_energy(run, noise="fresh", seed=3)
    for band, share in (("low", 0.2), ("high", 0.8)):
        expected = S * np.sqrt(4 * 64 * 64 * share)
        assert np.allclose(ds.noising_noise_norm.sel(band=band), expected, rtol=0.03)
    low = low_mask(64, 64)
    noise = np.random.default_rng([3, 1]).standard_normal((1, 4, 64, 64))[0]
    part = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in noise])
    assert np.allclose(ds.noising_noise_norm.sel(band="low")[1], S * np.linalg.norm(part))
    gap = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in (A[1] - 1) * final[1] + S[1] * noise])
    base = np.stack([np.fft.ifft2(np.fft.fft2(c) * low).real for c in final[1]])
    got = float(ds.noising_variation.sel(band="low")[1, 1])
    assert got == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(base), rel=1e-5)
    assert not ds.identical(frequency_energy(run, noise="fresh", seed=4))
    assert np.allclose(
        frequency_energy(run.isel([1]), noise="fresh", seed=3).noising_noise_norm, ds.noising_noise_norm[1:]
    )
    with pytest.raises(InterpError, match="noise='pink' is not possible"):
        frequency_energy(run, noise="pink")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("schedule", ["preserving", "sigma"])
def test_prediction_is_exact_for_an_exact_model(kind, schedule):
    rng = np.random.default_rng(4)
    final, noise = rng.standard_normal((2, 1, 2, 8, 8))
    a, s = (A, S) if schedule == "preserving" else (np.ones(3), np.array([9.0, 2.0, 0.3]))
    if kind == "flow_prediction":
        a, s = np.array([0.1, 0.4, 0.8]), np.array([0.9, 0.6, 0.2])
    c = np.hypot(a, s)
    at, st = ((v / c)[None, :, None, None, None] for v in (a, s))
    output = {
        "epsilon": noise[:, None] + 0 * at,
        "v_prediction": at * noise[:, None] - st * final[:, None],
        "sample": final[:, None] + 0 * at,
        "flow_prediction": noise[:, None] - final[:, None] + 0 * at,
    }[kind]
    cond, uncond = output + 1.0, output + 1.5  # guided with scale 3: uncond + 3·(cond − uncond) = output
    pred = np.stack([cond, uncond], axis=2)
    pred[0, 1, 0], pred[0, 1, 1] = (
        np.nan,
        output[0, 1],
    )  # at step 1 without the text, at step 2 without the other
    pred[0, 2, 0], pred[0, 2, 1] = output[0, 2], np.nan
    more = {"noise_pred": pred, "guidance_scale": np.full((1, 3), 3.0)}
    run = make_run({"trajectory": trajectory(noised(final, noise, a, s), final, a, s, **more)})
    run.tree.attrs["prediction_type"] = kind
    assert np.allclose(predicted_data(run, run.trajectory.isel(sample=0)), final, atol=1e-4)
    both = [frequency_energy(run, data=data) for data in ("final", "predicted")]
    assert np.allclose(both[0].data_norm, both[1].data_norm, rtol=1e-4)


def test_unfinished_samples_are_nan():
    final = np.ones((2, 1, 8, 8))
    final[1] = np.nan
    ds = frequency_energy(field_run(final))
    assert np.isfinite(ds.x_norm[0]).all() and np.isnan(ds.x_norm[1]).all()


def test_split_bands_adds_up_and_stays_lazy():
    run = synthetic_run(samples=2, steps=3)
    parts = split_bands(run.latents, low_fraction=0.4)
    assert parts.dims == ("band", *run.latents.dims) and parts.dtype == np.float32
    assert np.allclose(parts.sum("band"), run.latents, atol=1e-5)
    assert parts.attrs["low_fraction_realised"] == low_mask(16, 16, low_fraction=0.4).mean()
    energy = (parts.astype(float) ** 2).sum(["channel", "y", "x"]).transpose("sample", "step", "band")
    assert np.allclose(energy, frequency_energy(run, low_fraction=0.4).x_energy, rtol=1e-5)
    lazy = split_bands(run.latents.chunk({"sample": 1, "y": 8}), low_fraction=0.4)
    assert lazy.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), parts)


def test_mistakes_are_sentences():
    run = synthetic_run(samples=1)
    with pytest.raises(InterpError, match=r"no mask named 'bin'; there are .*; did you mean 'bins'"):
        frequency_energy(run, mask="bin")
    with pytest.raises(InterpError, match=r"low_fraction=1.5 must lie between 0 and 1"):
        frequency_energy(run, low_fraction=1.5)
    with pytest.raises(InterpError, match="'final' or 'predicted'"):
        frequency_energy(run, data="x")
    with pytest.raises(InterpError, match=r"did not capture.*Capture\(latents=True\)|Capture\(latents=True\)"):
        frequency_energy(synthetic_run(omit=("latents",)))
    with pytest.raises(InterpError, match=r"Capture\(noise_pred=True\)"):
        frequency_energy(synthetic_run(omit=("noise_pred",)), data="predicted")
    with pytest.raises(InterpError, match="needs dimensions y and x"):
        split_bands(run.nfe)
    run.tree.attrs["prediction_type"] = "other"
    with pytest.raises(InterpError, match="prediction_type is 'other'"):
        frequency_energy(run, data="predicted")
