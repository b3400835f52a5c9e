"""Steer a color: the mean difference of two groups of prompts, added at one block with growing strength (arXiv:2308.10248).

So few prompts and steps show how it is done, not that it works: with 2 prompts and 4 steps no strength turned red into
blue.

python examples/steering.py [number of prompts, default 2]
"""

import sys

import numpy as np
from PIL import Image

import interp
from interp.interventions import steering_vector

if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    shapes, site = ["circle", "star", "square", "triangle", "heart", "ring"], "unet.mid_block:out"
    colored = {c: [f"a large {c} {s} on a gray background" for s in shapes[:n]] for c in ("red", "blue")}
    pipe = interp.load("scenes")

    both = interp.trace(pipe, colored["red"] + colored["blue"], steps=4,
                        capture=interp.Capture(attention=None, image=False, sites=(site,)))  # fmt: skip
    vector = steering_vector(both, site, positive=range(n, 2 * n), negative=range(n))

    strengths = [0.0, 1.0, 2.0, 4.0]
    run = interp.trace(
        pipe,
        [{"prompt": a, "target": b} for a, b in zip(*colored.values(), strict=True)],
        steps=4,
        conditions={f"{k:g}": [interp.Steer(site, vector, coefficient=k)] for k in strengths},
        capture=interp.Capture(attention=None),
        scores=["judge"],
    )
    for name in run.conditions:
        scores = run.condition(name).scores.mean("sample")
        red, blue = (float(scores.sel(metric=f"judge:{column}")) for column in ("prompt", "target"))
        print(f"{name:>3} × (blue − red): judge says red prompt {red:.2f}, blue prompt {blue:.2f}")
    print(f"n = {n} prompts, one seed")
    rows = [np.concatenate(list(run.condition(name).images.values), axis=1) for name in run.conditions]
    Image.fromarray(np.concatenate(rows)).save("steering.png")
