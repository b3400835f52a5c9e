"""Low- and high-frequency parts of fields: which Fourier bins count as low, and the split itself."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import numpy as np
import xarray as xr

from interp.stores.errors import InterpError, nearest

BANDS = ("low", "high")


def _signed(n: int) -> np.ndarray:
    """The signed integer frequencies of an FFT of length n, in FFT order."""
    return np.rint(np.fft.fftfreq(n) * n).astype(np.int64)


def _nearest_rings(key: np.ndarray, fraction: float) -> np.ndarray:
    """The whole rings (bins of equal key) whose share of bins is nearest to the fraction; a tie takes fewer.

    A ring holds a bin together with its mirror −k, so the low part of a real field is real.
    """
    rings, counts = np.unique(key, return_counts=True)
    within = np.cumsum(counts)
    last = int(np.argmin(np.abs(within - fraction * key.size)))
    return key <= rings[last]


def _bins(height: int, width: int, fraction: float) -> np.ndarray:
    # (k_y/height)² + (k_x/width)², times (height·width)²: integers, so that equal radii compare equal.
    return _nearest_rings((_signed(height)[:, None] * width) ** 2 + (_signed(width) * height) ** 2, fraction)


def _square(height: int, width: int, fraction: float) -> np.ndarray:
    rows, columns = np.abs(_signed(height))[:, None] * width, np.abs(_signed(width)) * height
    return _nearest_rings(np.maximum(rows, columns), fraction)


def _radius(height: int, width: int, fraction: float) -> np.ndarray:
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) <= fraction * 0.5 + 1e-12


def _disc(height: int, width: int, fraction: float) -> np.ndarray:
    radius = int(fraction * min(height, width) + 1e-9)
    return _signed(height)[:, None] ** 2 + _signed(width) ** 2 <= radius**2


MASKS: dict[str, Callable[[int, int, float], np.ndarray]] = {
    "bins": _bins,
    "square": _square,
    "radius": _radius,
    "disc": _disc,
}


def low_mask(height: int, width: int, *, low_fraction: float = 0.2, mask: str = "bins") -> np.ndarray:
    """Return which bins of `np.fft.fft2` are low-frequency: bool (y, x), height × width, DC included.

    `mask` says what `low_fraction` (between 0 and 1, both excluded) means:

    - `"bins"`: that share of all bins, the nearest to DC by frequency in cycles per pixel. Rings of equal
      frequency are taken whole, so the realised share can differ a little (`low_mask(…).mean()`).
    - `"square"`: that share of all bins, nearest to DC by the larger of the two frequencies.
    - `"radius"`: frequencies up to `low_fraction` of Nyquist (0.5 cycles per pixel).
    - `"disc"`: integer frequencies within a disc of radius ⌊low_fraction·min(height, width)⌋, as in
      FasterCache (arXiv:2410.19355, there with 1/5).

    Every mask contains with a bin k also −k. Raises InterpError for another mask or fraction.

    >>> low_mask(8, 8, low_fraction=0.2).sum()      # 13 of 64 bins: DC and three rings of four
    np.int64(13)
    """
    if mask not in MASKS:
        raise InterpError(f"no mask named {mask!r}; there are {', '.join(MASKS)}{nearest(mask, MASKS)}")
    if not isinstance(low_fraction, Real) or not 0 < low_fraction < 1:
        raise InterpError(f"low_fraction={low_fraction!r} must lie between 0 and 1, both excluded")
    return MASKS[mask](height, width, low_fraction)


def split_bands(field: xr.DataArray, *, low_fraction: float = 0.2, mask: str = "bins") -> xr.DataArray:
    """Return the low- and high-frequency parts of a field over y and x; they add up to the field.

    field: (…, y, x), e.g. `run.latents`, any units. Result: (band, …, y, x) with band = low, high, in the
    same units and of dtype float32 or float64 as the field; lazy when the field is (dask). For `low_fraction`
    and `mask` see `low_mask`; attrs keep them and the realised share of bins. Raises InterpError without y
    and x.

    >>> from interp.stores import synthetic_run
    >>> parts = split_bands(synthetic_run(samples=1, steps=6).latents)
    >>> parts.dims, parts.band.values.tolist()
    (('band', 'sample', 'step', 'channel', 'y', 'x'), ['low', 'high'])
    """
    if not {"y", "x"} <= set(field.dims):
        raise InterpError(f"split_bands needs dimensions y and x; this field has {', '.join(map(str, field.dims))}")
    low = low_mask(field.sizes["y"], field.sizes["x"], low_fraction=low_fraction, mask=mask)
    dtype = field.dtype if field.dtype.kind == "f" and field.dtype.itemsize >= 4 else np.dtype("float32")

    def halves(values: np.ndarray) -> np.ndarray:
        smooth = np.fft.ifft2(np.fft.fft2(values.astype(np.float64)) * low).real
        return np.stack([smooth, values - smooth], axis=-3).astype(dtype)

    if field.chunks is not None:
        field = field.chunk({"y": -1, "x": -1})
    parts: xr.DataArray = xr.apply_ufunc(
        halves,
        field,
        input_core_dims=[["y", "x"]],
        output_core_dims=[["band", "y", "x"]],
        dask="parallelized",
        dask_gufunc_kwargs={"output_sizes": {"band": 2}},
        output_dtypes=[dtype],
    )
    attrs = {"low_fraction": low_fraction, "mask": mask, "low_fraction_realised": float(low.mean())}
    return (
        parts.transpose("band", *field.dims)
        .assign_coords(band=list(BANDS))
        .assign_attrs(field.attrs | attrs)
        .rename(field.name)
    )
