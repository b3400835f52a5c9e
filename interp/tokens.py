"""Tokens of a prompt as the text encoder sees them: text, role and word of each position."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.stores import TokenTable

WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


@dataclass(frozen=True)
class Tokens:
    """One tokenised prompt, all positions: ids, their text, role (`bos` `word` `eos` `pad`) and word index or -1.

    `eos` is the position of the first end-of-text token; everything after it is padding, whatever id pads.
    """

    ids: list[int]
    text: list[str]
    role: list[str]
    word: list[int]
    words: list[str]
    eos: int


def tokenize(tokenizer: Any, prompt: str) -> Tokens:
    """Tokenise a prompt to the encoder's full length.

    Words are runs of letters and digits (hyphens and apostrophes inside belong to the word) or of punctuation; a
    token belongs to the word that its characters lie in. EOS is found by position, never by id: Stable Diffusion 1
    pads with EOS, 2 with "!".

    Raises:
        InterpError: the prompt is longer than the context; the words that would be cut are named.
    """
    length = int(tokenizer.model_max_length)
    free = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [tuple(span) for span in free["offset_mapping"]]
    words = [(m.group(), m.span()) for m in WORD.finditer(prompt)]
    room = length - 2
    if len(spans) > room:
        start = spans[room][0]
        cut = prompt[next((a for _, (a, b) in words if b > start), start) :]
        raise InterpError(
            f"the prompt has {len(spans)} tokens, but the text encoder takes {room}; these words would be cut: {cut!r}; "
            "shorten the prompt"
        )
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    count = len(spans)
    eos = count + 1
    owner = [_word_at(span, words) for span in spans]
    pads = length - eos - 1
    eos_text, pad_text = str(tokenizer.eos_token), str(tokenizer.pad_token)
    return Tokens(
        ids=list(ids),
        text=[str(tokenizer.bos_token), *(prompt[a:b] for a, b in spans), eos_text, *[pad_text] * pads],
        role=["bos", *["word"] * count, "eos", *["pad"] * pads],
        word=[-1, *owner, -1, *[-1] * pads],
        words=[w for w, _ in words],
        eos=eos,
    )


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


def select_tokens(
    cond: list[Tokens], uncond: list[Tokens], tokens: str | tuple[int, ...], width: int = 0
) -> TokenSelection:
    """Choose the columns for a list of prompts, as `Capture.tokens` says.

    Args:
        cond, uncond: Tokenised prompts and negative prompts, one a sample.
        tokens: `"prompt"`, `"all"` or positions.
        width: Make at least this many columns (a run that is appended to has its width already).
    """
    n, length = len(cond), len(cond[0].ids)
    pads = None
    if tokens == "prompt":
        used = [t.eos + 1 for t in cond]
        columns = max(max(used) + 1, width)
        positions = np.full((n, columns), -1)
        pads = np.zeros((n, length), bool)
        for i, count in enumerate(used):
            positions[i, :count] = np.arange(count)
            pads[i, count:] = True
    else:
        wanted = range(length) if tokens == "all" else tokens
        wrong = [p for p in wanted if not 0 <= int(p) < length]
        if wrong:
            raise InterpError(f"Capture(tokens={list(wanted)}): the text has positions 0–{length - 1}")
        positions = np.tile(np.asarray(wanted, int), (n, 1))
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
                text[i, column], role[i, column], other[i, column] = (
                    mine.text[p],
                    mine.role[p],
                    theirs.text[p],
                )
                ids[i, column], word[i, column], count[i, column] = mine.ids[p], mine.word[p], 1
        if pads is not None and pads[i].any():
            p = int(np.argmax(pads[i]))
            text[i, -1], role[i, -1], other[i, -1] = mine.text[p], "pad", theirs.text[p]
            ids[i, -1], count[i, -1] = mine.ids[p], int(pads[i].sum())
    return TokenTable(text=text, id=ids, role=role, word=word, count=count, text_uncond=other)
