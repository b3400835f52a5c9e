"""A byte-pair tokenizer in CLIP's format, small enough to read: some words of the world are several tokens.

A learned vocabulary would leave which words split to chance. Here it is said: `PIECES` lists the words that
split, every other word of the world is one token, and anything else falls back to the byte alphabet, so any
text can be encoded.
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

BOS, EOS, END, POSITIONS = "<|startoftext|>", "<|endoftext|>", "</w>", 77

# Words that are more than one token, so that merging tokens into words is always exercised.
PIECES: dict[str, tuple[str, ...]] = {
    "checkered": ("check", "ered"),
    "triangle": ("tri", "angle"),
    "background": ("back", "ground"),
    "painting": ("paint", "ing"),
    "purple": ("pur", "ple"),
    "dotted": ("dot", "ted"),
}


def byte_alphabet() -> list[str]:
    """Return GPT-2's 256 printable stand-ins for the bytes, in the order of their ids in CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn(words: Iterable[str], pieces: dict[str, tuple[str, ...]] | None = None) -> list[tuple[str, str]]:
    """Return the merges, first to last, that join each word to one token, or to its `pieces`, and no further.

    Byte-pair learning on a list of words, the commonest pair first, with one addition: a pair that would join
    two pieces of a word is never merged. Encoding applies merges in the order in which they were learned, so a
    word comes out exactly as it was left here.

    >>> learn(["red"], {})
    [('r', 'e'), ('re', 'd</w>')]
    """
    asked = PIECES if pieces is None else pieces
    wanted = {word: asked.get(word, (word,)) for word in words}
    segments = {word: symbols_of(word) for word in wanted}
    table: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        barred: set[tuple[str, str]] = set()
        for word, symbols in segments.items():
            borders = {sum(map(len, wanted[word][: i + 1])) for i in range(len(wanted[word]) - 1)}
            at = 0
            for pair in pairwise(symbols):
                at += len(pair[0])
                counts[pair] = counts.get(pair, 0) + 1
                if at in borders:
                    barred.add(pair)
        open_pairs = [pair for pair in counts if pair not in barred]
        if not open_pairs:
            break
        best = max(open_pairs, key=lambda pair: counts[pair])
        table.append(best)
        segments = {word: merged(symbols, best) for word, symbols in segments.items()}
    for word, symbols in segments.items():
        if symbols != [*wanted[word][:-1], wanted[word][-1] + END]:
            raise AssertionError(f"{word!r} comes out as {symbols}, not as {wanted[word]}: choose other pieces")
    return table


def symbols_of(word: str) -> list[str]:
    """Split a word into the symbols from which merging starts: its letters, the last one carrying </w>.

    >>> symbols_of("red")
    ['r', 'e', 'd</w>']
    """
    return [*word[:-1], word[-1] + END]


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Return `symbols` with each occurrence of `pair`, from the left, joined into one.

    >>> merged(["r", "e", "d</w>"], ("r", "e"))
    ['re', 'd</w>']
    """
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def vocabulary(
    words: Iterable[str], pieces: dict[str, tuple[str, ...]] | None = None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's two tables: token → id (bytes, bytes at a word's end, merged tokens, BOS, EOS) and merges."""
    table = learn(words, pieces)
    letters = byte_alphabet()
    tokens = [*letters, *(c + END for c in letters), *dict.fromkeys(a + b for a, b in table), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, table


def write_tokenizer(folder: Path, words: Iterable[str], pieces: dict[str, tuple[str, ...]] | None = None) -> None:
    """Write `folder` as a genuine CLIPTokenizer: vocab.json, merges.txt and the two configuration files."""
    ids, table = vocabulary(words, pieces)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in table)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": POSITIONS,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


class Encoder:
    """Text of the world → token ids with BOS, padded with EOS: what CLIPTokenizer gives, without loading it.

    >>> encode = Encoder(["a", "red"])
    >>> encode("a red")[:4] == [encode.ids[t] for t in (BOS, "a</w>", "red</w>", EOS)]
    True
    """

    def __init__(self, words: Iterable[str], pieces: dict[str, tuple[str, ...]] | None = None) -> None:
        self.ids, self.table = vocabulary(words, pieces)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str, length: int = POSITIONS) -> list[int]:
        """Return `length` ids; text that does not fit is cut, as a pipeline does it."""
        found = [i for word in re.findall(r"[a-z]+|[^\sa-z]+", text.lower()) for i in self._word(word)]
        found = [self.ids[BOS], *found[: length - 2]]
        return found + [self.ids[EOS]] * (length - len(found))

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            symbols = symbols_of(word)
            for pair in self.table:
                symbols = merged(symbols, pair)
            self._known[word] = [self.ids[symbol] for symbol in symbols]
        return self._known[word]
