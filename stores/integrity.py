"""`verify`: is everything that a run says is done really there, whole and finite?"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from interp.stores.chunks import placement_of
from interp.stores.codec import ChecksumError, decode
from interp.stores.errors import StoreError
from interp.stores.files import write_json
from interp.stores.identity import identify, read_root
from interp.stores.lock import RunLock
from interp.stores.shards import MISSING, read_index
from interp.stores.skeleton import chunk_file, read_table
from interp.stores.status import set_status
from interp.stores.table import DONE, FAILED, SCORES_NODE, TODO, Variable, find_variable
from interp.stores.validation import validate

if TYPE_CHECKING:
    from interp.stores.reader import Run

ZARR_JSON = "zarr.json"
Evaluated = Callable[[], xr.DataArray | None]
DELAY = 1.0
"""Seconds after which a bar appears."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a run: in which sample (None: not in one), with which variable, and in a sentence."""

    sample: int | None
    path: str
    text: str

    def __str__(self) -> str:
        return self.text


def verify(run: "Run") -> list[str]:
    """Read all finished samples and return what is wrong, one sentence naming sample and variable each.

    Checked: the format, that files are there, that bytes agree with their checksums, that numbers are finite
    where they must be. Of a selection, only its samples.
    """
    return [str(problem) for problem in check(run)]


def check(run: "Run", *, progress: bool = False) -> list[Problem]:
    """Do what `verify` does; the problems name their sample as a number too. `progress`: show a bar on stderr."""
    try:
        return _check(run, progress=progress)
    except Exception as error:  # whatever xarray and zarr make of metadata that contradict each other
        return [Problem(None, "", f"the run's metadata cannot be followed: {type(error).__name__}: {error}")]


def _check(run: "Run", *, progress: bool) -> list[Problem]:
    local = run.path if isinstance(run.path, Path) and run.path.is_dir() else None
    listed = read_root(local)["consolidated_metadata"]["metadata"] if local else {}
    tables = list(_tables(local, listed) if local else _coords(run.tree))
    try:
        problems = tables or [Problem(None, "", text) for text in validate(run.tree)]
        numbers = np.asarray(run.tree["sample"].values)
        found, status = _statuses(local, numbers) if local else ([], run.samples["status"].to_numpy())
    except (ValueError, OSError) as error:
        return [Problem(None, "", f"the table of samples cannot be read: {error}")]
    problems = [*(_documents(local, listed) if local else ()), *problems, *found]
    known = {0, DONE, FAILED}
    problems += [Problem(int(n), "status", f"sample {n} has status {s}; known are 0, 1, 2")
                 for n, s in zip(numbers, status, strict=True) if s not in known]  # fmt: skip
    arrays = {f"{node.path.strip('/')}/{name}": array for node in run.tree.subtree if node.path != "/"
              for name, array in node.to_dataset(inherit=True).data_vars.items() if array.dims[:1] == ("sample",)}  # fmt: skip
    finished = np.flatnonzero(status == DONE).tolist()
    for at in tqdm(finished, unit="sample", delay=DELAY, leave=False) if progress else finished:
        number = int(numbers[at])
        evaluated = (lambda: None) if tables else partial(_evaluated, run, at)  # which goes by their labels
        for path, array in arrays.items():
            texts = _files(local / path, path, listed[path], number) if local and path in listed else []
            texts = texts or _values(path, array, at, number, evaluated)
            problems += [Problem(number, path, text) for text in texts]
    return problems


def repair_run(run: "Run", problems: Iterable[Problem]) -> list[int]:
    """Set the samples that `check` found damaged to be done again; return their numbers.

    Whoever runs the same plan or job again makes them anew. A node's own metadata are written again from the root's. What
    else lies outside the samples (a table, scores) is not touched.

    Raises:
        StoreError: the run is not in a local folder, or another process is writing it.
    """
    if not isinstance(run.path, Path) or not run.path.is_dir():
        raise StoreError(f"{run.path or 'a run in memory'} cannot be repaired; copy the run to a local folder first")
    with RunLock(run.path):
        _statuses(run.path, np.empty(0, int), forget=True)
        wanted = {p.sample for p in problems if p.sample is not None and not p.path.startswith(SCORES_NODE + "/")}
        again = sorted(i for i in wanted)
        listed = read_root(run.path)["consolidated_metadata"]["metadata"]
        for name in {p.path.removesuffix(f"/{ZARR_JSON}") for p in problems if p.path.endswith(f"/{ZARR_JSON}")}:
            write_json(run.path / name, listed[name])
        set_status(run.path, dict.fromkeys(again, (TODO, "")))
    return again


