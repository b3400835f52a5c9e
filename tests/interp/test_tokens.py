"""Tokens of every kind of tokenizer: text, role and word of each position."""

import pytest
from transformers import T5Tokenizer

import interp
from interp.tokens import join, tokenize
from tests.families.pipelines import t5_tokenizer, tokenizer


def test_t5_has_no_bos_and_one_eos():
    tokens = tokenize(t5_tokenizer(), "a red background", 8)
    assert tokens.text == ["a", "red", "back", "ground", "</s>", "<pad>", "<pad>", "<pad>"]
    assert tokens.role == ["word"] * 4 + ["eos", "pad", "pad", "pad"] and tokens.eos == 4
    assert tokens.word == [0, 1, 2, 2, -1, -1, -1, -1]
    assert tokens.ids == list(t5_tokenizer()("a red background", padding="max_length", max_length=8).input_ids)


def test_a_space_is_no_letter():
    """A word that begins with no known piece begins with a bare space, which belongs to it and has no text."""
    letters = T5Tokenizer(vocab=[(p, -1.0) for p in ["<pad>", "</s>", "<unk>", "▁", *"abcdest"]], extra_ids=0)
    tokens = tokenize(letters, "cat sat", 12)
    assert tokens.text[:8] == ["", "c", "a", "t", "", "s", "a", "t"]
    assert tokens.word[:8] == [0] * 4 + [1] * 4


def test_templates_are_told_from_the_prompt():
    text = "a red circle"
    whole = tokenize(tokenizer(), text, prefix="photo of ", suffix=" on the background", pad=False)
    roles = [f"{t}:{r}" for t, r in zip(whole.text, whole.role, strict=True) if r in ("word", "template")]
    assert roles == [
        "photo:template", "of:template", "a:word", "red:word", "circle:word", "on:template", "the:template",
        "back:template", "ground:template",
    ]  # fmt: skip
    assert [whole.words[w] for w in whole.word if w >= 0] == text.split()
    assert whole.role[-1] == "eos"  # no padding


def test_encoders_after_each_other():
    clip, t5 = tokenize(tokenizer(), "a red circle"), tokenize(t5_tokenizer(), "a red circle", 10)
    both = join(clip, t5)
    assert len(both.ids) == 87 and both.eos == clip.eos
    assert both.part(slice(0, 77)) == clip and both.part(slice(77, None)) == t5


@pytest.mark.parametrize("length", [4, 5])
def test_what_would_be_cut(length):
    with pytest.raises(interp.InterpError, match=r"takes 4|takes 3") as caught:
        tokenize(t5_tokenizer(), "a red circle on a square", length)
    assert ("'on a square'" if length == 4 else "'a square'") in str(caught.value)


def test_padding_lies_where_the_tokenizer_puts_it():
    left = t5_tokenizer()
    left.padding_side = "left"
    found = tokenize(left, "a red circle", 8)
    assert found.ids == left("a red circle", padding="max_length", max_length=8)["input_ids"]
    assert found.role == ["pad"] * 4 + ["word"] * 3 + ["eos"] and found.eos == 7 and found.word[4:7] == [0, 1, 2]


def test_a_template_around_the_prompt():
    """The template's own words are no words of the prompt, also where the prompt repeats them."""
    tok = tokenizer()
    found = tokenize(tok, "a red circle", 20, prefix="a red photo of ", suffix=" on the background")
    want = tok("a red photo of a red circle on the background", padding="max_length", max_length=20)["input_ids"]
    assert found.ids == want
    assert found.role == ["bos", *["template"] * 4, *["word"] * 3, *["template"] * 4, "eos", *["pad"] * 7]
    assert [found.words[w] for w in found.word if w >= 0] == ["a", "red", "circle"]
    with pytest.raises(interp.InterpError, match="end of the model's own words would be cut"):
        tokenize(tok, "a red circle", 10, prefix="a red photo of ", suffix=" on the background")
