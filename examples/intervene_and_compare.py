"""Intervene and compare: the same noise with and without the text in the last 60 % of the steps.

python examples/intervene_and_compare.py
"""

import numpy as np

import interp

PROMPTS = ["a large red circle on a gray background", "a large blue star on a beige background"]

if __name__ == "__main__":
    run = interp.trace(
        "scenes",
        PROMPTS,
        seeds=[0, 1],
        steps=10,
        conditions={
            "baseline": [],
            "text removed late": [interp.RemoveText(start=0.4)],
            "text removed early": [interp.RemoveText(stop=0.4)],
        },
        scores=["clip", "judge"],
    )
    reference = run.condition("baseline").images.values.astype(float)
    for name in run.conditions:
        part = run.condition(name)
        passes = int(part.nfe.sum("branch").mean())
        change = np.abs(part.images.values - reference).mean() / 255
        scores = part.scores.mean("sample").to_series().round(2).to_dict()
        print(f"{name:<20} {passes} forward passes, L1 to baseline {change:.3f}, {scores}")
