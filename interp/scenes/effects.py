"""The paper's effects on the model organism: text removed, words or EOS alone, EOS exchanged.

As everywhere in `quality`, with a sampling loop written out: no part of interp's tracing takes part.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from interp.scenes.bench import Bench, told
from interp.scenes.captions import pairs, prompts
from interp.scenes.marked import Figures, Table


def removal(bench: Bench) -> Table:
    """Use ε(∅) alone in the last, or the first, share of the steps."""
    asked = prompts(bench.n // 2, 1, seed=3) + prompts(bench.n // 2, 2, seed=3)
    text = bench.model.read(asked)
    cases: dict[str, Any] = {"all text": lambda part: True, "no text": lambda part: False}
    for share in (0.2, 0.4, 0.6, 0.8):
        cases[f"without the last {share:.0%}"] = lambda part, share=share: part < 1 - share - 1e-6
    for share in (0.2, 0.4):
        cases[f"without the first {share:.0%}"] = lambda part, share=share: part >= share - 1e-6
    return _compared(bench, {name: bench.generate(text, uses=uses) for name, uses in cases.items()}, asked)


def parts(bench: Bench) -> Table:
    """Zero the embeddings of words, or of EOS and padding."""
    asked = prompts(bench.n // 2, 1, seed=3) + prompts(bench.n // 2, 2, seed=3)
    text = bench.model.read(asked)
    cases = {"words and EOS": (True, True), "words only": (True, False), "EOS only": (False, True)}
    cases["BOS only"] = (False, False)
    return _compared(bench, {name: bench.generate(text.only(*kept)) for name, kept in cases.items()}, asked)


def _compared(bench: Bench, pictures: dict[str, Tensor], asked: Sequence[str]) -> Table:
    """Return what the judges say of each case, and what it changes against the first, picture by picture."""
    whole, *_ = pictures.values()
    before, found = bench.agreement(whole, asked), Table()
    for name, images in pictures.items():
        agreement = bench.agreement(images, asked)
        found[name] = {
            "agreement": told(agreement),
            "change of it": told(agreement - before),
            "CLIP": bench.alignment(images, asked),
            "L1 to the first row": told((images - whole).abs().mean((1, 2, 3)) / 2),
        }
    return found


def exchange(bench: Bench) -> Table:
    """Give A's words B's EOS and padding, and ask whether A or B is in the picture."""
    both = pairs(bench.n, seed=4)
    first, second = [a for a, _ in both], [b for _, b in both]
    a, b = bench.model.read(first), bench.model.read(second)
    found: Table = {}
    for name, text in (("A", a), ("words of A, EOS of B", a.with_eos_of(b))):
        images = bench.generate(text)
        words, eos = bench.agreement(images, first), bench.agreement(images, second)
        figures: Figures = {"agreement with A": told(words), "agreement with B": told(eos), "B − A": told(eos - words)}
        figures |= {"CLIP with A": bench.alignment(images, first), "CLIP with B": bench.alignment(images, second)}
        source, target = bench.by_attribute(images, first), bench.by_attribute(images, second)
        for attribute in ("shape", "color", "pattern", "size", "relation", "background"):
            figures |= {f"{attribute} of A": source[attribute], f"{attribute} of B": target[attribute]}
        found[name] = figures
    return found
