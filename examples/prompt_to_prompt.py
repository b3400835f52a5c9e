"""Prompt-to-Prompt (arXiv:2208.01626): swap a word and keep the layout, by the source's attention in the first steps.

The first row of the table is the source; the second is its edit, which runs in the same batch from the same noise.

python examples/prompt_to_prompt.py [number of seeds, default 1] [steps, default 8]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import interp
from interp.probes.bootstrap import mean_interval

SOURCE = "a large plain red circle above a small striped blue square on a beige background"
EDITED = "a large plain red heart above a small striped blue square on a beige background"

if __name__ == "__main__":
    n, steps = (int(given) for given in (*sys.argv[1:], *("1", "8")[len(sys.argv) - 1 :]))
    run = interp.trace(
        "scenes",
        [SOURCE, EDITED],
        seeds=range(n),
        steps=steps,
        batch_size=2 * n,
        capture=interp.Capture(attention=None),
        conditions={
            "prompt alone": [],
            "cross injected": interp.prompt_to_prompt(self_replace=0),
            "cross and self injected": interp.prompt_to_prompt(),
            "cross injected, striped × 0": interp.prompt_to_prompt(self_replace=0, words="striped", scale=0.0),
        },
        scores=["judge"],
        progress=False,
    )
    shown = min(n, 2)
    figure, axes = plt.subplots(len(run.conditions), 2 * shown, figsize=(1.5 + 2.5 * shown, 5.2), layout="constrained")
    for row, name in zip(axes, run.conditions, strict=True):
        part = run.condition(name)
        pictures, edited = part.images.values, (part.samples["prompt"] == EDITED).to_numpy()
        apart = np.abs(pictures[edited] / 255 - pictures[~edited] / 255).mean((1, 2, 3))
        told = []
        for values in (apart, part.scores.values[edited, 0]):
            mean, (low, high) = mean_interval(values, np.arange(n))
            told.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        print(f"{name:<28} L1 to the source {told[0]}, judge sees {told[1]} of the edited prompt")
        row[0].set_ylabel(name.replace(" injected", "\ninjected"), rotation=0, ha="right", va="center")
        for k, picture in enumerate([*pictures[~edited][:shown], *pictures[edited][:shown]]):
            row[k].imshow(picture)
            title = f"{'source' if k < shown else 'edit'}, seed {k % shown}" if name == "prompt alone" else ""
            row[k].set(xticks=[], yticks=[], title=title)
    print(f"n = {n} seed{'s' * (n > 1)}, {steps} steps; brackets: bootstrap 95 % interval over seeds")
    figure.savefig("prompt_to_prompt.png", dpi=100)
