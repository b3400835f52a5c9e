"""A run larger than the memory: shortcuts are dask arrays by samples, results are the same."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import xarray as xr

from interp.probes import probe
from interp.probes import sparing as module
from interp.probes.sparing import SparingRun, sparing
from interp.stores import open_run, synthetic_run


@probe("extent")
def extent(run):
    """Standard deviation of the latents and mean attention (latent units)."""
    std = run.latents.std(["channel", "y", "x"]).assign_attrs(units="latent units")
    seen = run.condition("eos").attention().mean(["query_y", "query_x", "head", "layer", "token"])
    return xr.Dataset({"std": std, "seen": seen.reset_coords(drop=True).rename(sample="swap").assign_attrs(units="1")})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    synthetic_run(samples=3, steps=12, conditions=("baseline", "eos"), path=path)
    return path


def test_large_arrays_are_lazy_in_every_shortcut_and_selection(stored):
    run = SparingRun(open_run(stored).tree, stored, large=0)
    assert run.latents.chunksizes["sample"] == (1,) * 6
    assert run.trajectory["noise_pred"].chunksizes["sample"] == (1,) * 6
    assert run.attention().chunksizes["step"] == (10, 2)
    part = run.condition("eos")
    assert part.latents.chunksizes["sample"] == (1,) * 3 and part.done.images.chunksizes["sample"] == (1,) * 3
    assert part.samples["condition"].tolist() == ["eos"] * 3
    assert np.array_equal(part.latents, open_run(stored).condition("eos").latents)
    assert sparing(run) is run


def test_runs_in_memory_and_small_arrays_are_left_alone(stored):
    memory = synthetic_run()
    assert sparing(memory) is memory
    assert sparing(open_run(stored)).latents.chunks is None


def test_a_probe_of_a_large_run_gives_the_same(stored, monkeypatch):
    plain = extent(open_run(stored))
    monkeypatch.setattr(module, "sparing", lambda run: SparingRun(run.tree, run.path, large=0))
    monkeypatch.setattr("interp.probes.base.sparing", module.sparing)
    lazy = extent(open_run(stored))
    assert all(v.chunks is None for v in lazy.data_vars.values())  # a small result is computed
    xr.testing.assert_allclose(plain, lazy, rtol=1e-6)
    monkeypatch.setattr("interp.probes.base.LARGE", 0)
    assert all(v.chunks is not None for v in extent(open_run(stored)).data_vars.values())


CODE = """
import resource, sys
from interp.probes import probe
from interp.probes import sparing
from interp.stores import open_run
sparing.LARGE = 2**20
sparing.SparingRun.__init__.__kwdefaults__["large"] = 2**20
@probe("mean")
def mean(run):
    '''Mean of the latents (latent units).'''
    return run.latents.mean(["channel", "y", "x"]).assign_attrs(units="latent units")
run = open_run(sys.argv[1])
mean(run.isel([0, 1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mean(run)
print(run.latents.nbytes // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_below_the_run(tmp_path):
    path = tmp_path / "run.zarr"
    synthetic_run(samples=48, steps=300, omit=("noise_pred", "attention", "images", "text"), path=path)
    out = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=True)
    whole, peak = map(int, out.stdout.split())  # KiB
    assert whole > 50_000 and peak < whole / 3


def test_a_bar_is_shown_to_those_who_watch_alone(monkeypatch, capsys):
    from interp.probes import progress

    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, disable=False))  # which tests disable elsewhere
    run = synthetic_run(samples=3)
    lazy = run.latents.chunk({"sample": 1}).mean()
    quiet = run.probe("frequency_energy")
    lazy.compute()
    assert capsys.readouterr().err == ""
    with progress.watched():
        assert run.probe("frequency_energy").identical(quiet)
        assert "/3" in capsys.readouterr().err
        lazy.compute()
        assert "100% Completed" in capsys.readouterr().err
    run.probe("frequency_energy")
    assert capsys.readouterr().err == ""
