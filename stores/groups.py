"""Describe the groups of a run, one function for each kind: they alone know dims and dtypes, from the table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from interp.stores.errors import StoreError
from interp.stores.rounding import ATTRIBUTE, check_bits
from interp.stores.schema import Array, Coord, Group, TokenTable
from interp.stores.table import node_rows


def _build(
    node: str,
    sizes: Mapping[str, int],
    arrays: Mapping[str, str | None],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any] | None,
    tokens: TokenTable | None = None,
) -> Group:
    """Assemble a group from its rows in the table: `arrays` maps names to a dtype (None: the table's)."""
    rows = node_rows(node)
    built = {}
    for name, dtype in arrays.items():
        row = rows[name]
        if dtype is not None and dtype not in row.dtypes:
            raise StoreError(f"{node}/{name} cannot be stored as {dtype}; possible: {', '.join(row.dtypes)}")
        shape = tuple(sizes[d] for d in row.dims)
        built[name] = Array(row.dims, shape, dtype or row.dtype, _described(row.meaning, row.units))
    filled: dict[str, Coord] = {}
    for name, values in coords.items():
        if values is not None:
            row = rows[name]
            kind = object if row.dtype == "str" else row.dtype
            filled[name] = (
                row.dims,
                np.asarray([str(v) for v in values] if kind is object else values, kind),
            )
    if tokens is not None:
        filled |= tokens.coords()
    return Group(built, filled, dict(attrs or {}))


def _described(meaning: str, units: str) -> dict[str, Any]:
    return {"description": meaning} | ({"units": units} if units else {})


def trajectory_group(
    n: int,
    *,
    timestep: Sequence[float] | np.ndarray,
    sigma: Sequence[float] | np.ndarray,
    alpha_bar: Sequence[float] | np.ndarray,
    data_scale: Sequence[float] | np.ndarray,
    noise_scale: Sequence[float] | np.ndarray,
    channel: int,
    y: int,
    x: int,
    noise_pred: bool = True,
    latents: bool = True,
    attrs: Mapping[str, Any] | None = None,
) -> Group:
    """Describe the node `trajectory` of `n` samples, one step a `timestep`; the five sequences are on
    `step`.
    """
    steps = len(timestep)
    sizes = {"sample": n, "step": steps, "branch": 2, "channel": channel, "y": y, "x": x}
    kept = {
        "latents": latents,
        "final_latents": True,
        "noise_pred": noise_pred,
        "guidance_scale": True,
        "nfe": True,
    }
    coords: dict[str, Any] = {
        "step": np.arange(steps),
        "timestep": timestep,
        "sigma": sigma,
        "alpha_bar": alpha_bar,
    }
    coords |= {"data_scale": data_scale, "noise_scale": noise_scale, "branch": ["cond", "uncond"]}
    return _build("trajectory", sizes, {k: None for k, on in kept.items() if on}, coords, attrs)


def attention_group(
    n: int,
    *,
    kind: str,
    grid: tuple[int, int],
    layers: Sequence[str],
    heads: Sequence[str],
    branches: Sequence[str],
    steps: Sequence[int] | np.ndarray,
    timestep: Sequence[float] | np.ndarray,
    sigma: Sequence[float] | np.ndarray | None = None,
    tokens: TokenTable | None = None,
    dtype: str = "float16",
    part: str = "cross",
    cells: tuple[slice, slice] | None = None,
    mantissa: int | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Group:
    """Describe one grid (height, width): `probs` (sample, step, branch, layer, head, token, query_y,
    query_x) of `part="cross"`.

    `part="self"` gives `probs` (…, query_y, query_x, key_y, key_x) and needs no tokens; `"text"` (…, token, key_y, key_x),
    the text's view of a joint attention; `"within_text"` (…, query_token, token). `cells`: only these
    rows and columns of the queries are kept, and numbered in the coordinates `query_y` and `query_x`. `mantissa`:
    probabilities are rounded to so many bits (7: by at most 0.4 %), which compresses better.
    """
    top = {"cross": "attention"}.get(part, f"{part}_attention")
    if tokens is None and part != "self":
        raise StoreError("a text attention group needs a token table; pass tokens=TokenTable(...)")
    sizes = {
        "sample": n,
        "step": len(steps),
        "branch": len(branches),
        "layer": len(layers),
        "head": len(heads),
    }
    sizes |= {"query_y": grid[0], "query_x": grid[1], "key_y": grid[0], "key_x": grid[1]}
    sizes |= dict.fromkeys(("token", "query_token"), tokens.width if tokens else 0)
    coords: dict[str, Any] = {"step": steps, "timestep": timestep, "sigma": sigma}
    coords |= {"branch": branches, "layer": layers, "head": heads}
    if cells is not None:
        coords |= {"query_y": np.arange(grid[0])[cells[0]], "query_x": np.arange(grid[1])[cells[1]]}
        sizes |= {name: len(coords[name]) for name in ("query_y", "query_x")}
    attrs = {"kind": kind, "normalised_over": "all keys"} | dict(attrs or {})
    keep = None if part == "self" else tokens
    group = _build(f"{top}/{grid[0]}x{grid[1]}", sizes, {"probs": dtype}, coords, attrs, keep)
    if mantissa is not None:
        group.arrays["probs"].attrs[ATTRIBUTE] = check_bits(mantissa, dtype)
    return group


def text_group(
    n: int,
    *,
    branches: Sequence[str],
    token: int,
    feature: int | None,
    pooled: int | None = None,
    hidden: int | None = None,
    hidden_feature: int = 0,
    tokens: TokenTable | None = None,
    dtype: str = "float32",
    attrs: Mapping[str, Any] | None = None,
) -> Group:
    """Describe `text/<encoder>`: embeddings (sample, branch, token, feature), None if the denoiser reads none.

    `pooled` (sample, branch, pooled_feature) and `hidden` (sample, branch, layer, token, hidden_feature) are kept if their
    sizes are given.
    """
    sizes = {"sample": n, "branch": len(branches), "token": token, "feature": feature or 0}
    sizes |= {"pooled_feature": pooled or 0, "layer": hidden or 0, "hidden_feature": hidden_feature}
    kept = {"embeddings": feature, "pooled": pooled, "hidden": hidden}
    padded = tokens.padded(token) if tokens else None
    return _build(
        "text/encoder", sizes, {k: dtype for k, on in kept.items() if on}, {"branch": branches}, attrs, padded
    )


def thumb_factor(height: int, width: int) -> int:
    """Return by how much an image is shrunk for its thumbnail, whose longest side is at most 64."""
    return -(-max(height, width) // 64)


def images_group(n: int, height: int, width: int, *, attrs: Mapping[str, Any] | None = None) -> Group:
    """Describe `images`: image (sample, height, width, rgb) and thumb; putting an image makes its thumb
    too.
    """
    factor = thumb_factor(height, width)
    sizes = {"sample": n, "height": height, "width": width, "rgb": 3}
    sizes |= {"thumb_y": max(1, height // factor), "thumb_x": max(1, width // factor)}
    return _build("images", sizes, {"image": None, "thumb": None}, {}, attrs)


def x0_group(
    n: int,
    *,
    height: int,
    width: int,
    steps: Sequence[int] | np.ndarray,
    timestep: Sequence[float] | np.ndarray,
    sigma: Sequence[float] | np.ndarray | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Group:
    """Describe `x0`: image (sample, step, height, width, rgb), the decoded prediction of the clean image."""
    row = node_rows("x0")["image"]
    group = _build("x0", {}, {}, {"step": steps, "timestep": timestep, "sigma": sigma}, attrs)
    shape = (n, len(steps), height, width, 3)
    group.arrays["image"] = Array(row.dims, shape, row.dtype, _described(row.meaning, row.units), steady=True)
    return group


def site_group(
    n: int,
    *,
    dims: Sequence[str],
    shape: Sequence[int],
    steps: Sequence[int] | np.ndarray,
    timestep: Sequence[float] | np.ndarray,
    branches: Sequence[str],
    dtype: str = "float32",
    tokens: TokenTable | None = None,
    cells: np.ndarray | tuple[slice, slice] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Group:
    """Describe `sites/<name>`: value (sample, step, branch, *dims), `dims` and `shape` being the site's
    own.

    `tokens` labels a dim `token`; `cells` numbers what was kept of `position`, or of `y` and `x`.
    """
    coords: dict[str, Any] = {"step": steps, "timestep": timestep, "branch": branches}
    if isinstance(cells, tuple):
        coords |= {name: np.arange(part.start, part.stop) for name, part in zip("yx", cells, strict=True)}
    elif cells is not None:
        coords["position"] = cells
    group = _build("sites/site", {}, {}, coords, attrs, tokens)
    full = ("sample", "step", "branch", *dims)
    group.arrays["value"] = Array(full, (n, len(steps), len(branches), *shape), dtype, steady=True)
    return group
