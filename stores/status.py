"""`status` and `error` of samples, read and written straight in a run's files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from interp.stores.chunks import Placement, fill_value, placement_of
from interp.stores.codec import ChecksumError, decode, encode_parts
from interp.stores.errors import StoreError
from interp.stores.files import PARTIAL, publish, sweep, write_partial
from interp.stores.identity import identify, read_root
from interp.stores.skeleton import chunk_file, read_table


def status_of(path: Path) -> np.ndarray:
    """Return the status of every sample of the run at `path`, int8 (sample,)."""
    listed = read_root(path)["consolidated_metadata"]["metadata"]
    return read_status(path, listed["status"])


def column_of(path: Path, name: str) -> np.ndarray:
    """Return a column of the table of samples of the run at `path`."""
    listed = read_root(path)["consolidated_metadata"]["metadata"]
    return read_table(path / name, listed[name], placement_of(listed[name]))


def status_rows(path: Path) -> int:
    """Return how many samples share a chunk of `status`: two writers must not be at one such chunk at once."""
    return placement_of(read_root(path)["consolidated_metadata"]["metadata"]["status"]).outer[0]


def set_status(path: Path, samples: Mapping[int, tuple[int, str]]) -> None:
    """Set status and error of samples (number → both); nobody else may be writing their chunks.

    What was written of them is left where it is: their status says what it is worth.
    """
    listed = identify(path, "nothing was changed")["consolidated_metadata"]["metadata"]
    n = listed["status"]["shape"][0]
    for i in samples:
        if not 0 <= i < n:
            raise StoreError(f"sample {i} has no status: {path} has {n} samples, numbered from 0")
    errors = {i: np.array(text, object) for i, (_, text) in samples.items()}
    values = {i: np.array(value, "int8") for i, (value, _) in samples.items()}
    for name, rows in (("error", errors), ("status", values)):
        with naming(path / name):
            publish(write_rows(path, name, listed[name], rows))


def sweep_run(path: Path) -> int:
    """Delete what killed writers left of unfinished samples; return how many files that were."""
    listed = read_root(path)["consolidated_metadata"]["metadata"]
    return sum(sweep(path / name) for name, found in listed.items() if found["node_type"] == "array")


def write_rows(
    path: Path, name: str, metadata: Mapping[str, Any], rows: Mapping[int, np.ndarray]
) -> list[tuple[Path, Path]]:
    """Write the chunks that samples share anew, with other rows; return the files for `publish`."""
    place = placement_of(dict(metadata))
    dtype = "str" if metadata["data_type"] == "string" else metadata["data_type"]
    files = []
    for number in sorted({j // place.outer[0] for j in rows}):
        target = chunk_file(path / name, number, len(place.outer))
        with naming(target):
            chunk = _read_chunk(target, dtype, place)
            for j, row in rows.items():
                if j // place.outer[0] == number:
                    chunk[j % place.outer[0]] = row if row.ndim else row[()]
            partial = path / name / f".{number}{PARTIAL}"
            write_partial(partial, *encode_parts(chunk, compress=place.compress))
            files.append((partial, target))
    return files


def _read_chunk(file: Path, dtype: str, place: Placement) -> np.ndarray:
    if not file.exists():
        return np.full(place.outer, fill_value(dtype), object if dtype == "str" else dtype)
    return decode(file.read_bytes(), dtype, place.outer, compress=place.compress)


def read_status(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
    """Return `status` straight from its files, int8 (sample,); a sample without one is to do."""
    place, n = placement_of(dict(metadata)), metadata["shape"][0]
    status = np.zeros(-(-n // place.outer[0]) * place.outer[0], "int8")
    folder = path / "status" / "c"
    for file in folder.iterdir() if folder.is_dir() else ():
        first = int(file.name) * place.outer[0]
        if first < n:
            with naming(file):
                data = file.read_bytes()
                status[first : first + place.outer[0]] = decode(data, "int8", place.outer, compress=place.compress)
    return status[:n]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into a StoreError that names it."""
    try:
        yield
    except (OSError, ChecksumError) as error:
        cause = error.strerror or error if isinstance(error, OSError) else error
        raise StoreError(f"{path} could not be written: {cause}; mend that and run again, it resumes") from error
