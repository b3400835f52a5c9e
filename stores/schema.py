"""What a run is to hold: `Layout`, `Group`, `Array`, and the tables of tokens that label them."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from interp.stores.errors import StoreError
from interp.stores.rows import Rows, changed
from interp.stores.table import TOKEN_FILL

Coord = tuple[tuple[str, ...], Any]
"""Dims and values (array or list) of a coordinate."""


@dataclass(frozen=True)
class Array:
    """One variable of a group; `dims[0] == "sample"` for data that arrive sample by sample."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attrs: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    """A sample may be committed without it; what was not written reads as NaN (floats) or 0."""
    steady: bool = False
    """Often equal at many steps: every step is a chunk of its own, and equal chunks of a sample are stored once."""

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise StoreError(f"an array has dims {self.dims} but shape {self.shape}; give one size for each dim")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample's part."""
        return self.shape[1:]

    @property
    def steps(self) -> int | None:
        """Length of the `step` dim, or None for an array without one."""
        return self.shape[1] if self.dims[1:2] == ("step",) else None


@dataclass(frozen=True)
class Group:
    """Arrays and coordinates of one node: coordinates are known beforehand, arrays come with the samples."""

    arrays: dict[str, Array]
    coords: dict[str, Coord] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Everything that is known before the first sample: the table of samples, the groups, the plan as
    attrs.
    """

    samples: dict[str, Any]
    groups: dict[str, Group]
    attrs: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Number of samples where the table of samples is not held: then `samples` is empty, and labels of samples are None."""

    def __len__(self) -> int:
        return len(self.samples["prompt"]) if self.size is None else self.size

    @property
    def arrays(self) -> dict[str, Array]:
        """Every array that is written sample by sample, by path (`attention/32x32/probs`)."""
        return {f"{g}/{n}": a for g, group in self.groups.items() for n, a in group.arrays.items()}


@dataclass(frozen=True)
class TokenTable:
    """Token columns of an attention or text group: arrays (sample, token), or `Rows` that make them in parts.

    `word` counts the words of the prompt from 0; `count` is how many tokens a column sums. Columns that a
    short
    prompt does not use hold text "", id -1, role "", word -1, count 0.
    """

    text: Any
    id: Any
    role: Any
    word: Any
    count: Any
    text_uncond: Any = None

    @classmethod
    def of(cls, group: Group) -> "TokenTable":
        """Return the table that a group's coordinates hold."""
        return cls(**{n.removeprefix("token_"): v for n, (_, v) in group.coords.items() if n.startswith("token_")})

    def coords(self) -> dict[str, Coord]:
        """Return the columns as coordinates `token_text`, `token_id`, … (sample, token)."""
        found = {f"token_{f.name}": getattr(self, f.name) for f in fields(self)}
        ints = ("token_id", "token_word", "token_count")
        return {
            name: (
                ("sample", "token"),
                values if isinstance(values, Rows) else np.asarray(values, "int32" if name in ints else object),
            )
            for name, values in found.items()
            if values is not None
        }

    def columns(self, span: slice) -> "TokenTable":
        """Return the table of some columns."""
        width = len(range(self.width)[span])
        found = {n.removeprefix("token_"): v for n, (_, v) in self.coords().items()}
        return TokenTable(**{n: changed(v, width, lambda part: part[:, span]) for n, v in found.items()})

    @property
    def width(self) -> int:
        """Number of columns."""
        shape = np.shape(self.id)
        if len(shape) != 2:
            raise StoreError(f"a token table has columns of shape {shape}; make them (sample, token)")
        return int(shape[1])

    def padded(self, width: int) -> "TokenTable":
        """Return the table widened to `width` columns by unused ones."""
        if width < self.width:
            raise StoreError(f"a prompt needs {self.width} token columns, but the run has {width}; start a new run")
        more = ((0, 0), (0, width - self.width))
        columns = {}
        for name, (_, values) in self.coords().items():
            pad = partial(np.pad, pad_width=more, constant_values=np.asarray(TOKEN_FILL[name], values.dtype)[()])
            columns[name.removeprefix("token_")] = changed(values, width, pad)
        return TokenTable(**columns)
