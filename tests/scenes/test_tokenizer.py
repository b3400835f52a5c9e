"""The tokenizer: CLIP's format, read by transformers, any text, some words in pieces."""

import pytest
from transformers import CLIPTokenizer

from interp.scenes import captions, draw
from interp.scenes.bpe import BOS, EOS, PIECES, Encoder, learn, write_tokenizer
from interp.scenes.grammar import WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, WORDS)
    return CLIPTokenizer.from_pretrained(folder)


def test_words_split_as_said(tokenizer):
    for word in WORDS:
        *heads, tail = PIECES.get(word, (word,))
        assert tokenizer.tokenize(word) == [*heads, tail + "</w>"], word


def test_any_text_survives(tokenizer):
    text = "zebra's 42 naïve, 東京 🙂!"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_padding_is_eos_to_77(tokenizer):
    ids = tokenizer("A red circle", padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert tokenizer.convert_ids_to_tokens(ids[:5]) == [BOS, "a</w>", "red</w>", "circle</w>", EOS]
    assert set(ids[4:]) == {tokenizer.pad_token_id}


def test_training_encodes_as_the_pipeline(tokenizer):
    encode = Encoder(WORDS)
    for caption in draw(64, seed=5).captions + captions.prompts(20, 2):
        assert encode(caption) == tokenizer(caption, padding="max_length", truncation=True).input_ids


def test_pieces_that_cannot_be_are_refused():
    with pytest.raises(AssertionError, match="choose other pieces"):
        learn(["red"], {"red": ("r", "ead")})
