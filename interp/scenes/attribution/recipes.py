"""Recipes: how the maps of a picture become one map of each target. All are free of gradients and of training.

A recipe is three choices: how the maps of heads, layers and noise levels are averaged; against what a word's map is set; and
how the result is spread over neighbouring pixels.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.scenes.attribution.pictures import Picture, logarithm

Pool = Callable[[Tensor], Tensor]
"""From members, bool (word, token), to logarithms of maps (word, pixel)."""


class Recipe(NamedTuple):
    """An average, what it is set against, and how it is spread: keys of AVERAGES, AGAINST and SPREAD."""

    average: str
    against: str
    spread: str


def of_tokens(maps: Tensor, member: Tensor) -> Tensor:
    """Return means over tokens: maps (…, token, pixel), member bool (word, token) → (…, word, pixel)."""
    share = member / member.sum(1, keepdim=True)
    return share.to(maps) @ maps


# How maps are averaged


def _mean(p: Picture) -> Pool:
    maps = p.raw.mean((0, 1))
    return lambda member: logarithm(of_tokens(maps, member))


def _root(p: Picture) -> Pool:
    """A power mean between the arithmetic (1) and the geometric (0): loud heads count less."""
    maps = p.raw.sqrt().mean((0, 1))
    return lambda member: 2 * logarithm(of_tokens(maps, member))


def _square(p: Picture) -> Pool:
    """A power mean that sharpens: loud heads count more."""
    maps = p.raw.square().mean((0, 1))
    return lambda member: logarithm(of_tokens(maps, member)) / 2


def _geometric(p: Picture) -> Pool:
    maps = p.logs.mean((0, 1))
    return lambda member: of_tokens(maps, member)


def _contrasting(p: Picture) -> Pool:
    """A geometric mean in which a head's map weighs by how much it tells the words of a pixel apart, over its pixels."""
    words = of_tokens(p.logs, p.words)
    apart = words - words.mean(2, keepdim=True)
    weight = (apart - apart.mean(3, keepdim=True)).std(3).mean(2)  # (level, unit)
    maps = torch.einsum("lu,lutp->tp", weight / weight.sum(), p.logs)
    return lambda member: of_tokens(maps, member)


def _standard(p: Picture) -> Pool:
    """Every map shifted and scaled to a mean of 0 and a spread of 1 over its pixels: all are equally loud."""
    maps = ((p.raw - p.raw.mean(3, keepdim=True)) / (p.raw.std(3, keepdim=True) + 1e-12)).mean((0, 1))
    return lambda member: of_tokens(maps, member)


def _standard_logs(p: Picture) -> Pool:
    maps = ((p.logs - p.logs.mean(3, keepdim=True)) / (p.logs.std(3, keepdim=True) + 1e-6)).mean((0, 1))
    return lambda member: of_tokens(maps, member)


AVERAGES: dict[str, Callable[[Picture], Pool]] = {
    "mean": _mean,
    "power mean ½": _root,
    "power mean 2": _square,
    "geometric": _geometric,
    "geometric, by contrast": _contrasting,
    "standardised": _standard,
    "logarithms standardised": _standard_logs,
}

# Against what a word's map is set


def _alone(p: Picture, pool: Pool) -> Tensor:
    return pool(p.wanted).exp()


def _mean_word(p: Picture, pool: Pool) -> Tensor:
    return pool(p.wanted) - pool(p.words).mean(0)


def _share(p: Picture, pool: Pool) -> Tensor:
    return (pool(p.wanted) - pool(p.words).logsumexp(0)).exp()


def strongest(own: Tensor, others: Tensor, shared: Tensor) -> Tensor:
    """Return how much each map exceeds the highest of the others that it shares nothing with: (target, pixel).

    own: (target, pixel); others: (word, pixel); shared: bool (target, word).
    """
    rivals = others[None].masked_fill(shared[:, :, None], -torch.inf)
    return own - rivals.amax(1)


def _shared(p: Picture, members: Tensor) -> Tensor:
    return (p.wanted.float() @ members.float().T) > 0


def _strongest_word(p: Picture, pool: Pool) -> Tensor:
    return strongest(pool(p.wanted), pool(p.words), _shared(p, p.words))


def _strongest_token(p: Picture, pool: Pool) -> Tensor:
    everything = torch.cat([p.words, torch.eye(len(p.marks), device=p.marks.device, dtype=torch.bool)[p.marks]])
    return strongest(pool(p.wanted), pool(everything), _shared(p, everything))


AGAINST: dict[str, Callable[[Picture, Pool], Tensor]] = {
    "nothing": _alone,
    "the mean word": _mean_word,
    "all words (share)": _share,
    "the strongest word": _strongest_word,
    "the strongest token, BOS and EOS too": _strongest_token,
}

# How the result is spread


def _blurred(p: Picture, maps: Tensor) -> Tensor:
    side = round(maps.shape[1] ** 0.5)
    kernel = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], device=maps.device).square().div(-2).exp()
    kernel = kernel / kernel.sum()
    square = F.pad(maps.reshape(-1, 1, side, side), (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(square, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1)).flatten(1)


def _walked(times: int, power: float = 1) -> Callable[[Picture, Tensor], Tensor]:
    def spread(p: Picture, maps: Tensor) -> Tensor:
        to = p.near.mean(0) ** power
        to = to / to.sum(1, keepdim=True)
        for _ in range(times):
            maps = maps @ to.T
        return maps

    return spread


SPREAD: dict[str, Callable[[Picture, Tensor], Tensor]] = {
    "as it is": lambda p, maps: maps,
    "blurred": _blurred,
    "self-attention": _walked(1),
    "self-attention twice": _walked(2),
    "self-attention 4 times": _walked(4),
    "self-attention 8 times": _walked(8),
    "self-attention sharpened": _walked(1, 2),
    "self-attention sharpened, twice": _walked(2, 2),
    "self-attention sharpened, 4 times": _walked(4, 2),
    "self-attention sharpened, 8 times": _walked(8, 2),
}

EVERY = [Recipe(*names) for names in product(AVERAGES, AGAINST, SPREAD)]
DAAM = Recipe("mean", "nothing", "as it is")


def maps_of(p: Picture, recipes: list[Recipe]) -> dict[Recipe, Tensor]:
    """Return the map of each target (target, pixel) by each recipe; what recipes share is computed once."""
    pools = {name: AVERAGES[name](p) for name in {r.average: None for r in recipes}}
    kinds = {(r.average, r.against): k for k, r in enumerate({r[:2]: r for r in recipes}.values())}
    sharp = torch.cat([AGAINST[against](p, pools[average]) for average, against in kinds])
    spread = {name: SPREAD[name](p, sharp).unflatten(0, (len(kinds), -1)) for name in {r.spread: None for r in recipes}}
    return {r: spread[r.spread][kinds[r.average, r.against]] for r in recipes}
