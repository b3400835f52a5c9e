"""Measure the model organism: `python -m interp.scenes.quality --out quality.json` prints tables and writes JSON.

Everything is measured on seeds that training never used, with a sampling loop written out (`sampling.py`): no
part of interp's tracing takes part. CLIP pools its text at EOS, so what is said about EOS is said by the judge.
What it wrote for the weights that ship is `weights/quality.json`, and `card.py` puts its tables into the model card.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.scenes import DEFAULT_GUIDANCE, folder
from interp.scenes.captions import pairs, prompts
from interp.scenes.grammar import BACKGROUNDS, COLORS, INVERSE, Scene, agreement_of, matched, paired, parse
from interp.scenes.sampling import Generator
from interp.scenes.scoring import Scorer, to_tensor
from interp.scenes.world import BACKGROUND_INK, COLOR_INK, draw

Table = dict[str, dict[str, float]]


class Bench:
    """A generator with its two judges, and what is measured with them."""

    def __init__(self, source: Path, device: str, n: int, steps: int, guidance: float) -> None:
        self.model, self.scorer = Generator(source, device), Scorer.of(source, device)
        self.device, self.n, self.steps, self.guidance = device, n, steps, guidance

    def generate(self, text: Any, **options: Any) -> Tensor:
        """Return pictures at the bench's steps and guidance, or those of `options`."""
        return self.model(text, **{"steps": self.steps, "guidance": self.guidance, **options})

    def agreement(self, images: Tensor, asked: Sequence[str]) -> float:
        """Return the mean share of the attributes named that the judge sees."""
        seen = self.scorer.judge(images)
        return float(np.mean([agreement_of(parse(p), s) for p, s in zip(asked, seen, strict=True)]))

    def by_attribute(self, images: Tensor, asked: Sequence[str]) -> dict[str, float]:
        """Return for each attribute how often it is seen where it is named, and how often all of them are."""
        answers: dict[str, list[bool]] = defaultdict(list)
        for prompt, seen in zip(asked, self.scorer.judge(images), strict=True):
            found = matched(parse(prompt), seen)
            for (_, name), right in found.items():
                answers[name].append(right)
            named = [right for (_, name), right in found.items() if name in ("color", "shape")]
            answers["color and shape of all objects"].append(all(named))
            answers["everything named"].append(all(found.values()))
        return {name: float(np.mean(rights)) for name, rights in answers.items()}

    @torch.no_grad()
    def autoencoded(self, images: Tensor) -> Tensor:
        """Return the pictures after the autoencoder, (n, rgb, y, x) on the CPU."""
        vae = self.model.vae
        parts = [part.to(self.device) for part in images.split(64)]
        return torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1).cpu() for p in parts])

    def renders(self) -> Table:
        """Measure the autoencoder, and CLIP's retrieval of a true caption among 1,024, on held-out renders."""
        drawn = draw(1024, seed=1, full=True)
        images = to_tensor(drawn.images)
        again = self.autoencoded(images[:256])
        decibel = 10 * torch.log10(4 / (again - images[:256]).square().mean((1, 2, 3)))
        vectors = self.scorer.picture_vectors(images)
        found: Table = {"autoencoder, PSNR in dB": {"value": float(decibel.mean())}}
        loose = draw(1024, seed=1)  # the same pictures under captions that leave attributes out
        for name, captions in (("full captions", drawn.captions), ("captions as in training", loose.captions)):
            best = (vectors @ self.scorer.text_vectors(captions).T).argmax(-1).tolist()
            told = [parse(captions[j]) for j in best]
            right = [agreement_of(t, s) == 1 for t, s in zip(told, drawn.scenes, strict=True)]
            found[f"CLIP, 1024-way retrieval, {name}"] = {"value": float(np.mean(right))}
        return found

    def judged(self) -> Table:
        """Measure the judge on held-out renders, as they are and autoencoded."""
        drawn = draw(1024, seed=1, full=True)
        images = to_tensor(drawn.images)
        return {
            "1,024 renders": self.by_attribute(images, drawn.captions),
            "256 of them, autoencoded": self.by_attribute(self.autoencoded(images[:256]), drawn.captions[:256]),
        }

    def generated(self) -> Table:
        """Measure pictures of one and of two objects against their prompts."""
        found: Table = {}
        for objects, name in ((1, "one object"), (2, "two objects")):
            asked = prompts(self.n, objects, seed=1)
            images = self.generate(self.model.read(asked))
            found[name] = {
                **self.by_attribute(images, asked),
                "CLIP alignment": float(self.scorer.alignment(images, asked).mean()),
                "stains (share of pixels)": stains(images, self.scenes(images, asked)),
            }
        return found

    def places(self) -> Table:
        """Take the relation apart: is the axis right, and who stands first, however the attributes fell?"""
        asked = prompts(self.n, 2, seed=1)
        seen = self.scorer.judge(self.generate(self.model.read(asked)))
        axes, orders = [], []
        for named, verdict in zip(map(parse, asked), seen, strict=True):
            relation = paired(replace(named, relation=None), verdict).relation
            axes.append(relation in (named.relation, INVERSE[str(named.relation)]))
            if axes[-1]:
                orders.append(relation == named.relation)
        return {
            "axis right": {"share": float(np.mean(axes)), "of pictures": len(axes)},
            "order right where the axis is": {"share": float(np.mean(orders)), "of pictures": len(orders)},
        }

    def backgrounds(self) -> Table:
        """Say for each background how often it comes out as asked, from the first timestep that ships and from the last."""
        asked = [p for p in prompts(2 * self.n, 1, seed=1) if parse(p).background is not None]
        names = np.array([parse(p).background for p in asked])
        found: Table = {}
        for spacing in ("leading", "trailing"):
            seen = self.scorer.judge(self.generate(self.model.read(asked), spacing=spacing))
            right = np.array([v.background for v in seen]) == names
            found[f"{spacing} timesteps"] = {b: float(right[names == b].mean()) for b in BACKGROUNDS if b in names}
        return {**found, "pictures": {b: int((names == b).sum()) for b in BACKGROUNDS}}

    def scenes(self, images: Tensor, asked: Sequence[str]) -> list[Scene]:
        """Return what is asked, with the judge's background where none is asked."""
        seen = self.scorer.judge(images)
        named = [parse(p) for p in asked]
        return [Scene(a.objects, a.background or s.background) for a, s in zip(named, seen, strict=True)]

    def settings(self) -> Table:
        """Try steps and guidance scales."""
        asked = prompts(self.n // 2, 1, seed=2) + prompts(self.n // 2, 2, seed=2)
        text = self.model.read(asked)
        found: Table = {}
        for steps in (20, 30, 50):
            for guidance in (1.5, 2.0, 3.0, 4.0, 5.0, 7.5):
                images = self.generate(text, steps=steps, guidance=guidance)
                found[f"{steps} steps, guidance {guidance}"] = {
                    "agreement": self.agreement(images, asked),
                    "color and shape": self.by_attribute(images, asked)["color and shape of all objects"],
                    "CLIP": float(self.scorer.alignment(images, asked).mean()),
                    "stains": stains(images, self.scenes(images, asked)),
                }
        return found

    def removal(self) -> Table:
        """Use ε(∅) alone in the last, or the first, share of the steps."""
        asked = prompts(self.n // 2, 1, seed=3) + prompts(self.n // 2, 2, seed=3)
        text = self.model.read(asked)
        whole = self.generate(text)
        cases: dict[str, Any] = {"all text": lambda part: True, "no text": lambda part: False}
        for share in (0.2, 0.4, 0.6, 0.8):
            cases[f"without the last {share:.0%}"] = lambda part, share=share: part < 1 - share - 1e-6
        for share in (0.2, 0.4):
            cases[f"without the first {share:.0%}"] = lambda part, share=share: part >= share - 1e-6
        return {name: self._against(self.generate(text, uses=uses), asked, whole) for name, uses in cases.items()}

    def parts(self) -> Table:
        """Zero the embeddings of words, or of EOS and padding."""
        asked = prompts(self.n // 2, 1, seed=3) + prompts(self.n // 2, 2, seed=3)
        text = self.model.read(asked)
        whole = self.generate(text)
        cases = {"words and EOS": (True, True), "words only": (True, False), "EOS only": (False, True)}
        cases["BOS only"] = (False, False)
        return {
            name: self._against(self.generate(text.only(words, eos)), asked, whole)
            for name, (words, eos) in cases.items()
        }

    def _against(self, images: Tensor, asked: Sequence[str], whole: Tensor) -> dict[str, float]:
        return {
            "agreement": self.agreement(images, asked),
            "CLIP": float(self.scorer.alignment(images, asked).mean()),
            "L1 to all text": float((images - whole).abs().mean() / 2),
        }

    def exchange(self) -> Table:
        """Give A's words B's EOS and padding, and ask whether A or B is in the picture."""
        both = pairs(self.n, seed=4)
        first, second = [a for a, _ in both], [b for _, b in both]
        a, b = self.model.read(first), self.model.read(second)
        found: Table = {}
        for name, text in (("A", a), ("words of A, EOS of B", a.with_eos_of(b))):
            images = self.generate(text)
            source, target = self.by_attribute(images, first), self.by_attribute(images, second)
            found[name] = {
                "agreement with A": self.agreement(images, first),
                "agreement with B": self.agreement(images, second),
                "CLIP with A": float(self.scorer.alignment(images, first).mean()),
                "CLIP with B": float(self.scorer.alignment(images, second).mean()),
            }
            for attribute in ("shape", "color", "pattern", "size", "relation", "background"):
                found[name] |= {f"{attribute} of A": source[attribute], f"{attribute} of B": target[attribute]}
        return found


def stains(images: Tensor, scenes: Sequence[Scene]) -> float:
    """Return the share of pixels whose color is that of neither background nor objects, in any of their shades."""
    shares = []
    pixels = (images.permute(0, 2, 3, 1) + 1) / 2
    for picture, scene in zip(pixels, scenes, strict=True):
        inks = [(BACKGROUND_INK[BACKGROUNDS.index(str(scene.background))], 0.65, 1.35)]
        for thing in scene.objects:
            if thing.color is not None:
                ink = COLOR_INK[COLORS.index(thing.color)]
                inks.append(([0.51] * 3, 0.0, 1.1) if thing.color == "black" else (ink, 0.25, 1.2))
        far = []
        for ink, low, high in inks:
            color = torch.tensor(ink)
            shade = (picture @ color / (color @ color)).clamp(low, high)
            far.append((picture - shade[..., None] * color).norm(dim=-1))
        shares.append(float((torch.stack(far).amin(0) > 0.2).float().mean()))
    return float(np.mean(shares))


def markdown(table: Table) -> str:
    """Return the table as Markdown, its longer side down; a figure that a case does not have is a dash.

    >>> print(markdown({"a": {"x": 1.0, "y": 2, "z": 0.5}, "b": {"x": 0.25}}), end="")
    | | a | b |
    |---|---:|---:|
    | x | 1.000 | 0.250 |
    | y | 2 | – |
    | z | 0.500 | – |
    """
    cases, figures = list(table), list(dict.fromkeys(name for row in table.values() for name in row))
    down, across = (figures, cases) if len(figures) > len(cases) else (cases, figures)
    lines = ["| | " + " | ".join(across) + " |", "|---|" + "---:|" * len(across)]
    for name in down:
        cells = [table[c].get(f) for c, f in ((other, name) if down is figures else (name, other) for other in across)]
        lines.append(f"| {name} | " + " | ".join(_cell(value) for value in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "–" if value is None or value != value else str(value) if isinstance(value, int) else f"{value:.3f}"


MEASURES = {
    "renders": "Autoencoder and CLIP on held-out renders",
    "judged": "The judge on held-out renders",
    "generated": "Generated pictures, by the judge",
    "places": "Two objects: axis and order",
    "backgrounds": "Backgrounds as asked",
    "settings": "Steps and guidance",
    "removal": "Text removed in a part of the steps",
    "parts": "Words or EOS alone",
    "exchange": "EOS exchanged between prompts",
}


def main(given: list[str] | None = None) -> None:
    """Measure what is asked for, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m interp.scenes.quality", description=__doc__)
    parser.add_argument("measures", nargs="*", help=f"which; all: {' '.join(MEASURES)}")
    parser.add_argument("--folder", type=Path, default=folder())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, default=256, help="pictures of each condition")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    asked = parser.parse_args(given)
    unknown = [name for name in asked.measures if name not in MEASURES]
    if unknown:
        parser.error(f"no measure {unknown[0]!r}; there are {', '.join(MEASURES)}")
    bench = Bench(asked.folder, asked.device, asked.n, asked.steps, asked.guidance)
    device = torch.cuda.get_device_name() if asked.device.startswith("cuda") else asked.device
    about = {"n": asked.n, "steps": asked.steps, "guidance": asked.guidance, "device": device}
    tables: dict[str, Table] = {}
    for name in asked.measures or MEASURES:
        started = time.monotonic()
        tables[MEASURES[name]] = getattr(bench, name)()
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.write(f"\n#### {MEASURES[name]}\n\n{markdown(tables[MEASURES[name]])}")
        sys.stdout.flush()
        if asked.out:  # after each measure: a run that is cut off has said what it knew
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps({"settings": about, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
