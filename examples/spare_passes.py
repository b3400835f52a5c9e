"""What may be left out late in a run: alignment and change against the share of forward passes that is saved.

Text removed, guidance removed, cross-attention cached, and combinations, all from the same noise. Caching alone saves no
pass, only the cross-attention in it. The mean of both branches, as T-GATE caches it (arXiv:2404.02747), makes them equal:
one of them is then enough. Named at the end is the
setting that saves most and is not inferior: the lower 95 % bound of its paired difference to the baseline is above −1 % of
the baseline's alignment, by both judges. Two prompts show how it is done; the answer needs hundreds, and a GPU.

python examples/spare_passes.py [number of prompts, default 2] [steps, default 4]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import interp
from interp.probes.bootstrap import mean_interval
from interp.scenes.captions import prompts

CURVES = {  # what a setting does from its start on
    "text removed": lambda s: [interp.RemoveText(start=s)],
    "guidance removed": lambda s: [interp.RemoveGuidance(start=s)],
    "cross-attention cached": lambda s: [interp.CacheCrossAttention(start=s, value="own")],
    "cached, guidance removed": lambda s: [
        interp.CacheCrossAttention(start=s, value="own"),
        interp.RemoveGuidance(start=s),
    ],
    "mean cached, text removed": lambda s: [
        interp.CacheCrossAttention(start=s, value="mean"),
        interp.RemoveText(start=s),
    ],  # T-GATE
}
JUDGES = ["clip:prompt", "judge:prompt"]
TITLES = {
    "clip:prompt": "CLIP, to the prompt", "judge:prompt": "judge: as the prompt says", "l1:baseline": "L1 to the baseline",
    "clip_image:baseline": "CLIP, to the baseline's picture",
}  # fmt: skip
METRICS = list(TITLES)

if __name__ == "__main__":
    n, steps = (int(given) for given in (*sys.argv[1:], *["2", "4"][len(sys.argv) - 1 :]))
    pipe = interp.load("scenes").to("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"baseline": []} | {
        f"{name} from {start:.0%}": changes(start)
        for name, changes in CURVES.items()
        for start in ((0.2, 0.4, 0.5, 0.6, 0.8) if n > 8 else (0.5,))
    }
    run = interp.trace(
        pipe, prompts(n // 2, 1, seed=3) + prompts(n - n // 2, 2, seed=3), steps=steps, batch_size=min(n, 256),
        conditions=settings, capture=interp.Capture(attention=None, latents=False, noise_pred=False),
        scores=["clip", "judge", "l1", "clip_image"],
    )  # fmt: skip

    base = run.condition("baseline")
    passes, units = float(base.nfe.sum("branch").mean()), base.samples["prompt_id"].to_numpy()

    def told(values):
        mean, (low, high) = mean_interval(values, units)
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    table = {}
    print(
        f"| n = {n}, {steps} steps | passes saved | {' | '.join(METRICS)} | |\n|---|---:|{'---:|' * len(METRICS)}---|"
    )
    for name in settings:
        part = run.condition(name)
        saved = 1 - float(part.nfe.sum("branch").mean()) / passes
        inferior = []
        for judge in JUDGES:
            loss = part.scores.sel(metric=judge).values - base.scores.sel(metric=judge).values
            _, (low, _) = mean_interval(loss, units)
            inferior.append(not low > -0.01 * abs(float(base.scores.sel(metric=judge).mean())))
        table[name] = saved, part.scores, any(inferior)
        means = " | ".join(told(part.scores.sel(metric=m).values) for m in METRICS)
        print(f"| {name} | {saved:.0%} | {means} | {'inferior or unsure' if any(inferior) else 'not inferior'} |")
    best = max((name for name in table if not table[name][2]), key=lambda name: table[name][0])
    print(f"n = {n}: of what is not inferior, {best!r} saves most, {table[best][0]:.0%} of the passes")

    figure, axes = plt.subplots(1, len(METRICS), figsize=(13, 3.2), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for curve in CURVES:
            points = [table[name] for name in settings if name.rpartition(" from ")[0] == curve]
            found = [mean_interval(scores.sel(metric=metric).values, units) for _, scores, _ in points]
            mean, low, high = ([float(v) for v in column] for column in zip(*((m, *i) for m, i in found), strict=True))
            x = [100 * saved for saved, *_ in points]
            axis.plot(x, mean, "o-", label=curve)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set(title=TITLES[metric], xlabel="forward passes saved (%)")
    axes[0].legend(fontsize=7)
    figure.savefig("spare_passes.png", dpi=120)
