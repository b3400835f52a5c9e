"""Measure the model organism: `python -m interp.scenes.quality --out quality.json` prints tables and writes JSON.

Everything is measured on seeds that training never used, with a sampling loop written out (`sampling.py`): no
part of interp's tracing takes part. CLIP pools its text at EOS, so what is said about EOS is said by the judge.
What it wrote for the weights that ship is `weights/quality.json`, and `card.py` puts its tables into the model card.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from interp.scenes import DEFAULT_GUIDANCE, folder
from interp.scenes.bench import Bench, stains, told
from interp.scenes.captions import caption, exchanged, prompts
from interp.scenes.effects import exchange, parts, removal
from interp.scenes.grammar import BACKGROUNDS, INVERSE, agreement_of, paired, parse
from interp.scenes.marked import Table, markdown
from interp.scenes.scoring import to_tensor
from interp.scenes.world import draw


@torch.no_grad()
def _autoencoded(bench: Bench, images: Tensor) -> Tensor:
    """Return the pictures after the autoencoder, (n, rgb, y, x) on the CPU."""
    vae = bench.model.vae
    parts = [part.to(bench.device) for part in images.split(64)]
    return torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1).cpu() for p in parts])


def renders(bench: Bench) -> Table:
    """Measure the autoencoder, and CLIP's retrieval of a true caption among 1,024, on held-out renders."""
    drawn = draw(1024, seed=1, full=True)
    images = to_tensor(drawn.images)
    again = _autoencoded(bench, images[:256])
    decibel = 10 * torch.log10(4 / (again - images[:256]).square().mean((1, 2, 3)))
    vectors = bench.scorer.picture_vectors(images)
    found: Table = {"autoencoder, PSNR in dB": {"value": told(decibel)}}
    loose = draw(1024, seed=1)  # the same pictures under captions that leave attributes out
    for name, captions in (("full captions", drawn.captions), ("captions as in training", loose.captions)):
        best = (vectors @ bench.scorer.text_vectors(captions).T).argmax(-1).tolist()
        right = [agreement_of(parse(captions[j]), s) == 1 for j, s in zip(best, drawn.scenes, strict=True)]
        found[f"CLIP, 1024-way retrieval, {name}"] = {"value": told(right)}
    return found


def apart(bench: Bench) -> Table:
    """Ask CLIP which of two captions is a render's: the right one, or one of nearly the same words that says something else.

    Beside it, how far apart the text encoder's states of the two lie, as a part of their norm: the UNet is given nothing else.
    """
    drawn = draw(1024, seed=1, full=True)
    here = [i for i, scene in enumerate(drawn.scenes) if len(scene.objects) == 2]
    vectors = bench.scorer.picture_vectors(to_tensor(drawn.images[here]))
    scenes = [drawn.scenes[i] for i in here]
    found: Table = {}
    for name, others in (
        ("relation turned", [replace(s, relation=INVERSE[str(s.relation)]) for s in scenes]),
        *((f"{name}s exchanged", [exchanged(s, name) for s in scenes]) for name in ("color", "shape")),
    ):
        captions = [[caption(s, random.Random(0), plain=1.0) for s in said] for said in (scenes, others)]
        right, wrong = ((vectors * bench.scorer.text_vectors(said)).sum(-1).float().cpu() for said in captions)
        states, changed = (bench.model.read(said).embedding.float().cpu().flatten(1) for said in captions)
        differ = np.array([a != b for a, b in zip(scenes, others, strict=True)])
        found[name] = {
            "told apart": told((right > wrong).numpy()[differ]),
            "cosine, difference": told((right - wrong).numpy()[differ]),
            "states, difference": told(((states - changed).norm(dim=1) / states.norm(dim=1)).numpy()[differ]),
            "pictures": int(differ.sum()),
        }
    return found


