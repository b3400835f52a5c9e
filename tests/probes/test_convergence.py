import numpy as np
import pytest
import xarray as xr
from skimage.feature import canny

from interp.probes.convergence import attention_convergence, edge_f1, edges, shrunk
from interp.probes.maps import resize
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import attention, make_run

SIZE = 32


def square(first, last):
    field = np.zeros((SIZE, SIZE))
    field[first:last, first:last] = 1.0
    return field


def run_of(word_maps, image, status=(1,)):
    """word_maps (step, y, x) of the one word of a prompt; image (y, x), 0 to 255."""
    probs = np.stack([1 - word_maps, word_maps], axis=1)[None, :, None, None, None]
    probs = np.repeat(probs, len(status), 0)
    picture = np.repeat(image[None, ..., None], 3, -1).astype("uint8")
    images = xr.Dataset({"image": (("sample", "height", "width", "rgb"), np.repeat(picture, len(status), 0))})
    n = len(status)
    node = attention(probs, [["<s>", "box"]] * n, [["bos", "word"]] * n, [[-1, 0]] * n)
    return make_run({f"attention/{SIZE}x{SIZE}": node, "images": images}, status=list(status))


def plain_f1(found, wanted):
    hits = np.logical_and(found, wanted).sum()
    return 2 * hits / (found.sum() + wanted.sum())


def test_a_map_becomes_the_picture():
    rng = np.random.default_rng(0)
    maps = np.stack([rng.uniform(0, 0.5, (SIZE, SIZE)), 0.2 * square(4, 20) + 0.1, 0.6 * square(8, 24) + 0.1])
    ds = attention_convergence(run_of(maps, 200 * square(8, 24)), sigma=1.5)
    f1 = ds.f1[0, :, 0].values
    assert f1[2] == 1.0 and f1[0] < 0.4 and 0 < f1[1] < 1
    wanted = canny(square(8, 24), sigma=1.5)
    moved = canny(square(4, 20), sigma=1.5)
    assert f1[1] == pytest.approx(plain_f1(moved, wanted))
    assert np.allclose(ds.relative, f1 / f1[2])
    loose = attention_convergence(run_of(maps, 200 * square(8, 24)), sigma=1.5, tolerance=4).f1[0, :, 0]
    assert float(loose[1]) == 1.0


def test_edges_of_what_is_even_and_of_nothing():
    even = np.full((3, SIZE, SIZE), 0.5)
    assert np.all(attention_convergence(run_of(even, 255 * square(8, 24))).f1 == 0)
    assert np.isnan(attention_convergence(run_of(even, 9 * np.ones((SIZE, SIZE)))).f1).all()
    assert np.array_equal(edges(square(8, 24)), edges(1e-4 * square(8, 24) + 0.5))  # the scale does not matter


def test_steps_that_were_skipped_and_samples_that_failed_are_nan():
    maps = np.stack([square(8, 24), square(8, 24), square(8, 24)])
    maps[1] = np.nan
    ds = attention_convergence(run_of(0.5 * maps, 255 * square(8, 24), status=(1, 2)))
    assert np.isfinite(ds.f1[:, :, 0]).values.tolist() == [[True, False, True], [False] * 3]


def test_relative_is_a_ratio_of_means_with_an_interval():
    ds = attention_convergence(synthetic_run(samples=3, steps=5, heads=2), tolerance=1)
    per_sample = ds.f1.mean("word")
    mean = per_sample.mean("sample")
    assert np.allclose(ds.relative, mean / mean[-1])
    assert float(ds.relative_interval[-1].sel(bound="low")) == float(ds.relative_interval[-1].sel(bound="high")) == 1
    draws = [np.mean(per_sample.values[np.random.default_rng(k).integers(0, 3, 3)], 0) for k in range(3000)]
    expected = np.quantile([d / d[-1] for d in draws], [0.025, 0.975], axis=0).T
    assert np.allclose(ds.relative_interval, expected, atol=0.02)


def test_layers_weigh_alike_on_all_grids():
    """Two layers of one grid and one of another: the mean over the three."""
    rng = np.random.default_rng(2)
    fine = rng.uniform(size=(1, 1, 1, 2, 2, 2, SIZE, SIZE)) ** 2
    coarse = rng.uniform(size=(1, 1, 1, 1, 3, 2, 8, 8)) ** 2
    words = [["<s>", "box"]], [["bos", "word"]], [[-1, 0]]
    image = rng.uniform(0, 255, (1, SIZE, SIZE, 3)).astype("uint8")
    nodes = {f"attention/{p.shape[-1]}x{p.shape[-1]}": attention(p, *words) for p in (fine, coarse)}
    nodes["images"] = xr.Dataset({"image": (("sample", "height", "width", "rgb"), image)})
    ds = attention_convergence(make_run(nodes), sigma=0.8)
    layers = [fine[0, 0, 0, k, :, 1].mean(0) for k in (0, 1)] + [resize(coarse[0, 0, 0, 0, :, 1].mean(0), SIZE, SIZE)]
    luminance = image[0] @ np.array([0.2126, 0.7152, 0.0722])
    expected = plain_f1(edges(np.mean(layers, 0), sigma=0.8), edges(luminance, sigma=0.8))
    assert float(ds.f1[0, 0, 0]) == pytest.approx(expected) and 0 < expected < 1
    with pytest.raises(InterpError, match="no captured layer"):
        attention_convergence(synthetic_run(samples=1), layers="x")


def test_f1_with_tolerance_by_hand():
    a, b = np.zeros((2, 5, 5), dtype=bool)
    a[1, :], b[2, :3] = True, True
    assert edge_f1(a, b) == 0.0
    assert edge_f1(a, b, 1) == pytest.approx(2 * 0.8 * 1 / 1.8)  # four of five pixels lie beside the other line
    assert edge_f1(b, a, 1) == pytest.approx(edge_f1(a, b, 1))


def test_images_shrink_by_means():
    assert np.allclose(shrunk(np.full((8, 8), 3.0), (4, 4)), 3.0)
    for kwargs in ({"low": 0.5, "high": 0.2}, {"tolerance": -1}, {"sigma": -1.0}):
        with pytest.raises(InterpError, match="must rise within 0 and 1"):
            attention_convergence(synthetic_run(), **kwargs)
