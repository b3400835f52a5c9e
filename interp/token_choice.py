"""Choosing token columns by position, word and role."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from interp.errors import InterpError, nearest, sentence_list
from interp.prompts import fill
from interp.stores.rows import Rows
from interp.stores.table import ROLES
from interp.token_columns import TokenSelection, label_columns, padding
from interp.token_list import TokenList
from interp.tokens import WORD, Tokens

Item = int | str


def choose_tokens(
    wanted: Sequence[Item], cond: TokenList, uncond: TokenList, rows: Sequence[Mapping[str, Any]],
    width: int = 0,
) -> TokenSelection:  # fmt: skip
    """Return the columns of some positions, words and roles, in the order of the prompt.

    A prompt's columns are its chosen tokens, left aligned; the role `pad` is one last column that sums all padding.

    Args:
        wanted: Positions; roles; words or phrases, all their occurrences; `"{column}"` for the text in a column of
            the prompt table.
        cond, uncond: Tokenised prompts and negative prompts, one a sample.
        rows: The samples' rows of the prompt table.
        width: Make at least this many columns (a run that is appended to has its width already).

    Raises:
        InterpError: a position is outside the text, or a word is in none of the prompts.
    """
    summed = "pad" in wanted
    kept = [_positions(wanted, tokens, row) for tokens, row in zip(cond, rows, strict=True)]
    for item in wanted:
        if (
            isinstance(item, str)
            and item not in ROLES
            and not any(_words(item, t, r) for t, r in zip(cond, rows, strict=True))
        ):
            words = sorted({w for t in cond for w in t.words})
            raise InterpError(
                f"Capture(tokens={list(wanted)}): {fill(item, rows[0])!r} is in no prompt"
                f"{nearest(item, [*words, *ROLES]) or ';'} the prompts have the words {sentence_list(words)}"
            )
    columns = max(*(len(k) + summed for k in kept), width, 1)
    positions = np.full((len(cond), columns), -1)
    for i, found in enumerate(kept):
        positions[i, : len(found)] = found
    if not summed:
        return TokenSelection(positions, None, label_columns(cond, uncond, positions, None))
    every = padding(cond)

    def left(rows: np.ndarray) -> np.ndarray:
        """The padding that is not chosen by itself."""
        pads = every[rows]
        for i, row in enumerate(rows):
            pads[i, kept[row]] = False
        return pads

    sums = Rows(every.shape, bool, left)
    return TokenSelection(positions, sums, label_columns(cond, uncond, positions, sums))


def find_tokens(wanted: Sequence[Item], tokens: Tokens, row: Mapping[str, Any], asker: str) -> list[int]:
    """Return the positions of one prompt's tokens that are chosen by number, role (padding too), word or phrase.

    Raises:
        InterpError: a position is outside the text, or the prompt has no such word; `asker` begins the sentence.
    """
    found: set[int] = set()
    for item in wanted:
        if not isinstance(item, str):
            some = [item] if 0 <= item < len(tokens.ids) else []
        elif item in ROLES:
            some = [p for p, role in enumerate(tokens.role) if role == item]
        else:
            some = _words(item, tokens, row)
        if not some and item not in ROLES:
            what = f"{fill(item, row)!r}" if isinstance(item, str) else f"position {item}"
            raise InterpError(
                f"{asker}: {what} is not in the prompt {str(row.get('prompt'))!r}"
                f"{nearest(str(item), [*tokens.words, *ROLES])}; it has the words {sentence_list(tokens.words)} at "
                f"positions within 0–{len(tokens.ids) - 1}"
            )
        found |= {*some}
    return sorted(found)


def chosen_tokens(
    asker: object, tokens: Tokens, row: Mapping[str, Any], *, words: Sequence[str] = (), roles: Sequence[str] = (),
    indices: Sequence[int] = (), occurrence: int | None = None,
) -> list[int]:  # fmt: skip
    """Return the positions of one prompt's tokens that are chosen by word, role or number, which add up.

    Raises:
        InterpError: the prompt has no such word or position; `asker`'s repr begins the sentence.
    """
    chosen = {p for p, role in enumerate(tokens.role) if role in roles}
    for phrase in words:
        found, prompt = occurrences(phrase, tokens, row), str(row.get("prompt"))
        if not found:
            raise InterpError(
                f"{asker!r}: {fill(phrase, row)!r} is not in the prompt {prompt!r}{nearest(fill(phrase, row), tokens.words)}"
            )
        if occurrence is not None and occurrence >= len(found):
            raise InterpError(
                f"{asker!r}: {fill(phrase, row)!r} appears {len(found)}× in the prompt {prompt!r}, and occurrences are "
                "counted from 0"
            )
        chosen |= {p for one in (found if occurrence is None else [found[occurrence]]) for p in one}
    outside = [i for i in indices if i >= len(tokens.ids)]
    if outside:
        raise InterpError(
            f"{asker!r}: the text of {str(row.get('prompt'))!r} has the positions 0–{len(tokens.ids) - 1}, and no {outside[0]}"
        )
    return sorted(chosen | {*indices})


def _positions(wanted: Sequence[Item], tokens: Tokens, row: Mapping[str, Any]) -> list[int]:
    length, found = len(tokens.ids), set()
    for item in wanted:
        if isinstance(item, str):
            found |= {p for p, role in enumerate(tokens.role) if role == item and item != "pad"}
            found |= set() if item in ROLES else set(_words(item, tokens, row))
        elif 0 <= item < length:
            found.add(int(item))
        else:
            raise InterpError(f"Capture(tokens={list(wanted)}): the text has positions 0–{length - 1}")
    return sorted(found)


def _words(item: str, tokens: Tokens, row: Mapping[str, Any]) -> list[int]:
    """Positions of all occurrences of a word or phrase."""
    return sorted({p for found in occurrences(item, tokens, row) for p in found})


def occurrences(item: str, tokens: Tokens, row: Mapping[str, Any]) -> list[list[int]]:
    """Positions of each occurrence of a word or phrase, all its tokens in all encoders; case does not matter."""
    phrase = [m.group().lower() for m in WORD.finditer(fill(item, row))]
    words = [w.lower() for w in tokens.words]
    starts = [i for i in range(len(words) - len(phrase) + 1) if phrase and words[i : i + len(phrase)] == phrase]
    return [[p for p, w in enumerate(tokens.word) if i <= w < i + len(phrase)] for i in starts]
