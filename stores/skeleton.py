"""The metadata of a whole run, built beside its place and moved there in one rename."""

import datetime
import hashlib
import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interp.stores.chunks import Placement, array_metadata, batch_rows, place, table_placement
from interp.stores.codec import decode, encode, padded
from interp.stores.errors import StoreError
from interp.stores.files import each, make_folder, plain, sync
from interp.stores.schema import Array, Layout
from interp.stores.table import FORMAT, find_variable, node_rows

VOLATILE = ("format", "created", "versions", "fingerprint")
"""Root attributes in which two runs of one plan may differ."""


@dataclass(frozen=True)
class Node:
    """One array's metadata and, if it is known beforehand, its values."""

    metadata: dict[str, Any]
    placement: Placement
    values: np.ndarray | None = None


def nodes(layout: Layout) -> dict[str, Node]:
    """Return every array of a run by path."""
    n, rows = len(layout), batch_rows(layout.samples["batch"])
    found = {"sample": _table("sample", ("sample",), np.arange(n, dtype="int64"))}
    for name, values in layout.samples.items():
        found[name] = _table(name, ("sample",), values)
    for name in ("status", "error"):
        row = node_rows("")[name]
        found[name] = _sampled(name, Array(("sample",), (n,), row.dtype, {"description": row.meaning}), rows)
    for group_name, group in layout.groups.items():
        for name, (dims, values) in group.coords.items():
            found[f"{group_name}/{name}"] = _table(f"{group_name}/{name}", dims, values)
        for name, array in group.arrays.items():
            found[f"{group_name}/{name}"] = _sampled(f"{group_name}/{name}", array, rows)
    return found


def _table(path: str, dims: tuple[str, ...], values: np.ndarray) -> Node:
    row = find_variable(path)
    attrs = {"description": row.meaning} if row else {}
    attrs |= {"units": row.units} if row and row.units else {}
    dtype = "str" if values.dtype == object else values.dtype.name
    placement = table_placement(values.shape, dims)
    return Node(array_metadata(values.shape, dims, dtype, attrs, placement), placement, values)


def _sampled(path: str, array: Array, rows: int) -> Node:
    placement = place(path, array, rows)
    return Node(array_metadata(array.shape, array.dims, array.dtype, plain(array.attrs), placement), placement)


def group_metadata(attrs: dict[str, Any]) -> dict[str, Any]:
    """Return the `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attrs}


def documents(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return every `zarr.json` of a run by path, the root's (consolidated) as ""."""
    listed: dict[str, dict[str, Any]] = {}
    for name, group in layout.groups.items():
        parts = name.split("/")
        for depth in range(1, len(parts)):
            listed.setdefault("/".join(parts[:depth]), group_metadata({}))
        # xarray reads this attribute; without it `timestep` or `token_text` would open as plain variables
        listed[name] = group_metadata(plain(group.attrs) | {"coordinates": " ".join(group.coords)})
    listed |= {path: node.metadata for path, node in nodes(layout).items()}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    attrs = plain(layout.attrs) | {"format": FORMAT, "fingerprint": fingerprint(layout)}
    return {"": with_consolidated(group_metadata({"created": now} | attrs), listed), **listed}


def with_consolidated(root: dict[str, Any], listed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the root's metadata with all others in it: one read opens the run."""
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(listed.items()))}
    return root | {"consolidated_metadata": inline}


def fingerprint(layout: Layout) -> str:
    """Return the fingerprint in the layout's attrs, or one of all that it plans."""
    given = layout.attrs.get("fingerprint")
    if given is not None:
        return str(given)
    plan = {k: v for k, v in layout.attrs.items() if k not in VOLATILE}
    arrays = {k: (a.dims, a.shape, a.dtype) for k, a in layout.arrays.items()}
    text = json.dumps(plain([plan, layout.samples, arrays]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(path: Path, layout: Layout) -> bool:
    """Create the run at `path`; False if something came to lie there meanwhile."""
    make_folder(path.parent)
    folder = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.creating"
    _forget_dead(path)
    folder.mkdir()
    try:
        for name, document in documents(layout).items():
            target = folder / name
            target.mkdir(parents=True, exist_ok=True)
            (target / "zarr.json").write_text(json.dumps(document, indent=2, allow_nan=False))
        written: dict[int, Path] = {}
        for name, node in nodes(layout).items():
            if node.values is None or not node.values.size:
                continue
            if id(node.values) in written:  # grids share the labels of their tokens
                shutil.copytree(written[id(node.values)] / "c", folder / name / "c")
            else:
                write_table(folder / name, node.values, node.placement)
                written[id(node.values)] = folder / name
        _sync_all(folder)
        folder.rename(path)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if path.exists() and any(path.iterdir()):
            return False
        raise StoreError(f"a run could not be created at {path}: {error}") from error
    sync(path.parent)
    return True


def write_table(folder: Path, values: np.ndarray, placement: Placement) -> None:
    """Write an array that is known beforehand, without making it durable."""
    rows = placement.outer[0]
    for first in range(0, values.shape[0], rows):
        chunk = padded(values[first : first + rows], placement.outer)
        target = chunk_file(folder, first // rows, values.ndim)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode(chunk, compress=placement.compress))


def read_table(folder: Path, metadata: dict[str, Any], placement: Placement) -> np.ndarray:
    """Read an array whose chunks are cut along its first dim alone; a missing chunk is an error."""
    shape, rows = tuple(metadata["shape"]), placement.outer[0]
    dtype = "str" if metadata["data_type"] == "string" else metadata["data_type"]
    parts = []
    for first in range(0, shape[0], rows):
        data = chunk_file(folder, first // rows, len(shape)).read_bytes()
        parts.append(decode(data, dtype, placement.outer, compress=placement.compress))
    if not parts:
        return np.empty(shape, object if dtype == "str" else dtype)
    return np.concatenate(parts)[tuple(slice(0, s) for s in shape)]


def chunk_file(folder: Path, first: int, ndim: int) -> Path:
    """Return the file of the chunk numbered `first` along the first dim and 0 along the others."""
    return folder.joinpath("c", str(first), *["0"] * (ndim - 1))


def _sync_all(folder: Path) -> None:
    everything = [folder, *folder.rglob("*")]
    each([p for p in everything if p.is_file()], sync)
    each([p for p in everything if p.is_dir()], sync)


def _forget_dead(path: Path) -> None:
    """Delete half-built runs of this name that dead processes of this machine left behind."""
    host = socket.gethostname()
    prefix, suffix = f".{path.name}.{host}.", ".creating"
    for folder in path.parent.iterdir():
        pid = folder.name.removeprefix(prefix).removesuffix(suffix)
        if folder.name != f"{prefix}{pid}{suffix}" or not pid.isdigit():
            continue
        try:
            if int(pid) != os.getpid():
                os.kill(int(pid), 0)
                continue
        except ProcessLookupError:
            pass
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