def _statuses(path: Path, numbers: np.ndarray, *, forget: bool = False) -> tuple[list[Problem], np.ndarray]:
    """Read `status`, chunk by chunk; a damaged one counts as to do, and is deleted if it is to be forgotten."""
    listed = read_root(path)["consolidated_metadata"]["metadata"]
    problems: list[Problem] = []
    n = listed["status"]["shape"][0]
    status = np.zeros(n, "int8")
    for name in ("status", "error"):
        place = placement_of(listed[name])
        rows, dtype = place.outer[0], "int8" if name == "status" else "str"
        for first in range(0, n, rows):
            file = chunk_file(path / name, first // rows, 1)
            if not file.exists():
                continue
            try:
                values = decode(file.read_bytes(), dtype, place.outer, compress=place.compress)
            except (ValueError, OSError, RuntimeError) as error:
                problems += [Problem(int(i), name, f"sample {i}: {name} cannot be read: {error}")
                             for i in range(first, min(n, first + rows)) if i in numbers]  # fmt: skip
                if forget:
                    file.unlink()
                continue
            if name == "status":
                status[first : first + rows] = values[: n - first]
    return problems, status[numbers]


def _coords(tree: xr.DataTree) -> Iterator[Problem]:
    """Read the coordinates of a run that is no local folder."""
    for node in tree.subtree:
        for name, coord in node.coords.items():
            try:
                coord.variable.copy(deep=False).load()
            except (ValueError, OSError, RuntimeError) as error:
                path = f"{node.path}/{name}".strip("/")
                yield Problem(None, path, f"{path} cannot be read: {error}")


def _documents(path: Path, listed: dict[str, Any]) -> Iterator[Problem]:
    """Compare each node's own metadata with what the root's say of it: tools that ignore the root's read them.

    A run that was killed while it grew may have arrays that know of more samples already.
    """
    for name, found in listed.items():
        try:
            own = json.loads((path / name / ZARR_JSON).read_text())
            if found["node_type"] == "array" and found["dimension_names"][:1] == ["sample"]:
                own["shape"][0] = min(own["shape"][0], found["shape"][0])
        except FileNotFoundError:
            yield Problem(None, f"{name}/{ZARR_JSON}", f"{name}/{ZARR_JSON} is missing")
        except (ValueError, OSError, LookupError, TypeError) as error:
            yield Problem(None, f"{name}/{ZARR_JSON}", f"{name}/{ZARR_JSON} cannot be read: {error}")
        else:
            if own != found:
                text = f"{name}/{ZARR_JSON} says another thing than the run's metadata in its root"
                yield Problem(None, f"{name}/{ZARR_JSON}", text)


def broken_tables(path: Path) -> list[str]:
    """Return what is wrong with the arrays that are known before the samples: coordinates and columns."""
    listed = identify(path, "nothing can be said of it")["consolidated_metadata"]["metadata"]
    return [str(p) for p in _tables(path, listed)]


def _tables(path: Path, listed: dict[str, Any]) -> Iterator[Problem]:
    coords = {f"{group}/{name}" for group, found in listed.items() if found["node_type"] == "group"
              for name in str(dict(found.get("attributes") or {}).get("coordinates", "")).split()}  # fmt: skip
    for name, found in listed.items():
        if found["node_type"] != "array" or not (
            name in coords or ("/" not in name and name not in ("status", "error"))
        ):
            continue
        try:
            read_table(path / name, found, placement_of(found))
        except FileNotFoundError as error:
            yield Problem(None, name, f"{name} is missing; the file {error.filename} is not there")
        except Exception as error:  # metadata may say anything
            yield Problem(None, name, f"{name} cannot be read: {error}")


def _files(folder: Path, path: str, metadata: dict[str, Any], number: int) -> list[str]:
    """Return what is wrong with the files of one sample's array."""
    place = placement_of(metadata)
    first = folder / "c" / str(number // place.outer[0])
    tail = [range(-(-s // c)) for s, c in zip(metadata["shape"][1:], place.outer[1:], strict=True)]
    for rest in itertools.product(*tail):
        file = first.joinpath(*map(str, rest))
        if file.is_symlink():
            return [f"sample {number}: {path} is a link to elsewhere; the file {file}"]
        if not file.is_file():
            return [f"sample {number}: {path} is missing; the file {file} is not there"]
    if not place.inner:
        return []
    file = chunk_file(folder, number // place.outer[0], len(place.outer))
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
    try:
        scale = trajectory.dataset["guidance_scale"].isel(sample=at).load()
    except (ValueError, OSError, RuntimeError):  # damaged, which is said where it is checked itself
        return None
    return xr.concat([scale != 0, scale != 1], "branch").assign_coords(branch=["cond", "uncond"])


def _values(path: str, array: xr.DataArray, at: int, number: int, evaluated: Evaluated) -> list[str]:
    row = find_variable(path)
    try:
        values = array.variable.isel(sample=at).load()
        if row is None or values.dtype.kind != "f" or row.nan == "allowed" or np.isfinite(values.values).all():
            return []
        wrong = _not_finite(array.isel(sample=at).copy(data=values.values), row, evaluated)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        return [f"sample {number}: {path} cannot be read: {error.__cause__ or error}"]
    return [f"sample {number}: {path} has {wrong} values that are not finite"] if wrong else []


def _not_finite(values: xr.DataArray, row: Variable, evaluated: Evaluated) -> int:
    """Count the values that are neither finite nor NaN where NaN means "not there"."""
    bad = ~np.isfinite(values)
    if row.nan == "unused token" and "token_role" in values.coords:
        bad = bad & (values["token_role"] != "")
        branches = evaluated()
        if branches is not None:
            bad = bad & branches.sel(step=values["step"], branch=values["branch"])
    if row.nan == "other branch":
        absent = values.isnull().all([d for d in values.dims if d not in ("step", "branch")])
        bad = bad & ~(absent & ~absent.all("branch"))
    return int(bad.sum())
