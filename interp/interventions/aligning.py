"""Which token of one prompt is which of another: Prompt-to-Prompt's word swap and refinement (arXiv:2208.01626)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from interp.errors import InterpError
from interp.tokens import Tokens


@dataclass(frozen=True)
class Alignment:
    """Pairs of positions (source, target, weight), and the target's positions that keep their own probabilities."""

    pairs: list[tuple[int, int, float]]
    own: list[int]

    def carry(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the target's probabilities (…, token) with those of the source in their place."""
        length, most = target.shape[-1], source.shape[-1]
        pairs = [(a, b, w) for a, b, w in self.pairs if a < most and b < length]
        kept = torch.zeros(length, dtype=torch.bool, device=target.device)
        kept[[p for p in self.own if p < length]] = True
        carried = torch.where(kept, target, torch.zeros_like(target))
        if pairs:
            first, second, weights = zip(*pairs, strict=True)
            columns = source[..., list(first)] * torch.tensor(weights, dtype=source.dtype, device=source.device)
            carried.index_add_(-1, torch.tensor(second, device=target.device), columns)
        return carried


def align(source: Tokens, target: Tokens, mode: str, encoders: Iterable[range]) -> Alignment:
    """Align two prompts by their words.

    Words that are paired hand over their tokens' probabilities one to one, or, where they have different numbers of
    tokens, evenly spread, so that the sum is kept. BOS, first EOS and padding go to their like; padding that the
    target has no place for is added to its last.

    Args:
        source, target: Tokenised prompts.
        mode: `replace` pairs the words in order; `refine` those of the longest common subsequence, and the target's
            other words keep their own; `auto` is `replace` where both have as many words, else `refine`.
        encoders: Positions of each text encoder's tokens, aligned one by one.

    Raises:
        InterpError: `replace` with different numbers of words.
    """
    if mode == "replace" and len(source.words) != len(target.words):
        raise InterpError(
            f"a word swap needs as many words in both prompts, but {' '.join(source.words)!r} has {len(source.words)} and "
            f"{' '.join(target.words)!r} has {len(target.words)}; use mode='refine'"
        )
    swap = mode == "replace" or (mode == "auto" and len(source.words) == len(target.words))
    words = [(i, i) for i in range(len(target.words))] if swap else common(source.words, target.words)
    pairs: list[tuple[int, int, float]] = []
    taken: set[int] = set()
    held: set[int] = set()
    for where in encoders:
        held |= {*where}
        for a, b in words:
            first, second = (
                [p for p in where if p < len(t.word) and t.word[p] == w] for t, w in ((source, a), (target, b))
            )
            if len(first) == len(second):
                pairs += [(p, q, 1.0) for p, q in zip(first, second, strict=True)]
            else:
                pairs += [(p, q, 1 / len(second)) for p in first for q in second]
            taken |= {*second}
        for role in ("bos", "eos", "pad", "template", "word"):  # words: tokens of no word, as a space alone
            first, second = (_wordless(t, role, where) for t in (source, target))
            pairs += [(p, q, 1.0) for p, q in zip(first, second, strict=False)]
            if role == "pad" and second:
                pairs += [(p, second[-1], 1.0) for p in first[len(second) :]]
            taken |= {*(second if role == "pad" else second[: len(first)])}
    rest = [p for p in range(len(target.ids)) if p not in held]
    pairs += [(p, p, 1.0) for p in rest if p < len(source.ids)]
    return Alignment(pairs, [p for p in range(len(target.ids)) if p not in taken and p not in rest])


def _wordless(tokens: Tokens, role: str, where: range) -> list[int]:
    return [p for p in where if p < len(tokens.role) and tokens.role[p] == role and tokens.word[p] < 0]


def common(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices of the longest common subsequence of words; case does not matter.

    >>> common("a red circle".split(), "a large red star".split())
    [(0, 0), (1, 2)]
    """
    a, b = [w.lower() for w in first], [w.lower() for w in second]
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = 1 + best[i + 1][j + 1] if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return found
