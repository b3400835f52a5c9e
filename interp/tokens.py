"""Tokens of a prompt as the text encoder sees them: text, role and word of each position."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.stores import TokenTable

WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


@dataclass(frozen=True)
class Tokens:
    """One tokenised prompt, all positions: ids, their text, role and word index or -1.

    Roles: `bos`, `word`, `eos` (the first of each encoder), `pad`, and `template` for the fixed words that some models
    put around a prompt. `eos` is the position of the first end-of-text token; everything after it is padding, whatever
    id pads.
    """

    ids: list[int]
    text: list[str]
    role: list[str]
    word: list[int]
    words: list[str]
    eos: int

    def part(self, positions: slice) -> "Tokens":
        """Return some positions as tokens of their own: one encoder's of several that follow each other."""
        role = self.role[positions]
        eos = role.index("eos") if "eos" in role else len(role)
        return Tokens(self.ids[positions], self.text[positions], role, self.word[positions], self.words, eos)

    def lengthened(self, length: int) -> "Tokens":
        """Return the tokens with positions behind them that hold none (role "")."""
        more = length - len(self.ids)
        return Tokens(
            [*self.ids, *[-1] * more], [*self.text, *[""] * more], [*self.role, *[""] * more], [*self.word, *[-1] * more],
            self.words, self.eos,
        )  # fmt: skip


def join(first: Tokens, *others: Tokens) -> Tokens:
    """Put the tokens of several encoders after each other; a word is one word in all of them."""
    every = (first, *others)
    return Tokens(
        [i for t in every for i in t.ids], [x for t in every for x in t.text], [r for t in every for r in t.role],
        [w for t in every for w in t.word], first.words, first.eos,
    )  # fmt: skip


def tokenize(
    tokenizer: Any, prompt: str, length: int | None = None, *, prefix: str = "", suffix: str = "", pad: bool = True
) -> Tokens:
    """Tokenise a prompt to the encoder's full length.

    Words are runs of letters and digits (hyphens and apostrophes inside belong to the word) or of punctuation; a
    token belongs to the word that its characters lie in. EOS is found by position, never by id: Stable Diffusion 1
    pads with EOS, 2 with "!". Padding lies where the tokenizer puts it, mostly on the right.

    Args:
        tokenizer: A transformers tokenizer that tells offsets.
        prompt: The text.
        length: Positions of the context; default is the tokenizer's own.
        prefix, suffix: The model's template around the prompt. Its tokens get the role `template`, except for `bos`, if it
            begins with it, and for `eos`, if one follows the prompt (`<|im_end|>` of Qwen).
        pad: Fill the context with padding.

    Raises:
        InterpError: the prompt is longer than the context; the words that would be cut are named.
    """
    length = int(tokenizer.model_max_length if length is None else length)
    first, last = tokenizer.bos_token or tokenizer.cls_token, tokenizer.eos_token or tokenizer.sep_token  # BERT's words
    written = bool(first) and prefix.startswith(str(first))
    special = [] if written else list(tokenizer("")["input_ids"])  # what the tokenizer puts around any text
    lead = int(bool(special) and special[0] == tokenizer.convert_tokens_to_ids(str(first)))
    text = prefix + prompt + suffix
    free = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inner = list(free["input_ids"])
    pieces = tokenizer.convert_ids_to_tokens(inner)
    spans = [_stripped(text, piece, *span) for piece, span in zip(pieces, free["offset_mapping"], strict=True)]
    start, stop = len(prefix), len(prefix) + len(prompt)
    words = [(m.group(), (m.start() + start, m.end() + start)) for m in WORD.finditer(prompt)]
    _check_length(prompt, spans, words, length - len(special), start)
    role = ["template" if (prefix and b <= start) or (suffix and a >= stop) else "word" for a, b in spans]
    if written and inner[0] == tokenizer.bos_token_id:
        role[0] = "bos"
    after = next((i for i, (a, _) in enumerate(spans) if suffix and a >= stop), len(spans))
    if after < len(inner) and inner[after] == tokenizer.eos_token_id:
        role[after] = "eos"
    owner = [_word_at((a, max(b, a + 1)), words) if r == "word" else -1 for (a, b), r in zip(spans, role, strict=True)]
    columns = [
        *((special[0], str(first), "bos", -1) for _ in range(lead)),
        *zip(inner, (text[a:b] for a, b in spans), role, owner, strict=True),
        *((i, str(last), "eos", -1) for i in special[lead:]),
    ]
    roles = [r for _, _, r, _ in columns]
    found = Tokens(
        ids=[i for i, _, _, _ in columns],
        text=[t for _, t, _, _ in columns],
        role=roles,
        word=[w for _, _, _, w in columns],
        words=[w for w, _ in words],
        eos=roles.index("eos") if "eos" in roles else len(roles),
    )
    return padded(found, tokenizer, length) if pad else found


