"""Reductions of attention that go by name: entropy, mass, means and sums, formed on the device while a run is traced."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from interp.errors import InterpError, nearest, sentence_list
from interp.reduction import AttentionReducer
from interp.stores.table import ROLES
from interp.token_columns import TokenSelection


@dataclass(frozen=True)
class Place:
    """What a reduction knows of the probabilities beside themselves.

    roles (sample, key): the number of each key's role in `ROLES`, −1 for none; columns: the run's token columns; grid:
    (height, width) of the queries; largest: of the largest grid that is reduced.
    """

    roles: torch.Tensor | None
    columns: TokenSelection | None
    grid: tuple[int, int]
    largest: tuple[int, int]

    def tokens(self, probs: torch.Tensor) -> torch.Tensor:
        """Choose the run's token columns: (sample, head, query, key) → (sample, head, token, query)."""
        reducer = AttentionReducer("cross", self.grid, None, self.columns, torch.float32)
        return reducer.columns(probs[None])[0]


@dataclass(frozen=True)
class Named:
    """A reduction: its function (probabilities, place) → (sample, *dims), and what is summed or averaged afterwards.

    over: of `step` and `layer`; of_text: it needs the keys to be tokens.
    """

    fn: Callable[[torch.Tensor, Place], torch.Tensor]
    dims: tuple[str, ...]
    over: tuple[str, ...] = ()
    mean: bool = False
    of_text: bool = True

    @property
    def maps(self) -> bool:
        """Whether it gives maps: they are formed whole, and a region is cut out of them on the largest grid."""
        return "y" in self.dims


def _entropy(probs: torch.Tensor, place: Place) -> torch.Tensor:
    return torch.special.entr(probs).sum(-1).mean(-1)


def _role_mass(probs: torch.Tensor, place: Place) -> torch.Tensor:
    assert place.roles is not None
    length = probs.shape[-1]
    roles = F.pad(place.roles.to(probs.device, non_blocking=True), (0, length - place.roles.shape[1]), value=-1)[
        :, :length
    ]
    chosen = torch.stack([roles == i for i in range(len(ROLES))], -1).to(probs)  # (sample, key, role)
    return torch.einsum("shk,skr->shr", probs.mean(-2), chosen)


def _token_mass(probs: torch.Tensor, place: Place) -> torch.Tensor:
    return place.tokens(probs.mean(-2, keepdim=True))[..., 0]


def _mean_map(probs: torch.Tensor, place: Place) -> torch.Tensor:
    maps = place.tokens(probs.mean(1, keepdim=True))[:, 0].unflatten(-1, place.grid)
    return maps if place.grid == place.largest else F.interpolate(maps, size=place.largest, mode="nearest-exact")


def _daam(probs: torch.Tensor, place: Place) -> torch.Tensor:
    maps = place.tokens(probs.sum(1, keepdim=True))[:, 0].unflatten(-1, place.grid)
    if place.grid == place.largest:
        return maps
    gaps = maps.isnan().any((-1, -2), keepdim=True)
    large = F.interpolate(maps.nan_to_num(), size=place.largest, mode="bicubic").clamp(min=0)
    return large.masked_fill(gaps, float("nan"))


NAMED = {
    "entropy": Named(_entropy, ("head",), of_text=False),
    "role_mass": Named(_role_mass, ("head", "role")),
    "token_mass": Named(_token_mass, ("head", "token")),
    "mean_map": Named(_mean_map, ("token", "y", "x"), over=("step",), mean=True),
    "daam": Named(_daam, ("token", "y", "x"), over=("step", "layer")),
}
"""Name → reduction.

`entropy`: of each query's probabilities in nats, mean over the queries. `role_mass`: probability of all tokens of a role
(bos, word, eos, pad, template), mean over the queries. `token_mass`: the same of each token column. `mean_map`: a token's
map, mean over heads and steps; cells of a smaller grid are repeated, so that all layers have the largest. `daam`: a token's
maps summed over heads, layers and steps, each brought to the largest grid by bicubic interpolation (Tang et al.,
arXiv:2210.04885). Layers with fewer heads than others have NaN beyond them. Where a region is captured, the queries are those
inside it, and maps are cut to it.
"""


def named(name: str, key: str) -> Named:
    """Return a reduction by its name.

    Raises:
        InterpError: there is none of this name.
    """
    if name not in NAMED:
        raise InterpError(
            f"Capture(reduce={{{key!r}: {name!r}}}): no reduction has this name{nearest(name, NAMED) or ';'} There are "
            f"{sentence_list(NAMED, 9)}; or give a function"
        )
    return NAMED[name]


class Sums:
    """What is added up over steps and layers, on the device, one tensor a branch."""

    def __init__(self, mean: bool) -> None:
        self._mean = mean
        self._total: dict[object, torch.Tensor] = {}
        self._count: dict[object, int] = {}

    def add(self, key: object, value: torch.Tensor) -> None:
        """Add one value."""
        self._total[key] = self._total[key] + value if key in self._total else value
        self._count[key] = self._count.get(key, 0) + 1

    def result(self) -> dict[object, torch.Tensor]:
        """Sums or means by key."""
        return {k: t / self._count[k] if self._mean else t for k, t in self._total.items()}
