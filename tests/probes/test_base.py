import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from interp import __version__
from interp.probes import Parameter, find_probe, plot, probe, require
from interp.probes.attribution import token_attribution
from interp.probes.frequency import frequency_energy
from interp.probes.testing import swap_run
from interp.stores import InterpError, open_run, synthetic_run


@probe("width", needs={"trajectory": ["latents"]})
def width(run, *, power: int = 1, dims: tuple[str, ...] = ("y", "x")):
    """Standard deviation of the latents (latent units), to the `power`, over `dims`."""
    return (run.latents.std(dims) ** power).assign_attrs(units="latent units")


def test_a_data_array_becomes_a_dataset_that_says_where_it_is_from():
    run = synthetic_run()
    ds = width(run, power=2)
    assert isinstance(ds, xr.Dataset) and list(ds.data_vars) == ["width"]
    assert ds.attrs["probe"] == "width" and ds.attrs["version"] == __version__
    assert ds.attrs["run_format"] == run.attrs["format"]
    assert json.loads(ds.attrs["parameters"]) == {"power": 2, "dims": ["y", "x"]}
    assert not ds["width"].encoding


def test_parameters_that_json_does_not_know_are_recorded():
    ds = token_attribution(synthetic_run(), steps=slice(0, 3), words=("a",))
    assert json.loads(ds.attrs["parameters"])["steps"] == "slice(0, 3, None)"
    ds = token_attribution(synthetic_run(), steps=np.arange(2))
    assert json.loads(ds.attrs["parameters"])["steps"] == [0, 1]


def test_a_probe_describes_itself():
    assert width.name == "width" and width.summary.startswith("Standard deviation")
    assert width.params == {"power": Parameter(1, "int"), "dims": Parameter(("y", "x"), "tuple[str, ...]")}
    assert repr(width) == "<probe width(run, power=1, dims=('y', 'x'))>"
    assert width.__doc__ == width.fn.__doc__ and width.__module__ == __name__
    assert pickle.loads(pickle.dumps(width)) is width  # noqa: S301


def test_runs_ask_probes():
    run = synthetic_run()
    assert run.probe("frequency_energy", low_fraction=0.3).identical(frequency_energy(run, low_fraction=0.3))
    assert run.probe(width).identical(width(run))


def test_wrong_calls_are_sentences():
    run = synthetic_run()
    with pytest.raises(InterpError, match="no parameter 'powr'; it has power, dims; did you mean 'power'"):
        width(run, powr=1)
    with pytest.raises(InterpError, match="no parameter 'zzz'; it has power, dims"):
        width(run, zzz=1)
    with pytest.raises(InterpError, match=r"given str where a run is expected: pass interp.open_run"):
        width("run.zarr")
    with pytest.raises(InterpError, match='write @probe\\("my_probe"\\)'):
        probe(lambda run: None)


def test_wrong_definitions_are_sentences():
    with pytest.raises(InterpError, match="parameter 'power' must be keyword-only with a default"):
        probe("x")(lambda run, power=1: None)
    with pytest.raises(InterpError, match="parameter 'power' must be keyword-only"):

        @probe("x")
        def f(run, *, power): ...

    with pytest.raises(InterpError, match="takes no run"):
        probe("x")(lambda: None)


def test_wrong_results_are_sentences():
    run = synthetic_run()
    nothing = probe("x")(lambda run: None)
    bare = probe("x")(lambda run: xr.DataArray(np.zeros(3), dims="step"))
    unnamed = probe("x")(lambda run: xr.DataArray(np.zeros(3), attrs={"units": "1"}))
    for broken, text in (
        (nothing, "returned NoneType"),
        (bare, "has no units"),
        (unnamed, "unnamed dimensions dim_0"),
    ):
        with pytest.raises(InterpError, match=text):
            broken(run)


