"""The tokens of many prompts, packed: of ten thousand of them, lists of Python objects take tens of megabytes."""

from array import array
from collections.abc import Callable, Sequence
from copy import copy
from typing import Literal, overload

import numpy as np

from interp.errors import InterpError
from interp.tokens import Tokens

Column = Literal["id", "text", "role", "word"]


class TokenList(Sequence[Tokens]):
    """Tokenised texts, one a sample. Equal texts are held once, and all of them in a few arrays.

    Args:
        texts: One a sample.
        tokenize: Gives the tokens of a text; called once for each that differs.
        known: A list that may have some of the texts already.
    """

    def __init__(
        self, texts: Sequence[str], tokenize: Callable[[str], Tokens], known: "TokenList | None" = None
    ) -> None:
        distinct = list(dict.fromkeys(texts))
        numbers = {text: k for k, text in enumerate(distinct)}
        self._number = np.fromiter((numbers[t] for t in texts), "int32", len(texts))
        """Which of the distinct texts each sample has."""
        there: _Packed | None = None if known is None else known._packed
        self._packed: _Packed = (
            there if there is not None and there.texts == distinct else _Packed(distinct, tokenize, there)
        )

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, i: int) -> Tokens: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tokens]: ...
    def __getitem__(self, i: int | slice) -> Tokens | list[Tokens]:
        found = self._number[i]
        return [self._packed[k] for k in found] if isinstance(found, np.ndarray) else self._packed[found]

    def after(self, before: int) -> "TokenList":
        """Return the list with its first text so many times before it: of samples that are not looked at again."""
        moved = copy(self)
        moved._number = np.concatenate([np.zeros(before, "int32"), self._number])
        return moved

    @property
    def lengths(self) -> np.ndarray:
        """Number of positions of each sample."""
        return self._packed.lengths[self._number]

    def count_of(self, role: str) -> np.ndarray:
        """How many tokens of a role each sample has."""
        return self._packed.count_of(role)[self._number]

    def at(self, column: Column, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return what stands in a column at some samples' positions (row, …); -1 or "" where the text has no such position."""
        return self._packed.at(column, self._number[rows], positions)

    def are(self, role: str, rows: np.ndarray) -> np.ndarray:
        """Tell which of some samples' positions have a role: (row, position), as many positions as the longest text has."""
        return self._packed.are(role, self._number[rows], int(self.lengths.max(initial=0)))


def read_prompts(texts: Sequence[str], tokenize: Callable[[str], Tokens]) -> TokenList:
    """Tokenise the prompts of a table; InterpError that names all rows whose prompts the text encoder does not take."""
    try:
        return TokenList(texts, tokenize)
    except InterpError as error:
        if len(texts) == 1:
            raise
        wrong = [i for i, text in enumerate(texts) if not _is_taken(text, tokenize)]
        rows = ", ".join(map(str, wrong[1:9])) + (", …" if len(wrong) > 9 else "")
        more = f" (likewise in {len(wrong) - 1} more: {rows})" if rows else ""
        raise InterpError(f"row {wrong[0]} of the prompt table: {error}{more}") from None


def _is_taken(text: str, tokenize: Callable[[str], Tokens]) -> bool:
    try:
        tokenize(text)
    except InterpError:
        return False
    return True


class _Packed:
    """Distinct texts, each up to where its last token begins to repeat itself, as padding does; 13 bytes a token."""

    def __init__(self, texts: list[str], tokenize: Callable[[str], Tokens], known: "_Packed | None") -> None:
        self.texts = texts
        have = {} if known is None else {text: k for k, text in enumerate(known.texts)}
        names, roles = {"": 0}, {"": 0}
        ids, text, role, word, words = array("i"), array("i"), array("b"), array("i"), array("i")
        lengths, eos, starts, word_starts = [], [], [0], [0]
        for one in texts:
            tokens = known[have[one]] if known is not None and one in have else tokenize(one)
            kept = _before_repeating(tokens)
            ids.extend(tokens.ids[:kept])
            text.extend([names.setdefault(t, len(names)) for t in tokens.text[:kept]])
            role.extend([roles.setdefault(r, len(roles)) for r in tokens.role[:kept]])
            word.extend(tokens.word[:kept])
            words.extend([names.setdefault(w, len(names)) for w in tokens.words])
            lengths.append(len(tokens.ids))
            eos.append(tokens.eos)
            starts.append(len(ids))
            word_starts.append(len(words))
        self._ids, self._text, self._role, self._word, self._words = map(np.asarray, (ids, text, role, word, words))
        self.lengths, self._eos, self._starts, self._word_starts = (
            np.asarray(v, "int32") for v in (lengths, eos, starts, word_starts)
        )
        self._names, self._roles = np.asarray([*names], object), np.asarray([*roles], object)

    def __getitem__(self, k: int) -> Tokens:
        here = np.minimum(np.arange(self.lengths[k]) + self._starts[k], self._starts[k + 1] - 1)
        words = self._words[self._word_starts[k] : self._word_starts[k + 1]]
        return Tokens(
            self._ids[here].tolist(), self._names[self._text[here]].tolist(), self._roles[self._role[here]].tolist(),
            self._word[here].tolist(), self._names[words].tolist(), int(self._eos[k]),
        )  # fmt: skip

    def count_of(self, role: str) -> np.ndarray:
        matches = self._is(role, self._role)
        upto = np.concatenate([[0], np.cumsum(matches)])
        found: np.ndarray = np.diff(upto[self._starts])
        more = self.lengths - np.diff(self._starts)  # repetitions of the last one
        some = more > 0
        found[some] += more[some] * matches[self._starts[1:][some] - 1]
        return found

    def at(self, column: Column, numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        there, places = self._places(numbers, positions)

        def taken(values: np.ndarray, nothing: int) -> np.ndarray:
            return np.where(there, values[places] if len(values) else nothing, nothing)

        if column == "text":
            return np.asarray(self._names[taken(self._text, 0)])
        if column == "role":
            return np.asarray(self._roles[taken(self._role, 0)])
        return taken(self._ids if column == "id" else self._word, -1)

    def are(self, role: str, numbers: np.ndarray, width: int) -> np.ndarray:
        there, places = self._places(numbers, np.arange(width)[None])
        return there & self._is(role, self._role[places]) if len(self._role) else there

    def _is(self, role: str, codes: np.ndarray) -> np.ndarray:
        return np.isin(codes, np.flatnonzero(self._roles == role))

    def _places(self, numbers: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which positions of some texts there are, and where in the arrays they lie."""
        start, stop = self._starts[numbers][:, None], self._starts[numbers + 1][:, None]
        there = (positions >= 0) & (positions < self.lengths[numbers][:, None])
        return there, np.where(there, np.minimum(start + positions, stop - 1), 0)


def _before_repeating(tokens: Tokens) -> int:
    """Count the positions up to the first of those at the end that are all alike."""
    kept = len(tokens.ids)
    while (
        kept > 1
        and tokens.ids[kept - 1] == tokens.ids[kept - 2]
        and tokens.role[kept - 1] == tokens.role[kept - 2]
        and tokens.word[kept - 1] == tokens.word[kept - 2]
        and tokens.text[kept - 1] == tokens.text[kept - 2]
    ):
        kept -= 1
    return kept
