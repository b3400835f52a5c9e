"""Create a run, or resume it: `create_run`."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from interp.stores.chunks import placement_of
from interp.stores.disk import QUEUE_BYTES, DiskWriter
from interp.stores.errors import StoreError
from interp.stores.files import plain
from interp.stores.growth import without_tables
from interp.stores.identity import check_place, identify
from interp.stores.layout_check import checked
from interp.stores.lock import RunLock
from interp.stores.schema import Layout
from interp.stores.skeleton import VOLATILE, build, fingerprint, nodes, read_table
from interp.stores.writer import RunWriter


def create_run(
    path: str | os.PathLike[str] | None,
    layout: Layout,
    *,
    queue_bytes: int = QUEUE_BYTES,
    clean: bool = True,
    locked: bool = False,
) -> RunWriter:
    """Create a run at `path` and return its writer; None keeps it in memory.

    A run of the same plan (attrs["fingerprint"], or a fingerprint of the layout) is resumed:
    `writer.status` tells
    which samples are done. A run that has grown since is resumed with all its samples. Anything else at
    `path`
    raises StoreError and is left alone. At most `queue_bytes` wait to be written. `clean=False` leaves the
    unfinished files of other writers alone: for workers, after one process has created the run.

    The writer has the run for itself until it is closed: a second one, in this process or another, is refused.
    Workers have no such lock, nor has a writer whose caller holds the `RunLock` (`locked=True`).

    >>> from interp.stores import Layout, create_run, images_group
    >>> layout = Layout({"prompt": ["a red circle"], "seed": [0]}, {"images": images_group(1, 8, 8)})
    >>> with create_run(None, layout) as writer:
    ...     writer.begin(0)
    ...     writer.put(0, "images/image", np.zeros((8, 8, 3), "uint8"))
    ...     writer.commit(0)
    >>> len(writer.run.done)
    1
    """
    layout = checked(layout)
    if path is None:
        from interp.stores.memory import MemoryWriter  # it shows what it holds by xarray, which takes long to import

        return MemoryWriter(layout)
    check_place(path)
    path = Path(path).absolute()
    lock = None if locked or not clean else RunLock(path)
    try:
        free = not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
        if free and build(path, layout):
            return DiskWriter(
                path, without_tables(layout, len(layout)), queue_bytes=queue_bytes, clean=False, lock=lock
            )
        return DiskWriter(path, resumable(path, layout), queue_bytes=queue_bytes, clean=clean, lock=lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def resumable(path: Path, layout: Layout) -> Layout:
    """Return the layout of the run at `path` if it is of the same plan; else raise StoreError saying what
    is there.
    """
    root = identify(path, "nothing was touched; choose another path")
    there, asked = root["attributes"], plain(layout.attrs)
    listed = root["consolidated_metadata"]["metadata"]
    n = listed["sample"]["shape"][0]
    same = there.get("fingerprint") == fingerprint(layout)
    if "fingerprint" not in layout.attrs and n > len(layout):
        same = not _differences(path, listed, there, asked, layout)
    differences = [] if same else _differences(path, listed, there, asked, layout)
    if not same and not differences:
        differences = [f"fingerprint {there.get('fingerprint')} there, {fingerprint(layout)} asked"]
    differences += _shapes(listed, layout)
    if differences:
        shown = "; ".join(differences[:6]) + ("; …" if len(differences) > 6 else "")
        raise StoreError(f"{path} holds a run of another plan ({shown}); choose another path, or ask for that plan")
    return without_tables(layout, n)


def _differences(
    path: Path, listed: dict[str, Any], there: dict[str, Any], asked: dict[str, Any], layout: Layout
) -> list[str]:
    """Name each part of the plan in which the stored run and the layout differ."""
    found = attr_differences(there, asked)
    n, wanted = listed["sample"]["shape"][0], len(layout)
    if n < wanted:
        found.append(f"{n} samples there, {wanted} asked")
    for name, values in layout.samples.items():
        if name not in listed:
            found.append(f"no column {name} there")
            continue
        stored = read_table(path / name, listed[name], placement_of(listed[name]))[: len(values)]
        if not np.array_equal(stored, values[: len(stored)]):
            row = next(i for i, (a, b) in enumerate(zip(stored, values, strict=False)) if a != b)
            found.append(f"{name} of sample {row} {_short(stored[row])} there, {_short(values[row])} asked")
    return found


def attr_differences(there: dict[str, Any], asked: dict[str, Any], leave_out: Collection[str] = ()) -> list[str]:
    """Name each root attribute in which two runs differ, those aside that may (versions, the date)."""
    keys = sorted(({*there} | {*asked}) - {*VOLATILE, *leave_out})
    return [text for key in keys for text in _value_differences(key, there.get(key), asked.get(key))]


def _value_differences(name: str, there: Any, asked: Any) -> list[str]:
    """Name what differs within a value; of things of two classes only that they are."""
    if there == asked:
        return []
    if isinstance(there, dict) and isinstance(asked, dict):
        keys = ["class"] if there.get("class") != asked.get("class") else sorted({*there, *asked})
        return [t for key in keys for t in _value_differences(f"{name}.{key}", there.get(key), asked.get(key))]
    return [f"{name} {_short(there)} there, {_short(asked)} asked"]


def _shapes(listed: dict[str, Any], layout: Layout) -> list[str]:
    """Name each array that is missing or of another shape or dtype; the length of `sample` may differ."""
    found = []
    for name, node in nodes(layout).items():
        stored = listed.get(name)
        if stored is None:
            found.append(f"no {name} there")
            continue
        dims = node.metadata["dimension_names"]
        start = 1 if dims[:1] == ["sample"] else 0
        a, b = stored["shape"][start:], node.metadata["shape"][start:]
        if a != b or stored["dimension_names"] != dims:
            found.append(f"{name} of shape {tuple(a)} there, {tuple(b)} asked")
        elif stored["data_type"] != node.metadata["data_type"]:
            found.append(f"{name} as {stored['data_type']} there, {node.metadata['data_type']} asked")
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(plain(value))
    return text if len(text) <= 48 else text[:45] + "…"
