"""Averaging attention maps geometrically, and setting each word against its strongest rival."""

from __future__ import annotations

import numpy as np

FLOOR = 2.0**-24  # the smallest number of half precision: a probability of 0 is below it


def logarithm(probs: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of probabilities, no less than that of the smallest half-precision number."""
    found: np.ndarray = np.log(np.maximum(probs, FLOOR))
    return found


def log_odds(own: np.ndarray, words: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Return how much each map exceeds, at each pixel, the highest of its rivals: logarithms (map, …) → nats (map, …).

    own: (map, …). words: (word, …) of all words of the prompt. shared: bool (map, word), the words that a map is made of:
    they are no rivals of it. A map without any rival is NaN.

    >>> own, words = np.log([[0.4], [0.1]]), np.log([[0.4], [0.1], [0.2]])
    >>> np.exp(log_odds(own, words, np.eye(3, dtype=bool)[:2])).round(3).tolist()
    [[2.0], [0.25]]
    """
    rival = np.full_like(own, -np.inf)
    for k, word in enumerate(words):
        mine = ~shared[:, k]
        rival[mine] = np.maximum(rival[mine], word)
    return np.where(np.isneginf(rival), np.nan, own - rival)
