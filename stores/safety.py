"""What a run of strangers may not do: lead out of its folder, or ask for more memory than its data could need."""

import math
from pathlib import Path
from typing import Any

from interp.stores.errors import StoreError
from interp.stores.layout_check import check_name

CHUNK_BYTES = 1 << 31
"""The largest chunk that is read; ours stay below 10 MiB but for whole trajectories and images."""
TABLE_CELLS = 1 << 28
"""The most values in an array that is read when a run is opened or its tables are."""
_ITEM = {"string": 16, "float16": 2, "float32": 4, "float64": 8, "bool": 1}


def check_safe(where: object, root: dict[str, Any], folder: Path | None = None) -> None:
    """Look at a run's root metadata, which hold all others, before anything is read by them.

    Raises:
        StoreError: a name that leads elsewhere, a link, or sizes that do not belong together or are out of bounds.
    """
    consolidated = root.get("consolidated_metadata")
    listed = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(listed, dict):
        raise StoreError(f"{where} has no consolidated metadata, so this is not a run")
    for name, found in listed.items():
        try:
            check_name(name)
            if found["node_type"] == "array":
                _check_array(name, found)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StoreError(
                f"{where}: the metadata of {name!r} cannot be understood ({type(error).__name__})"
            ) from None
        except ValueError as error:
            raise StoreError(f"{where}: {error}") from None
    if folder is not None:
        for name, found in listed.items():
            parts = [folder.joinpath(*name.split("/")[: k + 1]) for k in range(name.count("/") + 1)]
            parts += [folder / name / "c"] if found["node_type"] == "array" else []
            for part in parts:
                if part.is_symlink():
                    raise StoreError(
                        f"{where}: {name} is a link to elsewhere; a run is one folder, without links in it"
                    )


def _check_array(name: str, found: dict[str, Any]) -> None:
    shape, grid = found["shape"], found["chunk_grid"]["configuration"]["chunk_shape"]
    dims, kind = found["dimension_names"], found["data_type"]
    if not (isinstance(kind, str) and (kind in _ITEM or kind.strip("uint").isdigit())):
        raise StoreError(f"{name} is of type {kind!r}, which a run does not have")
    sizes = [*shape, *grid]
    if (
        not len(shape) == len(grid) == len(dims)
        or not all(type(s) is int and 0 <= s < 2**48 for s in sizes)
        or 0 in grid
    ):
        raise StoreError(f"{name} has shape {shape} in chunks of {grid}; these do not belong together")
    inner = grid
    if found["codecs"][0]["name"] == "sharding_indexed":
        inner = found["codecs"][0]["configuration"]["chunk_shape"]
        if len(inner) != len(grid) or not all(
            type(i) is int and i > 0 and g % i == 0 for i, g in zip(inner, grid, strict=True)
        ):
            raise StoreError(f"{name} has chunks of {inner} in shards of {grid}; these do not belong together")
    item = _ITEM.get(kind) or max(1, int(kind.strip("uint")) // 8)
    if math.prod(inner) * item > CHUNK_BYTES:
        raise StoreError(
            f"{name} has chunks of {math.prod(inner) * item:,} bytes; more than {CHUNK_BYTES:,} are not read"
        )
    if (len(dims) < 3 and math.prod(shape) > TABLE_CELLS) or math.prod(grid) // math.prod(inner) > TABLE_CELLS:
        raise StoreError(f"{name} has {math.prod(shape):,} values; a table of more than {TABLE_CELLS:,} is not read")
