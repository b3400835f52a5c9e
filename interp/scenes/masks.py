"""How well heat maps find a true mask: average precision, pointing game, and intersection over union."""

import torch
from torch import Tensor

THRESHOLDS = tuple(k / 20 for k in range(1, 20))
"""Of a map scaled from its minimum, 0, to its maximum, 1; what is at or above is taken for the object."""


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the area under precision and recall of pixels ranked by their heat, (map,), 0 to 1.

    maps: (map, pixel). masks: bool (map, pixel), none of them empty. AP = Σ over the true pixels of the precision at their
    rank, divided by their number; pixels of equal heat have one rank, the last of theirs. Chance is the mask's share.

    >>> average_precision(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, True, False, False]])).item()
    0.8333333333333333
    """
    heat, order = maps.sort(dim=1, descending=True, stable=True)
    hit = masks.gather(1, order)
    rank = torch.arange(maps.shape[1], device=maps.device)
    last = torch.ones_like(hit)
    last[:, :-1] = heat[:, 1:] != heat[:, :-1]
    end = torch.where(last, rank, len(rank)).flip(1).cummin(1).values.flip(1)
    precision = hit.cumsum(1).gather(1, end).double() / (end + 1)
    return (precision * hit).sum(1) / hit.sum(1)


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """Return whether the hottest pixel is in the mask, (map,), 0 or 1 (the pointing game, arXiv:1608.00507)."""
    return masks.gather(1, maps.argmax(1, keepdim=True))[:, 0].double()


def intersection_over_union(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the overlap of each mask with its map above each of THRESHOLDS, (map, threshold), 0 to 1.

    >>> two = intersection_over_union(torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([[True, False, False]]))
    >>> two[0, [0, 9, 18]].tolist()
    [0.5, 0.5, 1.0]
    """
    low = maps.amin(1, keepdim=True)
    span = maps.amax(1, keepdim=True) - low
    scaled = (maps - low) / torch.where(span > 0, span, 1)
    edges = torch.tensor([t - 1e-9 for t in THRESHOLDS], dtype=scaled.dtype, device=maps.device)
    steps = len(THRESHOLDS) + 1
    reached = torch.bucketize(scaled, edges, right=True) + steps * masks  # how many thresholds, the mask's pixels apart
    number = torch.zeros(len(maps), 2 * steps, dtype=torch.long, device=maps.device)
    number.scatter_add_(1, reached, torch.ones_like(reached))
    outside, inside = number.view(-1, 2, steps).flip(2).cumsum(2).flip(2)[..., 1:].unbind(1)
    return inside.double() / (outside + masks.sum(1, keepdim=True))


def own_object(maps: Tensor, masks: Tensor, others: Tensor) -> Tensor:
    """Return whether a map is hotter, on the mean, on its mask than on the other object's, (map,): 0 or 1; chance is ½.

    NaN where there is no other.

    >>> both = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    >>> own_object(torch.tensor([[3.0, 9.0, 0.0]]), *both).item()
    0.0
    """
    own, other = ((maps * m).sum(1).double() / m.sum(1) for m in (masks, others))
    return torch.where(others.any(1), (own > other).double(), torch.nan)
