"""Tokens of a prompt as the text encoder sees them: text, role and word of each position."""

import re
from dataclasses import dataclass
from typing import Any

from interp.errors import InterpError

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
