"""The paper's sets of prompts: PromptSet, the pairs of S-PromptSet, and captions for the acceleration experiment.

Three sources: the grammar of `scenes`; a folder of T2I-CompBench's text files, as in the paper; and, for other models
without that folder, a small template of our own.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from interp.errors import InterpError

EXPECTED = {"color": 800, "texture": 800, "complex": 1000}
"""Prompts of each kind in the paper's PromptSet (2,600)."""
EXPECTED_PAIRS = {"template": 2000, "complex": 1000}
"""Pairs of each kind in the paper's S-PromptSet (3,000)."""

_NO_FILLER = r"(?!(?:is|are|was|were|with|on|in|of|the|and|at|to|next)\b)"
_THING = rf"(?:an? )?{_NO_FILLER}[\w-]+(?: {_NO_FILLER}[\w-]+){{1,3}}"
TEMPLATE = re.compile(rf"{_THING} and {_THING}")
"""Two things joined by "and", each an attribute and a noun of two to four words in all, without function words. By this
rule 800 lines of the released color.txt and 800 of texture.txt are template prompts, which are the paper's counts."""

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "black", "brown", "gray", "golden")
TEXTURES = ("wooden", "metallic", "leather", "glass", "plastic", "fluffy", "rubber", "fabric")
NOUNS = (
    "apple", "backpack", "ball", "bench", "bird", "boat", "book", "bottle", "bowl", "bus", "cake", "car", "cat", "chair",
    "clock", "cup", "dog", "guitar", "hat", "horse", "house", "lamp", "mug", "pillow", "rabbit", "shoe", "sofa",
    "suitcase", "table", "teapot", "train", "truck", "umbrella", "vase", "watch",
)  # fmt: skip


@dataclass(frozen=True)
class PromptSet:
    """Prompts by kind, and what there is to say about how they were counted (one sentence a finding)."""

    template: list[str]
    complex: list[str]
    notes: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.template) + len(self.complex)

    def pairs(self, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
        """Return S-PromptSet: 2,000 pairs of template prompts and 1,000 of complex ones (A, B), as far as there are any.

        The paper does not say how prompts are paired. Here each kind is shuffled by `seed` and laid in a ring: first
        every prompt is paired with the one after it, then with the one after that, until there are enough pairs; within
        a round every second pair comes first, so that the first half of it shares no prompt. A pair never holds one
        text twice.

        >>> PromptSet(["a", "b", "c"], []).pairs()["template"][:3] == PromptSet(["a", "b", "c"], []).pairs()["template"][:3]
        True
        """
        return {kind: _ring(getattr(self, kind), number, f"{kind} {seed}") for kind, number in EXPECTED_PAIRS.items()}


def _ring(prompts: Sequence[str], number: int, seed: str) -> list[tuple[str, str]]:
    order = list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(order)
    n = len(order)
    places = [*range(0, n - 1, 2), *range(1, n, 2), *range(n - n % 2, n)]
    rounds = ((order[i], order[(i + gap) % n]) for gap in range(1, n) for i in dict.fromkeys(places))
    return list(islice(rounds, number))


def compbench(folder: str | Path) -> PromptSet:
    """Read PromptSet from a folder with color.txt, texture.txt and complex.txt of T2I-CompBench (arXiv:2307.06350).

    The template lines of the first two (see `TEMPLATE`) and all lines of the third are taken, in lower case without the
    final period. The paper has 800, 800 and 1,000; other counts are said in `notes`.

    Raises InterpError when a file is missing or has no prompt of its kind.
    """
    folder, found, notes = Path(folder), {}, []
    for kind, expected in EXPECTED.items():
        path = folder / f"{kind}.txt"
        if not path.is_file():
            raise InterpError(
                f"no {kind}.txt in {str(folder)!r}; give the folder of T2I-CompBench's prompts (examples/dataset), which "
                "holds color.txt, texture.txt and complex.txt"
            )
        lines = [line.strip().rstrip(".").strip() for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [line.lower() for line in lines if line]
        found[kind] = texts if kind == "complex" else [t for t in texts if TEMPLATE.fullmatch(t)]
        if not found[kind]:
            raise InterpError(f"{str(path)!r} has no prompt of the kind that is looked for there")
        if len(found[kind]) != expected:
            notes.append(f"{kind}.txt gives {len(found[kind])} prompts where the paper's PromptSet has {expected}.")
    return PromptSet(found["color"] + found["texture"], found["complex"], tuple(notes), "T2I-CompBench")


def template_prompts(seed: int = 0) -> PromptSet:
    """Return 1,600 template prompts "a {attribute} {noun} and a {attribute} {noun}" of our own words.

    >>> len(template_prompts()), template_prompts().template[0] == template_prompts().template[0]
    (1600, True)
    """
    rng = random.Random(f"template {seed}")
    made: dict[str, None] = {}
    for words in (COLORS, TEXTURES):
        limit = len(made) + 800
        while len(made) < limit:
            (one, other), (first, second) = rng.sample(words, 2), rng.sample(NOUNS, 2)
            made[f"{_article(one)} {one} {first} and {_article(other)} {other} {second}"] = None
    return PromptSet(list(made), [], (), "a template of our own")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def coco_captions(path: str | Path, n: int, seed: int = 0) -> list[str]:
    """Return `n` captions of a COCO annotation file (captions_val2014.json), one a picture, chosen by `seed`.

    Of each picture the caption with the smallest id is taken. Raises InterpError when the file is none, or has fewer
    pictures.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        rows = sorted((int(a["image_id"]), int(a["id"]), str(a["caption"])) for a in found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InterpError(
            f"{str(path)!r} is no COCO caption file: it must be JSON with a list 'annotations' of image_id, id and "
            f"caption, such as captions_val2014.json ({type(error).__name__}: {error})"
        ) from None
    first: dict[int, str] = {}
    for image, _, caption in rows:
        first.setdefault(image, " ".join(caption.split()))
    if len(first) < n:
        raise InterpError(f"{str(path)!r} has captions of {len(first)} pictures, {n} were asked for; ask for fewer")
    texts = list(first.values())
    random.Random(f"coco {seed}").shuffle(texts)
    return texts[:n]


def choose_pairs(
    model: str, n: int, folder: str | Path | None = None, seed: int = 0
) -> tuple[list[tuple[str, str]], str]:
    """Return `n` pairs (A, B) for exchanging EOS, and a sentence on where they come from.

    For `scenes` those of its grammar (B differs from A in every attribute it names); with a folder of T2I-CompBench
    two template pairs to each complex one; else template prompts of our own. Raises InterpError if there are not enough.
    """
    if folder is None and model == "scenes":
        from interp.scenes import pairs

        said = "Pairs of the grammar of scenes: one or two objects, B differs from A in every attribute that is named."
        return pairs(n, seed=seed), said
    made = template_prompts(seed) if folder is None else compbench(folder)
    template, complex_ = made.pairs(seed).values()
    mixed = [
        pair for k in range(max(len(template), len(complex_)))
        for pair in (*template[2 * k : 2 * k + 2], *complex_[k : k + 1])
    ]  # fmt: skip
    if len(mixed) < n:
        raise InterpError(f"{made.source} gives {len(mixed)} pairs of prompts, {n} were asked for; ask for fewer")
    said = f"Pairs from {made.source}: {len(template)} of template prompts and {len(complex_)} of complex ones, the first {n}."
    return mixed[:n], " ".join([said, *made.notes])
