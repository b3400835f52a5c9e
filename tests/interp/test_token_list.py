"""Packed tokens and the columns chosen of them, against plain lists."""

import numpy as np
import pytest

from interp.errors import InterpError
from interp.token_choice import choose_tokens
from interp.token_columns import select_tokens
from interp.token_list import TokenList, read_prompts
from interp.tokens import tokenize
from tests.families.pipelines import t5_tokenizer, tokenizer

PROMPTS = ["a red circle", "two small stripes", "", "a red circle on the background", "a red circle"]
OTHERS = ["", "a cat", "", "a dog", ""]


def lists(pad):
    """Prompts and negative prompts, packed, and as plain lists."""
    padded, ragged = tokenizer(), t5_tokenizer()

    def read(text):
        return tokenize(padded, text) if pad else tokenize(ragged, text, 30, pad=False)

    return [(TokenList(texts, read), [read(t) for t in texts]) for texts in (PROMPTS, OTHERS)]


def labels(plain, others, i, positions, sums):
    """The six labels of a sample's columns, one after the other."""
    found = []
    for column, p in enumerate(positions):
        summed = sums if column == len(positions) - 1 else []
        at = summed[0] if summed else p
        if at < 0:
            found.append(("", -1, "", -1, 0, ""))
            continue
        t, o = plain[i], others[i].text
        found.append((t.text[at], t.ids[at], t.role[at], t.word[at], len(summed) or 1, o[at] if at < len(o) else ""))
    return found


@pytest.mark.parametrize("pad", [True, False])
def test_a_list_gives_back_what_it_was_given(pad):
    for packed, plain in lists(pad):
        assert list(packed) == plain and packed[1:3] == plain[1:3]
        assert packed.lengths.tolist() == [len(t.ids) for t in plain]
        assert packed.count_of("pad").tolist() == [t.role.count("pad") for t in plain]
        assert list(packed.after(2)) == [plain[0], plain[0], *plain]


def test_a_text_is_read_once():
    asked = []

    def read(text):
        asked.append(text)
        return tokenize(tokenizer(), text)

    known = TokenList(PROMPTS, read)
    assert sorted(asked) == sorted(set(PROMPTS))
    again = TokenList([*PROMPTS[::-1], "a cat"], read, known)
    assert asked[4:] == ["a cat"] and list(again)[:5] == list(known)[::-1]


def test_rows_with_too_long_prompts_are_named_all():
    texts = ["a cat", "a red circle on a square", "a dog", "a red circle on a dog", "a red circle on a square"]
    with pytest.raises(InterpError, match=r"^row 1 of the prompt table: .*\(likewise in 2 more: 3, 4\)$"):
        read_prompts(texts, lambda text: tokenize(t5_tokenizer(), text, 5))


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("width", [0, 90])
@pytest.mark.parametrize("wanted", ["prompt", "all", (0, 2), ("red", "eos"), ("a", "pad", 9)])
def test_columns_are_those_of_each_prompt_by_itself(pad, width, wanted):
    (cond, plain), (uncond, others) = lists(pad)
    if wanted == ("a", "pad", 9) and not pad:
        wanted = ("a", "pad")  # no text has so many positions
    named = isinstance(wanted, tuple) and any(isinstance(w, str) for w in wanted)
    rows = [{"prompt": p} for p in PROMPTS]
    chosen = choose_tokens(wanted, cond, uncond, rows, width) if named else select_tokens(cond, uncond, wanted, width)
    table = {name: np.asarray(values) for name, (_, values) in chosen.table.coords().items()}
    for i, tokens in enumerate(plain):
        length = len(tokens.ids)
        pads = [p for p, role in enumerate(tokens.role) if role == "pad"]
        if wanted == "prompt":
            kept, sums = [p for p in range(length) if p not in pads], pads
        elif wanted == "all":
            kept, sums = list(range(length)), []
        elif not named:
            kept, sums = [p if p < length else -1 for p in wanted], []
        else:
            words = [p for p, w in enumerate(tokens.word) if w >= 0 and tokens.words[w] in wanted]
            eos = [tokens.eos] if "eos" in wanted else []
            kept = sorted({*words, *eos, *(w for w in wanted if isinstance(w, int))})
            sums = [p for p in pads if p not in kept] if "pad" in wanted else []
        positions = [*kept, *[-1] * (chosen.width - len(kept))]
        assert chosen.of([i]).positions.tolist() == [positions]
        assert (chosen.pads is None) == (wanted != "prompt" and "pad" not in wanted)
        if chosen.pads is not None:
            assert np.flatnonzero(chosen.of([i]).pads[0]).tolist() == sums
        got = list(zip(*(values[i].tolist() for values in table.values()), strict=True))
        assert got == labels(plain, others, i, positions, sums)
    assert chosen.width >= width or (not named and wanted == (0, 2))
