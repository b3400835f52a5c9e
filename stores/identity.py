"""Tell a run from whatever else may lie at a path."""

import json
import re
from pathlib import Path
from typing import Any

from interp.stores.errors import StoreError
from interp.stores.safety import check_safe
from interp.stores.table import FORMAT


def read_root(path: Path) -> dict[str, Any]:
    """Return a run's root metadata, which hold all others."""
    document: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    return document


def identify(path: Path, advice: str) -> dict[str, Any]:
    """Return the root metadata of the run at `path`; StoreError, ending in `advice`, if none is there."""
    if not path.exists():
        raise StoreError(f"there is no run at {path}; {advice}")
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a run; {advice}")
    if not (path / "zarr.json").is_file():
        raise StoreError(f"{path} is a folder of something else, not a run; {advice}")
    try:
        root = read_root(path)
    except (ValueError, OSError, RecursionError):
        raise StoreError(f"{path}/zarr.json cannot be read, so this is not a run; {advice}") from None
    check_root(path, root, advice)
    check_safe(path, root, path)
    return root


def check_place(path: object) -> None:
    """Raise StoreError unless `path` may be a folder, where alone runs are written."""
    text = str(path)
    if re.match(r"[A-Za-z][\w+.-]+:/", text) or text.endswith(".zip"):
        raise StoreError(
            f"{text} is no folder, and a run is written to a folder only; copy it to another place when it is done"
        )


def check_root(where: object, root: Any, advice: str) -> None:
    """Raise StoreError, ending in `advice`, unless a root's metadata say that this is a run of the known format."""
    try:
        found = str(root["attributes"].get("format", ""))
    except (KeyError, TypeError, AttributeError):
        raise StoreError(f"{where} is a Zarr store, but not a run; {advice}") from None
    if not found.startswith(FORMAT.partition("/")[0] + "/"):
        raise StoreError(f"{where} is a Zarr store, but not a run; {advice}")
    check_format(where, found)


def check_format(path: object, found: str) -> None:
    """Raise StoreError unless `found` is the format that this version knows."""
    if found != FORMAT:
        raise StoreError(f"{path} is of format {found}, but this version knows {FORMAT}; update interp")
