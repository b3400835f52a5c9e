import numpy as np
import pytest
import xarray as xr

from interp.probes.film import x0_film
from interp.probes.testing import film_run
from interp.stores import InterpError, open_run, synthetic_run
from tests.probes.handmade import make_run


def hand_run(film, image=None, status=(1, 1)):
    node = xr.Dataset(
        {"image": (("sample", "step", "height", "width", "rgb"), film)}, {"step": np.arange(film.shape[1]) * 5}
    )
    nodes = {"x0": node}
    if image is not None:
        nodes["images"] = xr.Dataset({"image": (("sample", "height", "width", "rgb"), image)})
    return make_run(nodes, status=list(status))


def test_distances_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    film, image = (
        rng.integers(0, 256, (2, 4, 5, 6, 3)).astype("uint8"),
        rng.integers(0, 256, (2, 5, 6, 3)).astype("uint8"),
    )
    ds = x0_film(hand_run(film, image), frames=2)
    for i in range(2):
        for s in range(4):
            far = np.abs(film[i, s].astype(int) - image[i].astype(int)).mean() / 255
            assert float(ds.distance[i, s]) == pytest.approx(far)
            if s:
                step = np.abs(film[i, s].astype(int) - film[i, s - 1].astype(int)).mean() / 255
                assert float(ds.change[i, s]) == pytest.approx(step)
    assert np.isnan(ds.change[:, 0]).all() and ds.attrs["end"] == "the image"
    assert ds.frame_step.values.tolist() == [0, 15] and np.array_equal(ds.image, film[:, [0, 3]])


def test_strips_are_chosen_and_failures_have_no_numbers():
    film = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 6, 3)).astype("uint8")
    ds = x0_film(hand_run(film, status=(1, 2)), samples=[1], frames=9)
    assert np.array_equal(ds.image[0], film[1]) and ds.strip_sample.values.tolist() == [1]
    assert ds.attrs["end"] == "the last x̂0" and float(ds.distance[0, -1]) == 0
    assert np.isnan(ds.distance[1]).all()
    for kwargs, text in (({"samples": [2]}, "sample 2 is not there"), ({"frames": 0}, "frames=0 is not possible")):
        with pytest.raises(InterpError, match=text):
            x0_film(hand_run(film), **kwargs)
    with pytest.raises(InterpError, match=r"needs x0, which this run has not got: run `interp score RUN --metric x0`"):
        x0_film(synthetic_run())


def test_a_stored_film_is_the_same(tmp_path):
    memory = film_run(samples=3, steps=5)
    film_run(samples=3, steps=5, path=tmp_path / "run.zarr")
    stored = x0_film(open_run(tmp_path / "run.zarr"))
    xr.testing.assert_allclose(stored, x0_film(memory))
    assert (stored.distance.diff("step") < 0).all()
