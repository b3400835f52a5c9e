"""Files that are either whole and durable or not there: write aside, fsync, rename, fsync the folder."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
SYNCS = 8
"""How many files are made durable at a time."""


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; each new name is durable."""
    for changed in _missing_made(folder):
        sync(changed)


def _missing_made(folder: Path) -> list[Path]:
    """Make a folder and its parents; return the folders in which that made a name."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return [new.parent for new in reversed(missing)]


def write_partial(partial: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` one after the other to `partial`, which `publish` makes durable; on an error it is deleted."""
    try:
        with partial.open("wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            write_back(file.fileno(), 0, 0)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_back(handle: int, start: int, length: int) -> None:
    """Ask the system to begin writing these bytes of a file to disk, so that `publish` waits less; length 0: to its end.

    Only for bytes just written: what is on disk already would be dropped from memory, and read slowly next time.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, length, os.POSIX_FADV_DONTNEED)


def publish(files: Sequence[tuple[Path, Path]]) -> None:
    """Give written files, as (partial, target), their names: when it returns, all are durable.

    First all data, then all names. Many files at once cost little more than one: what a file system writes down to
    make the first durable holds for the others, and those that wait at the same time wait together. After an error,
    those without a name are deleted.
    """
    try:
        each([partial for partial, _ in files], sync)
        changed: dict[Path, None] = {}
        for partial, target in files:
            changed |= dict.fromkeys(_missing_made(target.parent))
            partial.replace(target)
            changed[target.parent] = None
        each(list(changed), sync)
    except OSError:
        for partial, _ in files:
            partial.unlink(missing_ok=True)
        raise


def each(paths: Sequence[Path], do: Callable[[Path], None]) -> None:
    """Call `do`, which waits for the disk, for every path, several at a time."""
    if len(paths) < 3:
        for path in paths:
            do(path)
    else:
        list(_pool().map(do, paths))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(SYNCS, thread_name_prefix="interp-sync")


def write_file(partial: Path, target: Path, data: bytes | memoryview) -> None:
    """Write `data` to `partial`, then rename it to `target`; it is durable then."""
    write_partial(partial, data)
    publish([(partial, target)])


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