def padded(tokens: Tokens, tokenizer: Any, length: int, side: str | None = None) -> Tokens:
    """Fill the context with padding, on the tokenizer's own side unless one is named."""
    count = max(0, length - len(tokens.ids))
    left, right = (0, count) if (side or tokenizer.padding_side) == "right" else (count, 0)

    def fill(values: list, value: Any) -> list:
        return [*[value] * left, *values, *[value] * right]

    return Tokens(
        fill(tokens.ids, tokenizer.pad_token_id), fill(tokens.text, str(tokenizer.pad_token)), fill(tokens.role, "pad"),
        fill(tokens.word, -1), tokens.words, tokens.eos + left,
    )  # fmt: skip


def _check_length(
    prompt: str, spans: list[tuple[int, int]], words: list[tuple[str, tuple[int, int]]], room: int, start: int
) -> None:
    if len(spans) <= room:
        return
    at = spans[room][0]
    if spans[room][0] >= start + len(prompt) > start:
        raise InterpError(
            f"the prompt and what the model writes around it have {len(spans)} tokens, but the text encoder takes {room}, so "
            "the end of the model's own words would be cut; shorten the prompt"
        )
    cut = prompt[next((a for _, (a, b) in words if b > at), at) - start :]
    raise InterpError(
        f"the prompt has {len(spans)} tokens, but the text encoder takes {room}; these words would be cut: {cut!r}; "
        "shorten the prompt"
    )


def _stripped(text: str, piece: str, a: int, b: int) -> tuple[int, int]:
    """Leave the space before a word out of its token's characters (T5 and GPT tokenizers count it in).

    A token that is such a space alone has no characters, whatever offset it is given at the text's beginning.
    """
    while a < b and text[a].isspace():
        a += 1
    return (a, a if piece in ("▁", "Ġ") else b)


def _word_at(span: tuple[int, int], words: list[tuple[str, tuple[int, int]]]) -> int:
    return next((i for i, (_, (a, b)) in enumerate(words) if span[0] < b and span[1] > a), -1)


@dataclass(frozen=True)
class TokenSelection:
    """Which token positions become which columns of a run: positions (sample, column), -1 = unused column.

    `pads` (sample, position) marks the padding that is summed into the last column; None where nothing is summed.
    """

    positions: np.ndarray
    pads: np.ndarray | None
    table: TokenTable

    def of(self, members: Sequence[int]) -> "TokenSelection":
        """Return the positions and pads of some samples."""
        rows = list(members)
        return TokenSelection(self.positions[rows], None if self.pads is None else self.pads[rows], self.table)


def select_tokens(
    cond: list[Tokens], uncond: list[Tokens], tokens: str | tuple[int, ...], width: int = 0
) -> TokenSelection:
    """Choose the columns for a list of prompts, as `Capture.tokens` says.

    Args:
        cond, uncond: Tokenised prompts and negative prompts, one a sample.
        tokens: `"prompt"`, `"all"` or positions.
        width: Make at least this many columns (a run that is appended to has its width already).
    """
    n, length = len(cond), max(len(t.ids) for t in cond)
    pads = None
    if tokens == "prompt":
        used = [[p for p, role in enumerate(t.role) if role != "pad"] for t in cond]
        columns = max(max(map(len, used)) + 1, width)
        positions = np.full((n, columns), -1)
        pads = np.zeros((n, length), bool)
        for i, kept in enumerate(used):
            positions[i, : len(kept)] = kept
            pads[i, : len(cond[i].ids)] = True
            pads[i, kept] = False
    else:
        wanted = range(length) if tokens == "all" else tokens
        wrong = [p for p in wanted if not 0 <= int(p) < length]
        if wrong:
            raise InterpError(f"Capture(tokens={list(wanted)}): the text has positions 0–{length - 1}")
        positions = np.tile(np.asarray(wanted, int), (n, 1))
        lengths = np.asarray([len(t.ids) for t in cond])
        positions[positions >= lengths[:, None]] = -1
        if tokens == "all" and width > positions.shape[1]:
            positions = np.pad(positions, ((0, 0), (0, width - positions.shape[1])), constant_values=-1)
    return TokenSelection(positions, pads, label_columns(cond, uncond, positions, pads))


def label_columns(
    cond: list[Tokens], uncond: list[Tokens], positions: np.ndarray, pads: np.ndarray | None
) -> TokenTable:
    """Describe chosen positions: the table of their columns."""
    shape = positions.shape
    text, role, other = (np.full(shape, "", object) for _ in range(3))
    ids, word, count = np.full(shape, -1), np.full(shape, -1), np.zeros(shape, int)
    for i, (mine, theirs) in enumerate(zip(cond, uncond, strict=True)):
        for column, p in enumerate(positions[i]):
            if p >= 0:
                text[i, column], role[i, column] = mine.text[p], mine.role[p]
                other[i, column] = theirs.text[p] if p < len(theirs.text) else ""
                ids[i, column], word[i, column], count[i, column] = mine.ids[p], mine.word[p], 1
        if pads is not None and pads[i].any():
            p = int(np.argmax(pads[i]))
            text[i, -1], role[i, -1] = mine.text[p], "pad"
            other[i, -1] = theirs.text[p] if p < len(theirs.text) else ""
            ids[i, -1], count[i, -1] = mine.ids[p], int(pads[i].sum())
    return TokenTable(text=text, id=ids, role=role, word=word, count=count, text_uncond=other)