@pytest.mark.parametrize(
    ("run", "needs", "text"),
    [
        ({"omit": ("attention",)}, {"attention": True}, r'did not capture: .*Capture\(attention="cross"\)'),
        ({}, {"attention": "32x32"}, "'32x32' in attention, where this run has 8x8"),
        ({"omit": ("noise_pred",)}, {"trajectory": ["noise_pred"]}, r"Capture\(noise_pred=True\)"),
        ({"omit": ("latents",)}, {"trajectory": ["latents"]}, r"Capture\(latents=True\)"),
        ({}, {"self_attention": True}, r'Capture\(attention="self"\)'),
        ({}, {"sites": ["unet.mid:out"]}, r"sites 'unet.mid:out'.*Capture\(sites="),
        ({"omit": ("images",)}, {"images": True}, r"Capture\(image=True\)"),
        ({"omit": ("text",)}, {"text": True}, r"Capture\(text=True\)"),
        ({"scores": False}, {"scores": ["clip:prompt"]}, "has not got: run `interp score RUN`"),
        (
            {},
            {"scores": ["vqa:prompt"]},
            "'vqa:prompt' in scores, where this run has clip:prompt.*interp score RUN",
        ),
        ({}, {"samples": ["target2"]}, "add that column to the table of prompts"),
        ({}, {"atention": True}, "which no run has; did you mean 'attention'"),
    ],
)
def test_needs(run, needs, text):
    with pytest.raises(InterpError, match=text) as error:
        require(synthetic_run(**run), needs, asker="probe 'x'")
    assert str(error.value).startswith("probe 'x' needs ") and "\n" not in str(error.value)


def test_needs_that_are_met():
    needs = {
        "trajectory": ["latents", "noise_pred"],
        "attention": "8x8",
        "scores": "clip:prompt",
        "samples": ["target"],
    }
    require(synthetic_run(), {**needs, "images": True, "text": ["text_encoder"]})


@pytest.mark.parametrize("name", ["frequency_energy", "token_attribution", "attention_mass", "eos_replacement"])
def test_plots_have_labelled_axes(name):
    ds = find_probe(name)(swap_run(samples=3))
    figure = plot(ds)
    for ax in figure.axes:
        assert not ax.axison or (ax.get_xlabel() and ax.get_ylabel())
    figure.canvas.draw()


def test_plot_options_and_images():
    from matplotlib import get_backend, rcParams

    before = dict(rcParams), get_backend()
    run = synthetic_run(samples=2)
    ds = token_attribution(run)
    assert len(plot(ds, samples=(0, 1), columns=4).axes) == 4 * 2 + 4 * 2
    pictures = [ax.get_images() for ax in plot(ds, run=run, what="token").axes]
    assert pictures[0][0].get_array().shape == (64, 64, 3) and len(pictures[1]) == 2
    assert plot(token_attribution(synthetic_run(omit=("images",)))).axes
    with pytest.raises(InterpError, match="sample 5 is not there"):
        plot(ds, samples=(5,))
    assert (dict(rcParams), get_backend()) == before


def test_a_probe_without_a_plot_is_drawn_as_curves():
    run = synthetic_run()
    figure = plot(width(run), probe=width)
    assert figure.axes[0].get_ylabel() == "width (latent units)" and len(figure.axes[0].lines) == 4
    no_steps = width(run).mean("step", keep_attrs=True)
    with pytest.raises(InterpError, match="nothing in this result depends on the step"):
        plot(no_steps, probe=width)
    with pytest.raises(InterpError, match="takes the Dataset that a probe returned"):
        plot(xr.Dataset())
    with pytest.raises(InterpError, match="no probe named 'width'"):
        plot(width(run))


def test_results_can_be_saved(tmp_path):
    path = tmp_path / "run.zarr"
    synthetic_run(samples=2, path=path)
    for name in ("frequency_energy", "token_attribution", "attention_mass"):
        ds = open_run(path).probe(name)
        ds.to_zarr(tmp_path / name, consolidated=False, zarr_format=2)
        again = xr.open_zarr(tmp_path / name, consolidated=False).load()
        xr.testing.assert_equal(again, ds)


def test_memory_and_disk_give_the_same(tmp_path):
    kwargs = {"samples": 3, "conditions": ("baseline", "eos"), "grids": ("4x6", "8x8"), "heads": 2}
    memory = synthetic_run(**kwargs)
    synthetic_run(**kwargs, path=tmp_path / "run.zarr")
    disk = open_run(tmp_path / "run.zarr")
    for name, params in (
        ("token_attribution", {"steps": [4, 0]}),
        ("attention_mass", {"steps": "1:3", "layers": "*0*"}),
        ("eos_replacement", {}),
        ("frequency_energy", {"data": "predicted"}),
    ):
        xr.testing.assert_identical(memory.probe(name, **params).load(), disk.probe(name, **params).load())
    some = token_attribution(disk.isel([0, 2, 5]))
    xr.testing.assert_equal(some.word_map, token_attribution(memory).word_map.isel(sample=[0, 2, 5]))


def test_importing_is_light():
    heavy = ("torch", "diffusers", "transformers", "matplotlib", "dask")
    code = f"import sys, interp.probes; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
