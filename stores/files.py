"""Files that are either whole and durable or not there: write aside, fsync, rename, fsync the folder."""

import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; each new name is durable."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def settle(partial: Path, target: Path) -> None:
    """Give a finished, synced `partial` file its real name, durably."""
    make_folder(target.parent)
    partial.replace(target)
    sync_folder(target.parent)


def write_file(partial: Path, target: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `partial`, then rename it to `target`."""
    try:
        with partial.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if durable:
                os.fsync(file.fileno())
        settle(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(folder: Path, document: dict[str, Any]) -> None:
    """Swap a folder's `zarr.json` atomically."""
    data = json.dumps(plain(document), indent=2, allow_nan=False).encode()
    write_file(folder / f".zarr.json{PARTIAL}", folder / "zarr.json", data)


def plain(value: Any) -> Any:
    """Return `value` with nothing in it that JSON lacks: arrays become lists, non-finite floats become
    text.
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def sweep(folder: Path) -> int:
    """Delete what an interrupted writer left in an array's folder; return how many files that were."""
    left = list(folder.glob(f".*{PARTIAL}"))
    for file in left:
        file.unlink(missing_ok=True)
    return len(left)
