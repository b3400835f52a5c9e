"""interp.sweep: a grid is one run with a condition a point; its effects are differences of pairs; it resumes."""

import numpy as np
import pytest

import interp
from interp.interventions import neighbours
from interp.probes import plot
from tests.interp.reference import tiny

A, B = "a red circle", "a dog on the blue square background"
TABLE = [{"prompt": A, "target": B}, {"prompt": B, "target": A}, {"prompt": "a cat", "target": "a green dog"}]
SITES = ["unet.mid_block:out", "unet.up_blocks.0:out"]
EASY = {"steps": 2, "guidance_scale": 4.0, "progress": False, "resamples": 200}
FINAL = interp.Capture(attention=None, latents=False, noise_pred=False, image=False)


def distances(one, other):
    a, b = (r.final_latents.values.astype(float).reshape(len(r), -1) for r in (one, other))
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


def test_a_grid_equals_runs_by_hand():
    pipe = tiny("sd1")
    ds = interp.sweep(
        pipe, TABLE, over={"site": SITES, "window": [(0, 0.5), (None, None)]}, intervention=interp.Ablate,
        metric="latent_distance", capture=FINAL, batch_size=3, **EASY,
    )  # fmt: skip
    assert ds.effect.dims == ("site", "window", "metric", "pair") and ds.effect.shape == (2, 2, 1, 3)
    assert ds.site.values.tolist() == SITES and ds.window.values.tolist() == ["0–0.5", "–"]
    settings = {k: v for k, v in EASY.items() if k != "resamples"} | {"capture": FINAL, "batch_size": 3}
    base = interp.trace(pipe, TABLE, **settings)
    for i, site in enumerate(SITES):
        for j, window in enumerate(({"stop": 0.5}, {})):
            run = interp.trace(pipe, TABLE, interventions=[interp.Ablate(site, **window)], **settings)
            assert np.allclose(ds.effect[i, j, 0], distances(run, base), rtol=1e-12)
    assert np.allclose(ds.effect_mean, ds.effect.mean("pair"))
    low, high = (ds.effect_interval.sel(bound=b) for b in ("low", "high"))
    assert ((low <= ds.effect_mean) & (ds.effect_mean <= high)).all() and (low < high).all()
    assert (ds.clean_value == 0).all() and ds.prompt.values.tolist() == [row["prompt"] for row in TABLE]
    assert len(plot(ds).axes) == 1 and len(plot(ds.isel(window=0)).axes) == 1


def test_causal_tracing_restores_all_or_nothing():
    """Restoring the encoder's last layer recovers everything, restoring another token nothing, in two lines."""
    pipe, layers = tiny("sd1"), [f"text_encoder.encoder.layers.{i}:out" for i in range(2)]
    clean = interp.trace(pipe, TABLE, capture=FINAL, steps=2, progress=False, guidance_scale=4.0)
    ds = interp.sweep(
        pipe, TABLE, over={"site": layers, "tokens": [None, ("bos",)]}, capture=FINAL, metric="latent_distance",
        intervention=lambda site, tokens: interp.Patch(clean, site, tokens=tokens),
        corrupted=[interp.AddNoise("text_encoder.embeddings:out", scale=3.0)], **EASY,
    )  # fmt: skip
    assert ds.attrs["reference"] == "corrupted" and ds.tokens.values.tolist() == ["all", "bos"]
    assert np.allclose(ds.recovered.sel(tokens="all"), 1) and (ds.recovered.sel(tokens="bos") < 0.9).all()
    assert np.allclose(ds.recovered_interval.sel(tokens="all"), 1)
    assert np.allclose(ds.effect, ds.value - ds.corrupted_value) and (ds.corrupted_value > 0).all()
    # the probe causal_tracing, asked of such a run, says the same
    ratio = ds.effect.mean("pair") / (ds.clean_value - ds.corrupted_value).mean("pair")
    assert np.allclose(ds.recovered, ratio)
    plot(ds)


def test_the_layer_sweep_of_locogen(tmp_path):
    pipe = tiny("sd1")
    layers = [s.name.removesuffix(":probs") for s in interp.sites(pipe, "*attn2:probs")]
    assert neighbours(layers, 3) == [tuple(layers[i : i + 3]) for i in range(len(layers) - 2)]
    store = tmp_path / "loco.zarr"
    ds = interp.sweep(
        pipe, TABLE, over={"layers": [*neighbours(layers, 3)[:2], ("*",)]},
        intervention=interp.ReplacePrompt("{target}"), metric="latent_distance", capture=FINAL, store=store, **EASY,
    )  # fmt: skip
    assert ds.layers.values[-1] == "*" and (ds.effect > 0).all()
    run = interp.open_run(store)
    assert run.conditions[0] == "baseline" and len(run) == 4 * 3
    again = run.probe("sweep", metrics=["latent_distance"], resamples=200)
    assert again.identical(ds)


def test_it_resumes_and_measures_once(tmp_path, monkeypatch):
    pipe, calls = tiny("sd1"), []

    def brightness(run):
        calls.append(len(run))
        return run.images.values.mean((1, 2, 3))

    asked = {
        "over": {"coefficient": [0.0, 50.0]}, "intervention": interp.Steer(SITES[0], [1.0] * 32),
        "metric": [brightness, "image_distance"], "store": tmp_path / "run.zarr", **EASY,
    }  # fmt: skip
    first = interp.sweep(pipe, TABLE, **asked)
    assert first.coefficient.values.tolist() == [0.0, 50.0] and first.metric.values.tolist() == [
        "image_distance",
        "brightness",
    ]
    assert (first.effect.sel(coefficient=0.0) == 0).all() and (
        first.effect.sel(coefficient=50.0, metric="image_distance") > 0
    ).all()
    monkeypatch.setattr(type(pipe.unet), "forward", None)  # nothing runs again
    assert interp.sweep(pipe, TABLE, **asked).identical(first)
    assert len(plot(first).axes) == 2


def test_an_intervention_from_data():
    ds = interp.sweep(
        tiny("sd1"), A, over={"site": SITES}, intervention={"name": "ablate", "value": "mean"}, capture=FINAL,
        metric="latent_distance", **EASY,
    )  # fmt: skip
    assert ds.sizes["site"] == 2 and np.isnan(ds.effect_interval).all()  # one pair has no interval


@pytest.mark.parametrize(("given", "said"), [
    ({"over": {"sites": SITES}}, "Ablate has no 'sites'; did you mean 'site'"),
    ({"over": {}}, "one or more names"),
    ({"over": {"site": SITES[0]}}, "a list of values"),
    ({"over": {"site": [SITES[0]] * 2}}, "two points of the grid"),
    ({"over": {"site": SITES, "window": [0.5]}}, r"a window is a pair \(start, stop\)"),
    ({"intervention": 3}, "give a class or function"),
    ({"intervention": lambda site: None}, "neither an intervention nor a list"),
    ({"intervention": {"name": "ablat"}}, "ablat"),
    ({"corrupted": interp.Ablate(SITES[0])}, "come in lists"),
    ({"metric": "clipp"}, "clip"),
    ({"metric": lambda run: 3.0}, "one number a sample"),
])  # fmt: skip
def test_one_sentence(given, said):
    asked = {"over": {"site": SITES[:1]}, "intervention": interp.Ablate, **EASY, "steps": 1, **given}
    with pytest.raises(interp.InterpError, match=said) as error:
        interp.sweep(tiny("sd1"), A, **asked)
    assert "\n" not in str(error.value)
