"""The words of a prompt from its token table: sub-tokens joined, repeated words told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from interp.stores.errors import InterpError, nearest


@dataclass(frozen=True)
class Words:
    """Chosen words of each sample: text ("" for none), occurrence (−1 for none), and their tokens.

    text, occurrence: (sample, word); member: bool (sample, word, token).
    """

    text: np.ndarray
    occurrence: np.ndarray
    member: np.ndarray

    def of(self, token_maps: np.ndarray, sample: int) -> np.ndarray:
        """Return a sample's word maps (word, y, x): means of the token maps (token, y, x) of each word."""
        member = self.member[sample].astype(float)
        count = member.sum(1)
        with np.errstate(invalid="ignore"):
            member /= np.where(count == 0, np.nan, count)[:, None]
        # An unused column's map is NaN and no word's: it must not spoil the sum.
        maps = np.where(self.member[sample].any(0)[:, None, None], token_maps, 0)
        return np.tensordot(member, maps, axes=1)

    def coords(self) -> dict[str, Any]:
        """Return word_text and word_occurrence as coordinates (sample, word)."""
        dims = ("sample", "word")
        return {"word_text": (dims, self.text), "word_occurrence": (dims, self.occurrence)}


def prompt_words(text: Sequence[str], role: Sequence[str], word: Sequence[int]) -> list[tuple[str, int, np.ndarray]]:
    """Return each word of one sample in order: its text, its occurrence (0 = first), its token columns.

    >>> [(w, n, t.tolist()) for w, n, t in prompt_words(["a", "tea", "pot"], ["word"] * 3, [0, 1, 1])]
    [('a', 0, [0]), ('teapot', 0, [1, 2])]
    """
    roles, words = np.asarray(role), np.asarray(word)
    found: list[tuple[str, int, np.ndarray]] = []
    for index in np.unique(words[(roles == "word") & (words >= 0)]):
        columns = np.flatnonzero((words == index) & (roles == "word"))
        joined = "".join(_clean(text[int(c)]) for c in columns)
        found.append((joined, sum(joined.casefold() == w.casefold() for w, _, _ in found), columns))
    return found


def chosen_words(table: xr.Dataset, words: Sequence[str | tuple[str, int]] | str | None) -> Words:
    """Choose words in a token table (text, role, word by sample, token): all of them, or those named.

    words: None, a word, or several; "red" means the first red of a prompt, ("red", 1) or "red#1" the second; "red
    circle" is a span: these words one after the other, as one. Upper and lower case are one. Raises InterpError for a
    word that no prompt has.
    """
    samples, tokens = table.sizes["sample"], table.sizes["token"]
    prompts = [prompt_words(*(table[c].values[i].tolist() for c in ("text", "role", "word"))) for i in range(samples)]
    wanted = None if words is None else [_request(w) for w in ([words] if isinstance(words, str) else words)]
    width = max(map(len, prompts), default=0) if wanted is None else len(wanted)
    occurrence = np.full((samples, width), -1, dtype=np.int64)
    member = np.zeros((samples, width, tokens), dtype=bool)
    names = [[""] * width for _ in range(samples)]
    for i, prompt in enumerate(prompts):
        for slot in range(width):
            found = prompt[slot : slot + 1] if wanted is None else _spans(prompt, *wanted[slot])
            for names[i][slot], occurrence[i, slot], columns in found:
                member[i, slot, columns] = True
    for slot, (name, n) in enumerate(wanted or []):
        if not (occurrence[:, slot] >= 0).any():
            known = {text.casefold() for prompt in prompts for text, _, _ in prompt}
            if any(_spans(prompt, name, 0) for prompt in prompts):
                raise InterpError(f"no prompt of this run has {name!r} {n + 1} times (occurrences count from 0)")
            strange = next((word for word in name.split() if word not in known), name)
            what = "word" if strange == name else f"words {name!r} one after the other, nor the word"
            if " " in strange:
                raise InterpError(f"no prompt of this run has the words {name!r} one after the other")
            raise InterpError(f"no prompt of this run has the {what} {strange!r}{nearest(strange, known)}")
    return Words(np.array(names, dtype=str).reshape(samples, width), occurrence, member)


def _spans(prompt: list[tuple[str, int, np.ndarray]], name: str, occurrence: int) -> list[tuple[str, int, np.ndarray]]:
    """The occurrence of a word or of several in a row: a list of one (text, occurrence, columns), or of none."""
    wanted = name.split() or [name]
    texts = [text.casefold() for text, _, _ in prompt]
    starts = [k for k in range(len(texts) - len(wanted) + 1) if texts[k : k + len(wanted)] == wanted]
    if occurrence >= len(starts):
        return []
    part = prompt[starts[occurrence] : starts[occurrence] + len(wanted)]
    return [(" ".join(text for text, _, _ in part), occurrence, np.concatenate([columns for _, _, columns in part]))]


def _request(word: Any) -> tuple[str, int]:
    if isinstance(word, str):
        text, _, occurrence = word.rpartition("#")
        return (text.casefold(), int(occurrence)) if text and occurrence.isdigit() else (word.casefold(), 0)
    try:
        name, number = tuple(word)
        return str(name).casefold(), int(number)
    except (TypeError, ValueError):
        raise InterpError(f'words: {word!r} is neither a word nor a pair such as ("red", 1)') from None


def _clean(token: str) -> str:
    """The letters of a token without the word marks of BPE (`</w>`, `Ġ`) and SentencePiece (`▁`)."""
    return token.removesuffix("</w>").lstrip("Ġ▁").strip()