def judged(bench: Bench) -> Table:
    """Measure the judge on held-out renders, as they are and autoencoded."""
    drawn = draw(1024, seed=1, full=True)
    images = to_tensor(drawn.images)
    return {
        "1,024 renders": bench.by_attribute(images, drawn.captions),
        "256 of them, autoencoded": bench.by_attribute(_autoencoded(bench, images[:256]), drawn.captions[:256]),
    }


def generated(bench: Bench) -> Table:
    """Measure pictures of one and of two objects against their prompts."""
    found: Table = {}
    for objects, name in ((1, "one object"), (2, "two objects")):
        asked = prompts(bench.n, objects, seed=1)
        images = bench.generate(bench.model.read(asked))
        found[name] = {
            **bench.by_attribute(images, asked),
            "CLIP alignment": bench.alignment(images, asked),
            "stains (share of pixels)": told(stains(images, bench.scenes(images, asked))),
        }
    return found


def places(bench: Bench) -> Table:
    """Take the relation apart: is the axis right, and who stands first, however the attributes fell?"""
    asked = prompts(bench.n, 2, seed=1)
    seen = bench.scorer.judge(bench.generate(bench.model.read(asked)))
    axes, orders = [], []
    for named, verdict in zip(map(parse, asked), seen, strict=True):
        relation = paired(replace(named, relation=None), verdict).relation
        axes.append(relation in (named.relation, INVERSE[str(named.relation)]))
        if axes[-1]:
            orders.append(relation == named.relation)
    return {
        "axis right": {"share": told(axes), "of pictures": len(axes)},
        "order right where the axis is": {"share": told(orders), "of pictures": len(orders)},
    }


def backgrounds(bench: Bench) -> Table:
    """Say for each background how often it comes out as asked, from the first timestep that ships and from the last."""
    asked = [p for p in prompts(2 * bench.n, 1, seed=1) if parse(p).background is not None]
    names = np.array([parse(p).background for p in asked])
    found: Table = {}
    for spacing in ("leading", "trailing"):
        seen = bench.scorer.judge(bench.generate(bench.model.read(asked), spacing=spacing))
        right = np.array([v.background for v in seen]) == names
        found[f"{spacing} timesteps"] = {b: told(right[names == b]) for b in BACKGROUNDS if b in names}
    return {**found, "pictures": {b: int((names == b).sum()) for b in BACKGROUNDS}}


def settings(bench: Bench) -> Table:
    """Try steps and guidance scales."""
    asked = prompts(bench.n // 2, 1, seed=2) + prompts(bench.n // 2, 2, seed=2)
    text = bench.model.read(asked)
    found: Table = {}
    for steps in (20, 30, 50):
        for guidance in (1.5, 2.0, 3.0, 4.0, 5.0, 7.5):
            images = bench.generate(text, steps=steps, guidance=guidance)
            found[f"{steps} steps, guidance {guidance}"] = {
                "agreement": told(bench.agreement(images, asked)),
                "color and shape": bench.by_attribute(images, asked)["color and shape of all objects"],
                "CLIP": bench.alignment(images, asked),
                "stains": told(stains(images, bench.scenes(images, asked))),
            }
    return found


MEASURES = {
    "renders": ("Autoencoder and CLIP on held-out renders", renders),
    "judged": ("The judge on held-out renders", judged),
    "generated": ("Generated pictures, by the judge", generated),
    "places": ("Two objects: axis and order", places),
    "apart": ("Captions that CLIP tells apart", apart),
    "backgrounds": ("Backgrounds as asked", backgrounds),
    "settings": ("Steps and guidance", settings),
    "removal": ("Text removed in a part of the steps", removal),
    "parts": ("Words or EOS alone", parts),
    "exchange": ("EOS exchanged between prompts", exchange),
}
"""Name → title of its table, and what measures it."""


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
        title, measure = MEASURES[name]
        tables[title] = measure(bench)
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
        sys.stdout.write(f"\n#### {title}\n\n{markdown(tables[title])}")
        sys.stdout.flush()
        if asked.out:  # after each measure: a run that is cut off has said what it knew
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps({"settings": about, **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
