"""`verify`: is everything that a run says is done really there, whole and finite?"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.stores.chunks import placement_of
from interp.stores.codec import ChecksumError
from interp.stores.identity import read_root
from interp.stores.shards import MISSING, read_index
from interp.stores.skeleton import chunk_file
from interp.stores.table import DONE, FAILED, Variable, find_variable
from interp.stores.validation import validate

if TYPE_CHECKING:
    from interp.stores.reader import Run


def verify(run: "Run") -> list[str]:
    """Read all finished samples and return what is wrong, one sentence naming sample and variable each.

    Checked: the format, that files are there, that bytes agree with their checksums, that numbers are finite
    where they must be. Of a selection, only its samples.
    """
    try:
        problems = validate(run.tree)
        status = run.samples["status"].to_numpy()
    except (ValueError, OSError) as error:
        return [f"the table of samples cannot be read: {error}"]
    known = {0, DONE, FAILED}
    numbers = run.samples.index.to_numpy()
    problems += [f"sample {n} has status {s}; known are 0, 1, 2" for n, s in zip(numbers, status, strict=True)
                 if s not in known]  # fmt: skip
    listed = read_root(run.path)["consolidated_metadata"]["metadata"] if isinstance(run.path, Path) else {}
    for node in run.tree.subtree:
        if node.path == "/":
            continue
        data = node.to_dataset(inherit=True)
        problems += _coords(node.path.strip("/"), data)
        for name, array in data.data_vars.items():
            path = f"{node.path.strip('/')}/{name}"
            if array.dims[:1] != ("sample",):
                continue
            for at in np.flatnonzero(status == DONE):
                number = int(numbers[at])
                if isinstance(run.path, Path) and path in listed:
                    problems += _files(run.path / path, path, listed[path], number)
                problems += _values(path, array, int(at), number, _evaluated(run, int(at)))
    return problems


def _coords(node: str, data: xr.Dataset) -> Iterator[str]:
    for name, coord in data.coords.items():
        try:
            coord.load()
        except (ValueError, OSError) as error:
            yield f"{node}/{name} cannot be read: {error}"


def _files(folder: Path, path: str, metadata: dict[str, Any], number: int) -> list[str]:
    """Return what is wrong with the files of one sample's array."""
    place = placement_of(metadata)
    file = chunk_file(folder, number // place.outer[0], len(place.outer))
    if not file.is_file():
        return [f"sample {number}: {path} is missing; the file {file} is not there"]
    if not place.inner:
        return []
    try:
        index = read_index(file, place)
    except (ChecksumError, OSError) as error:
        return [f"sample {number}: {path} is damaged; the index of {file}: {error}"]
    expected = tuple(-(-size // chunk) for size, chunk in zip(metadata["shape"][1:], place.inner[1:], strict=True))
    used = (slice(0, 1), *(slice(0, e) for e in expected))
    holes = int((index[used][..., 0] == MISSING).sum())
    return [f"sample {number}: {path} lacks {holes} of its chunks"] if holes else []


def _evaluated(run: "Run", at: int) -> xr.DataArray | None:
    """Which branches a sample's steps evaluated (step, branch), by the guidance scale that was applied.

    0 is the text removed, 1 the text alone: there the other branch is NaN, and rightly so.
    """
    trajectory = run.tree.children.get("trajectory")
    if trajectory is None or "guidance_scale" not in trajectory.dataset:
        return None
    scale = trajectory.dataset["guidance_scale"].isel(sample=at).load()
    return xr.concat([scale != 0, scale != 1], "branch").assign_coords(branch=["cond", "uncond"])


def _values(path: str, array: xr.DataArray, at: int, number: int, evaluated: xr.DataArray | None) -> list[str]:
    try:
        values = array.isel(sample=at).load()
    except (ValueError, OSError, RuntimeError) as error:
        return [f"sample {number}: {path} cannot be read: {error}"]
    row = find_variable(path)
    if row is None or values.dtype.kind != "f" or row.nan == "allowed":
        return []
    wrong = _not_finite(values, row, evaluated)
    return [f"sample {number}: {path} has {wrong} values that are not finite"] if wrong else []


def _not_finite(values: xr.DataArray, row: Variable, evaluated: xr.DataArray | None) -> int:
    """Count the values that are neither finite nor NaN where NaN means "not there"."""
    bad = ~np.isfinite(values)
    if row.nan == "unused token" and "token_role" in values.coords:
        bad = bad & (values["token_role"] != "")
        if evaluated is not None:
            bad = bad & evaluated.sel(step=values["step"], branch=values["branch"])
    if row.nan == "other branch":
        absent = values.isnull().all([d for d in values.dims if d not in ("step", "branch")])
        bad = bad & ~(absent & ~absent.all("branch"))
    return int(bad.sum())
