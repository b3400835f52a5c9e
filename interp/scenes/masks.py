"""How well heat maps find a true mask: average precision, pointing game, and intersection over union."""

import numpy as np

THRESHOLDS = np.arange(1, 20) / 20
"""Of a map scaled from its minimum, 0, to its maximum, 1; what is at or above is taken for the object."""


def average_precision(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the area under precision and recall of pixels ranked by their heat, (map,), 0 to 1.

    maps: (map, pixel). masks: bool (map, pixel), none of them empty. AP = Σ over the true pixels of the precision at their
    rank, divided by their number; pixels of equal heat have one rank, the last of theirs. Chance is the mask's share.

    >>> average_precision(np.array([[3.0, 1.0, 2.0, 0.0]]), np.array([[True, True, False, False]])).round(3).tolist()
    [0.833]
    """
    order = np.argsort(-maps, axis=1, kind="stable")
    heat, hit = np.take_along_axis(maps, order, 1), np.take_along_axis(masks, order, 1)
    rank = np.arange(maps.shape[1])
    last = np.ones(heat.shape, bool)
    last[:, :-1] = heat[:, 1:] != heat[:, :-1]
    end = np.minimum.accumulate(np.where(last, rank, len(rank))[:, ::-1], axis=1)[:, ::-1]
    precision = np.take_along_axis(np.cumsum(hit, 1), end, 1) / (end + 1)
    found: np.ndarray = (precision * hit).sum(1) / hit.sum(1)
    return found


def pointing(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return whether the hottest pixel is in the mask, (map,), 0 or 1 (the pointing game, arXiv:1608.00507)."""
    return np.take_along_axis(masks, maps.argmax(1)[:, None], 1)[:, 0].astype(float)


def intersection_over_union(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the overlap of each mask with its map above each of THRESHOLDS, (map, threshold), 0 to 1.

    >>> two = intersection_over_union(np.array([[4.0, 2.0, 0.0]]), np.array([[True, False, False]]))
    >>> two[0, [0, 9, 18]].tolist()
    [0.5, 0.5, 1.0]
    """
    low = maps.min(1, keepdims=True)
    span = maps.max(1, keepdims=True) - low
    level = np.digitize((maps - low) / np.where(span > 0, span, 1), THRESHOLDS - 1e-9)
    bins = len(THRESHOLDS) + 1
    at = level + bins * np.arange(len(maps))[:, None]

    def above(weights: np.ndarray) -> np.ndarray:
        counts = np.bincount(at.ravel(), weights.ravel(), bins * len(maps)).reshape(len(maps), bins)
        found: np.ndarray = counts[:, :0:-1].cumsum(1)[:, ::-1]
        return found

    both, taken = above(masks.astype(float)), above(np.ones(masks.shape))
    union = taken + masks.sum(1, keepdims=True) - both
    return both / union
