import numpy as np
import pytest

from interp.probes.guidance import guidance_norm
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import make_run, trajectory

A = np.array([0.2, 0.5, 0.9])


def run_of(pred, scale):
    """pred (sample, step, branch, channel, y, x), branches cond and uncond; scale (sample, step)."""
    latents = np.zeros((len(pred), 3, *pred.shape[3:]))
    node = trajectory(latents, latents[:, 0], A, 1 - A, noise_pred=pred, guidance_scale=scale)
    return make_run({"trajectory": node}, prompt=[""] * len(pred))


def test_norms_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    pred, scale = rng.standard_normal((2, 3, 2, 4, 5, 6)), rng.uniform(1, 9, (2, 3))
    ds = guidance_norm(run_of(pred, scale))
    for i in range(2):
        for s in range(3):
            cond, uncond = pred[i, s].reshape(2, -1)
            root = np.sqrt(4 * 5 * 6)
            one = ds.isel(sample=i, step=s)
            assert float(one.uncond_norm) == pytest.approx(np.linalg.norm(uncond) / root)
            assert float(one.guidance_norm) == pytest.approx(np.linalg.norm(scale[i, s] * (cond - uncond)) / root)
            assert float(one.ratio) == pytest.approx(float(one.guidance_norm / one.uncond_norm))
            assert float(one.cosine) == pytest.approx(cond @ uncond / np.linalg.norm(cond) / np.linalg.norm(uncond))


def test_the_norm_does_not_depend_on_the_size():
    small, large = (guidance_norm(run_of(np.ones((1, 3, 2, 1, n, n)) * [[[[1.5]]], [[[0.5]]]], np.full((1, 3), 4.0)))
                    for n in (2, 16))  # fmt: skip
    for ds in (small, large):
        assert np.allclose(ds.uncond_norm, 0.5) and np.allclose(ds.guidance_norm, 4.0) and np.allclose(ds.cosine, 1)


def test_a_branch_that_was_not_evaluated_has_no_guidance():
    pred = np.random.default_rng(1).standard_normal((1, 3, 2, 1, 4, 4))
    pred[0, 1, 0] = np.nan  # without text at step 1
    pred[0, 2, 1] = np.nan  # without the other branch at step 2
    ds = guidance_norm(run_of(pred, np.full((1, 3), 2.0)))
    assert np.isfinite(ds.uncond_norm[0]).values.tolist() == [True, True, False]
    assert np.isfinite(ds.ratio[0]).values.tolist() == [True, False, False]
    with pytest.raises(InterpError, match=r"Capture\(noise_pred=True\)"):
        guidance_norm(synthetic_run(omit=("noise_pred",)))
