"""Steer a color: the mean difference of two groups of prompts, added where the picture reads the text (arXiv:2308.10248).

The vectors come from three shapes and steer three others. At the middle block alone no strength turns red into blue, at the
output of all cross-attention layers it does; the same vectors with their channels shuffled are the control.

python examples/steering.py [steps, default 2; 10 show it]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import interp
from interp.interventions import steering_vector
from interp.scoring import mean_scores

if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    pipe = interp.load("scenes")
    layers = [site.name.replace(":probs", ":out") for site in interp.sites(pipe, "*attn2:probs")]
    middle = "unet.mid_block:out"
    known, others = (
        [[f"a large {color} {shape} on a gray background" for shape in shapes] for color in ("red", "blue")]
        for shapes in (("circle", "star", "square"), ("triangle", "heart", "ring"))
    )

    both = interp.trace(pipe, known[0] + known[1], steps=steps, progress=False,
                        capture=interp.Capture(attention=None, image=False, sites=(*layers, middle)))  # fmt: skip
    vectors = {site: steering_vector(both, site, positive=[3, 4, 5], negative=[0, 1, 2]) for site in (*layers, middle)}
    shuffled = {site: np.random.default_rng(0).permutation(vector) for site, vector in vectors.items()}

    def steer(sites, strength, vectors=vectors):
        return [interp.Steer(site, vectors[site], coefficient=strength) for site in sites]

    run = interp.trace(
        pipe,
        [{"prompt": red, "target": blue} for red, blue in zip(*others, strict=True)],
        steps=steps,
        conditions={
            "unchanged": [],
            "middle block × 3": steer([middle], 3.0),
            "all layers × 1": steer(layers, 1.0),
            "all layers × 3": steer(layers, 3.0),
            "all layers × 8": steer(layers, 8.0),
            "shuffled × 3": steer(layers, 3.0, shuffled),
        },
        capture=interp.Capture(attention=None, latents=False, noise_pred=False),
        scores=["judge"],
        progress=False,
    )
    ds = mean_scores(run)
    for name in run.conditions:
        seen = []
        for metric in ("judge:prompt", "judge:target"):
            one = ds.sel(condition=name, metric=metric)
            seen.append("{:.2f} [{:.2f}, {:.2f}]".format(float(one["mean"]), *one["interval"].values))
        print(f"{name:<17} judge sees {seen[0]} of the red prompt, {seen[1]} of the blue one")
    print(f"n = 3 prompts, one seed, {steps} steps; brackets: bootstrap 95 % interval over prompts")
    figure, axes = plt.subplots(len(run.conditions), 3, figsize=(4.6, 6.6), layout="constrained")
    for row, name in zip(axes, run.conditions, strict=True):
        part = run.condition(name)
        row[0].set_ylabel(name.replace(" × ", "\n× "), rotation=0, ha="right", va="center")
        for axis, picture, prompt in zip(row, part.images.values, part.samples["prompt"], strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[], title=" ".join(prompt.split()[2:4]) if name == "unchanged" else "")
    figure.savefig("steering.png", dpi=100)
