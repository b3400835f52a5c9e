"""Open a run: a folder, a .zip file of one, or an address."""

import contextlib
import os
from pathlib import Path
from typing import Any

import xarray as xr

from interp.stores.errors import StoreError
from interp.stores.identity import check_format, identify
from interp.stores.integrity import broken_tables
from interp.stores.reader import Run
from interp.stores.tree import read_tree


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open the run at `path` without loading its data: a folder, a .zip file of one, or an address (`s3://…`).

    Addresses need the extra `[s3]`; credentials and endpoint come from the usual `AWS_…` variables.

    Raises StoreError if nothing is there, if it is not a run, or if a newer version of the format wrote it.

    >>> run = open_run("run.zarr")                    # doctest: +SKIP
    >>> run.attention("32x32").isel(sample=0).load()  # doctest: +SKIP
    """
    advice = "give the folder that trace(store=...) or interp run wrote"
    if not isinstance(path, str | os.PathLike):
        raise StoreError(f"a run was asked for by {path!r}, which is no path; {advice}")
    text = os.fspath(path)
    elsewhere = is_elsewhere(text) and not Path(text).is_dir()
    if elsewhere:
        from interp.stores.places import zarr_store

        source: Any = zarr_store(text)
    else:
        root = identify(Path(text), advice)
        source = text
    try:
        tree = None if elsewhere else read_tree(Path(text), root)
        if tree is None:  # xarray's own reader: for every store that Zarr knows, and arrays of others in a run
            tree = xr.open_datatree(source, engine="zarr", chunks=None, consolidated=True)
    except Exception as error:  # whatever xarray and zarr make of damaged metadata or coordinates
        found = ""
        if not elsewhere:
            with contextlib.suppress(Exception):  # nor may the search for what is wrong fail
                found = "; ".join(broken_tables(Path(text))[:3])
        raise StoreError(f"{text} could not be opened as a run: {found or f'{error}; {advice}'}") from error
    check_format(text, str(tree.attrs.get("format", "unknown")))
    return Run(tree, text if elsewhere else Path(text))


def is_elsewhere(text: str) -> bool:
    """Whether `text` names something else than a folder."""
    return "://" in text or text.endswith(".zip")
