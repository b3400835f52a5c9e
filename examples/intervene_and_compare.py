"""Intervene and compare: the same noise with and without the text in the last 60 % of the steps.

python examples/intervene_and_compare.py [steps, default 10]
"""

import sys

import interp
from interp.scoring import mean_scores

PROMPTS = ["a large red circle on a gray background", "a large blue star on a beige background"]

if __name__ == "__main__":
    run = interp.trace(
        "scenes",
        PROMPTS,
        seeds=[0, 1],
        steps=int(sys.argv[1]) if len(sys.argv) > 1 else 10,
        conditions={
            "baseline": [],
            "text removed late": [interp.RemoveText(start=0.4)],
            "text removed early": [interp.RemoveText(stop=0.4)],
        },
        scores=["clip", "judge", "l1"],
    )
    ds = mean_scores(run)
    for name in run.conditions:
        print(f"{name}: {int(run.condition(name).nfe.sum('branch').mean())} forward passes")
        for metric in ds["metric"].values:
            one = ds.sel(condition=name, metric=metric)
            print("  {:<13} {:.3f} [{:.3f}, {:.3f}]".format(metric, float(one["mean"]), *one["interval"].values))
    print("n = 2 prompts of 2 seeds; brackets: bootstrap 95 % interval over prompts")
